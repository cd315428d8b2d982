"""The second key: what this site approved, and nothing that merely looks like it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from client import studies
from client.config import SiteConfig
from shared_models import plan as plans
from shared_models.contracts import Approval, Countersignature
from shared_models.masking import load_mask_key, public_mask_key
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, is_signed_by, public_key, sign

TODAY = datetime.now(UTC).date()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


@pytest.fixture
def site(site_of, tmp_path: Path) -> SiteConfig:
    found: SiteConfig = site_of({"state_dir": tmp_path / "state"})
    return found


@pytest.fixture
def signed(plan_of, coordinator_key: Ed25519PrivateKey) -> SignedPlan:
    return SignedPlan(plan_of(), sign(plan_of(), key=coordinator_key))


def approved(signed: SignedPlan, site: SiteConfig, *, key: Ed25519PrivateKey = KEY) -> Any:
    studies.approve(signed, site, key=KEY, who="Dr. Reed")
    return studies.approved(digest(signed.plan), site, key=key)


def folder_of(signed: SignedPlan, site: SiteConfig) -> Path:
    return site.state_dir / "studies" / digest(signed.plan)


def test_an_approved_plan_is_found_again_as_it_was_approved(
    signed: SignedPlan, site: SiteConfig
) -> None:
    assert approved(signed, site) == signed.plan


def test_a_plan_nobody_approved_is_not_found(signed: SignedPlan, site: SiteConfig) -> None:
    assert studies.approved(digest(signed.plan), site, key=KEY) is None


def test_the_countersignature_is_the_sites_over_who_approved_what(
    signed: SignedPlan, site: SiteConfig
) -> None:
    found = studies.approve(signed, site, key=KEY, who="Dr. Reed")
    assert is_signed_by(found.approval, found.signature, key=public_key(KEY))
    assert found.approval.study == digest(signed.plan)
    assert (found.approval.site, found.approval.who) == ("north", "Dr. Reed")
    assert found.approval.decision == "approved"


def test_an_approval_names_a_masking_key_under_secure_aggregation_and_only_then(
    plan_of, site: SiteConfig, coordinator_key: Ed25519PrivateKey
) -> None:
    for is_secure in (False, True):
        plan = plan_of({"rounds.secure_aggregation": is_secure})
        signed = SignedPlan(plan, sign(plan, key=coordinator_key))
        found = studies.approve(signed, site, key=KEY, who="Dr. Reed")
        assert is_signed_by(found.approval, found.signature, key=public_key(KEY))
        file = folder_of(signed, site) / studies.MASK_KEY
        assert file.exists() == is_secure
        expected = public_mask_key(load_mask_key(file)) if is_secure else None
        assert found.approval.mask_key == expected


def test_each_study_has_a_masking_key_of_its_own(
    plan_of, site: SiteConfig, coordinator_key: Ed25519PrivateKey
) -> None:
    made = set()
    for seed in (1, 2):
        plan = plan_of({"rounds.secure_aggregation": True, "seed": seed})
        signed = SignedPlan(plan, sign(plan, key=coordinator_key))
        for who in ("Dr. Reed", "Dr. Read"):  # approving again keeps the key
            made.add(studies.approve(signed, site, key=KEY, who=who).approval.mask_key)
    assert len(made) == 2


@pytest.mark.parametrize("who", ["", "x" * 121])
def test_nobody_cannot_have_a_masking_key_made(
    who: str, plan_of, site: SiteConfig, coordinator_key: Ed25519PrivateKey
) -> None:
    plan = plan_of({"rounds.secure_aggregation": True})
    with pytest.raises(ValidationError):
        studies.approve(SignedPlan(plan, sign(plan, key=coordinator_key)), site, key=KEY, who=who)
    assert not site.state_dir.exists()


def test_an_approval_by_another_key_is_not_ours(signed: SignedPlan, site: SiteConfig) -> None:
    assert approved(signed, site, key=Ed25519PrivateKey.generate()) is None


@pytest.mark.parametrize("who", ["", "x" * 121])
def test_nobody_cannot_approve(who: str, signed: SignedPlan, site: SiteConfig) -> None:
    with pytest.raises(ValidationError):
        studies.approve(signed, site, key=KEY, who=who)
    assert not site.state_dir.exists()


Forgery = Callable[[SignedPlan, SiteConfig], None]


def change_the_plan(signed: SignedPlan, site: SiteConfig) -> None:
    changed = signed.plan.model_copy(update={"seed": 4})
    write(folder_of(signed, site) / "plan.toml", changed, signed)


def drop_the_signature(signed: SignedPlan, site: SiteConfig) -> None:
    (folder_of(signed, site) / "plan.toml").write_text(plans.render(signed.plan))


def sign_by_another(signed: SignedPlan, site: SiteConfig) -> None:
    other = SignedPlan(signed.plan, sign(signed.plan, key=Ed25519PrivateKey.generate()))
    write(folder_of(signed, site) / "plan.toml", signed.plan, other)


def refuse(signed: SignedPlan, site: SiteConfig) -> None:
    countersign(signed, site, decision="refused")


def approve_another_study(signed: SignedPlan, site: SiteConfig) -> None:
    countersign(signed, site, study="00" * 32)


def change_who_approved(signed: SignedPlan, site: SiteConfig) -> None:
    file = folder_of(signed, site) / "approval.json"
    file.write_text(file.read_text().replace("Dr. Reed", "Dr. Read"))


def move_to_another_study(signed: SignedPlan, site: SiteConfig) -> None:
    other = signed.plan.model_copy(update={"seed": 4})
    folder = folder_of(signed, site)
    folder.rename(folder.with_name(digest(other)))
    folder.mkdir()
    write(folder / "plan.toml", other, signed)
    (folder.with_name(digest(other)) / "approval.json").rename(folder / "approval.json")


def lose_the_approval(signed: SignedPlan, site: SiteConfig) -> None:
    (folder_of(signed, site) / "approval.json").unlink()


def lose_the_plan(signed: SignedPlan, site: SiteConfig) -> None:
    (folder_of(signed, site) / "plan.toml").unlink()


def break_the_approval(signed: SignedPlan, site: SiteConfig) -> None:
    (folder_of(signed, site) / "approval.json").write_bytes(b"\xff{")


def break_the_plan(signed: SignedPlan, site: SiteConfig) -> None:
    (folder_of(signed, site) / "plan.toml").write_bytes(b"name = ")


def write(file: Path, plan: StudyPlan, signed: SignedPlan) -> None:
    file.write_text(plans.render(plan, signed.signature))


def countersign(signed: SignedPlan, site: SiteConfig, **changed: Any) -> None:
    fields = {
        "study": digest(signed.plan),
        "site": "north",
        "decision": "approved",
        "who": "Dr. Reed",
        "when": datetime.now(UTC),
    }
    approval = Approval.model_validate(fields | changed)
    found = Countersignature(approval=approval, signature=sign(approval, key=KEY))
    (folder_of(signed, site) / "approval.json").write_text(found.model_dump_json())


@pytest.mark.parametrize(
    "forge",
    [
        change_the_plan,
        drop_the_signature,
        sign_by_another,
        refuse,
        approve_another_study,
        change_who_approved,
        move_to_another_study,
        lose_the_approval,
        lose_the_plan,
        break_the_approval,
        break_the_plan,
    ],
)
def test_an_approval_that_was_tampered_with_approves_nothing(
    forge: Forgery, signed: SignedPlan, site: SiteConfig
) -> None:
    assert approved(signed, site) is not None
    forge(signed, site)
    assert studies.approved(digest(signed.plan), site, key=KEY) is None


def test_a_countersignature_written_by_hand_with_the_sites_key_holds(
    signed: SignedPlan, site: SiteConfig
) -> None:
    approved(signed, site)
    countersign(signed, site)
    assert studies.approved(digest(signed.plan), site, key=KEY) == signed.plan


# --- objections before approving


def test_a_plan_signed_by_its_coordinator_meets_no_objection(
    signed: SignedPlan, site: SiteConfig
) -> None:
    assert studies.objections(signed, site, today=TODAY) == []


@pytest.mark.parametrize("who", ["nobody", "a stranger", "the coordinator over another plan"])
def test_a_plan_not_signed_by_its_coordinator_is_objected_to(
    who: str, signed: SignedPlan, site: SiteConfig, coordinator_key: Ed25519PrivateKey
) -> None:
    other = signed.plan.model_copy(update={"seed": 4})
    signature = {
        "nobody": None,
        "a stranger": sign(signed.plan, key=Ed25519PrivateKey.generate()),
        "the coordinator over another plan": sign(other, key=coordinator_key),
    }[who]
    found = studies.objections(SignedPlan(signed.plan, signature), site, today=TODAY)
    assert found == ["signature: the plan is not signed by its coordinator"]


def test_the_sites_rules_and_the_signature_are_told_together(signed: SignedPlan, site_of) -> None:
    site = site_of({"policy.max_rounds": 1, "policy.nets": ["unet"]})
    found = studies.objections(SignedPlan(signed.plan, None), site, today=TODAY)
    assert [objection.split(":")[0] for objection in found] == [
        "net.name",
        "training.num_rounds",
        "signature",
    ]

"""The second key: what this site approved, and nothing that merely looks like it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from client import masks, peers, studies
from client.config import SiteConfig
from client.gate import Refused
from shared_models import plan as plans
from shared_models.contracts import Approval, Countersignature, RoundOrder
from shared_models.errors import ConsiliaError, DocumentError
from shared_models.journal import FILE, parse
from shared_models.masking import create_mask_key, load_mask_key, public_mask_key
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


# --- refusing and withdrawing


def decided(site: SiteConfig, study: str) -> list[str]:
    return [found.approval.decision for found in studies.decisions(studies.folder_of(site, study))]


def withdraw(signed: SignedPlan, site: SiteConfig) -> Countersignature:
    return studies.withdraw(signed, site, key=KEY, who="Dr. Reed", reason="capacity")


def known(site: SiteConfig, *, today: date = TODAY) -> studies.Known:
    (found,) = studies.known(site, key=KEY, today=today)
    return found


def test_a_withdrawn_approval_approves_nothing_and_can_be_given_again(
    signed: SignedPlan, site: SiteConfig
) -> None:
    study = digest(signed.plan)
    assert approved(signed, site) is not None
    found = withdraw(signed, site)
    assert is_signed_by(found.approval, found.signature, key=public_key(KEY))
    assert found.approval.reason == "capacity"
    assert studies.approved(study, site, key=KEY) is None
    assert known(site).status == "withdrawn"
    assert approved(signed, site) == signed.plan
    assert decided(site, study) == ["approved", "withdrawn", "approved"]


def test_a_refusal_tells_a_word_and_keeps_peoples_own(signed: SignedPlan, site: SiteConfig) -> None:
    found = studies.refuse(
        signed, site, key=KEY, who="Dr. Reed", reason="legal", note="ask our lawyers"
    )
    assert (found.approval.decision, found.approval.reason) == ("refused", "legal")
    assert "lawyers" not in found.model_dump_json()
    folder = folder_of(signed, site)
    holding = [file.name for file in folder.iterdir() if "lawyers" in file.read_text()]
    assert holding == [studies.NOTES]
    assert known(site).status == "refused"
    assert studies.approved(digest(signed.plan), site, key=KEY) is None


def test_once_its_coordinator_says_that_a_study_is_closed_no_order_for_it_is_obeyed(
    signed: SignedPlan, site: SiteConfig
) -> None:
    now = datetime.now(UTC)
    studies.approve(signed, site, key=KEY, who="Dr. Reed")
    for state, status in (("running", "approved"), ("closed", "closed")):
        word = studies.Word(state=state, when=now)
        studies.keep_offer(signed, word, site, key=KEY)
        found = studies.approved(digest(signed.plan), site, key=KEY)
        assert (found is None) == (state == "closed")
        assert known(site).status == status
    with pytest.raises(ConsiliaError, match="closed the study"):
        studies.approve(signed, site, key=KEY, who="Dr. Reed")
    withdraw(signed, site)
    assert known(site).status == "withdrawn"


def test_what_is_approved_is_withdrawn_and_not_refused(
    signed: SignedPlan, site: SiteConfig
) -> None:
    approved(signed, site)
    with pytest.raises(ConsiliaError, match="withdraw"):
        studies.refuse(signed, site, key=KEY, who="Dr. Reed", reason="legal")
    assert studies.approved(digest(signed.plan), site, key=KEY) == signed.plan


@pytest.mark.parametrize("before", ["nothing", "a refusal", "a withdrawal"])
def test_only_what_is_approved_can_be_withdrawn(
    before: str, signed: SignedPlan, site: SiteConfig
) -> None:
    if before == "a refusal":
        studies.refuse(signed, site, key=KEY, who="Dr. Reed", reason="data")
    if before == "a withdrawal":
        approved(signed, site)
        withdraw(signed, site)
    with pytest.raises(ConsiliaError, match="nothing to withdraw"):
        withdraw(signed, site)


def test_a_later_decision_is_later_though_the_clock_was_put_back(
    signed: SignedPlan, site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2001, 1, 1, tzinfo=tz)

    first = studies.approve(signed, site, key=KEY, who="Dr. Reed")
    monkeypatch.setattr(studies, "datetime", Clock)
    second = withdraw(signed, site)
    assert second.approval.when > first.approval.when
    assert studies.last_decision(digest(signed.plan), site, key=KEY) == second


@pytest.mark.parametrize("at", ["the journal", "the history", "the decision"])
def test_a_withdrawal_killed_at_any_write_leaves_the_study_not_approved(
    at: str, signed: SignedPlan, site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved(signed, site)

    def killed(*_: Any, **__: Any) -> None:
        raise OSError("killed")

    where = {"the journal": (studies.journal, "append"), "the history": (studies, "append_line")}
    with monkeypatch.context() as patch:
        patch.setattr(*where.get(at, (studies, "replace")), killed)
        with pytest.raises(OSError, match="killed"):
            withdraw(signed, site)
        assert studies.approved(digest(signed.plan), site, key=KEY) is None
    if at != "the decision":
        withdraw(signed, site)  # whoever was interrupted says it again
    assert studies.approved(digest(signed.plan), site, key=KEY) is None
    assert studies.approve(signed, site, key=KEY, who="Dr. Reed")
    assert studies.approved(digest(signed.plan), site, key=KEY) == signed.plan


def test_an_old_approval_put_back_by_hand_approves_nothing(
    signed: SignedPlan, site: SiteConfig
) -> None:
    approved(signed, site)
    file = folder_of(signed, site) / studies.APPROVAL
    before = file.read_bytes()
    withdraw(signed, site)
    file.write_bytes(before)
    assert studies.approved(digest(signed.plan), site, key=KEY) is None


def test_an_approval_of_before_there_was_a_history_can_be_withdrawn(
    signed: SignedPlan, site: SiteConfig
) -> None:
    approved(signed, site)
    (folder_of(signed, site) / studies.DECISIONS).unlink()
    assert studies.approved(digest(signed.plan), site, key=KEY) == signed.plan
    withdraw(signed, site)
    assert decided(site, digest(signed.plan)) == ["approved", "withdrawn"]


def test_an_approval_that_was_withdrawn_can_take_part_in_no_secure_sum(
    plan_of, site: SiteConfig, coordinator_key: Ed25519PrivateKey, countersign_peers: Any
) -> None:
    plan = plan_of({"rounds.secure_aggregation": True, "rounds.quorum": 2})
    signed = SignedPlan(plan, sign(plan, key=coordinator_key))
    old = studies.approve(signed, site, key=KEY, who="Dr. Reed")
    withdraw(signed, site)
    assert not (folder_of(signed, site) / studies.MASK_KEY).exists()
    new = studies.approve(signed, site, key=KEY, who="Dr. Reed")
    assert old.approval.mask_key != new.approval.mask_key
    config, order = countersign_peers(plan, site)
    with pytest.raises(Refused, match="own countersignature"):
        masks.mask_for(order(old), plan, config)
    assert masks.mask_for(order(new), plan, config) is not None
    with pytest.raises(Refused, match="masked before"):
        masks.mask_for(order(new), plan, config)


@pytest.fixture
def countersign_peers(countersign: Any) -> Any:
    """Return a site that trusts south, and what makes orders among both."""

    def make(plan: StudyPlan, site: SiteConfig) -> Any:
        key = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
        file = site.state_dir / "peers.toml"
        peers.trust(file, name="south", key=public_key(key))
        config = site.model_copy(update={"policy": site.policy.model_copy(update={"peers": file})})
        mask_key = public_mask_key(create_mask_key(site.state_dir / "south.key"))
        south = countersign(plan, "south", key=key, mask_key=mask_key)
        now = datetime.now(UTC)

        def order(own: Countersignature) -> RoundOrder:
            return RoundOrder(
                study=digest(plan),
                round_=0,
                kind="train",
                site="north",
                weights_digest="0" * 64,
                participants=(own, south),
                issued_at=now,
                expires_at=now,
            )

        return config, order

    return make


# --- what is known


def test_an_offered_plan_is_known_and_not_approved(signed: SignedPlan, site: SiteConfig) -> None:
    word = studies.Word(state="offered", when=datetime.now(UTC))
    assert studies.keep_offer(signed, word, site, key=KEY)
    assert not studies.keep_offer(signed, word, site, key=KEY)
    assert known(site) == (digest(signed.plan), signed, "offered", None, word)
    assert studies.approved(digest(signed.plan), site, key=KEY) is None
    kinds = [line.entry.kind for line in parse((site.state_dir / FILE).read_bytes())]
    assert kinds == ["opened", "offered"]


def test_what_may_no_longer_run_is_expired(signed: SignedPlan, site: SiteConfig) -> None:
    approved(signed, site)
    assert known(site, today=signed.plan.expires).status == "approved"
    late = signed.plan.expires + timedelta(days=1)
    assert known(site, today=late).status == "expired"
    withdraw(signed, site)
    assert known(site, today=late).status == "withdrawn"


def test_an_unsigned_plan_in_a_folder_is_not_known(signed: SignedPlan, site: SiteConfig) -> None:
    approved(signed, site)
    drop_the_signature(signed, site)
    assert studies.known(site, key=KEY, today=TODAY) == []


def test_a_study_is_looked_up_by_the_beginning_of_its_digest_or_by_a_file(
    signed: SignedPlan, site: SiteConfig, tmp_path: Path
) -> None:
    approved(signed, site)
    study, file = digest(signed.plan), tmp_path / "plan.toml"
    write(file, signed.plan, signed)
    for text in (study, study[:4], study[:4].upper(), str(file)):
        assert studies.look_up(text, site, key=KEY, today=TODAY) == known(site)


@pytest.mark.parametrize("text", ["", "x", "0" * 64])
def test_what_names_no_study_is_told_with_the_cure(
    text: str, signed: SignedPlan, site: SiteConfig
) -> None:
    approved(signed, site)
    with pytest.raises(DocumentError, match="consilia-site studies lists them"):
        studies.look_up(text, site, key=KEY, today=TODAY)


def test_a_beginning_that_several_studies_share_names_none(
    plan_of, site: SiteConfig, coordinator_key: Ed25519PrivateKey
) -> None:
    for seed in range(17):  # two of seventeen digests begin with the same digit
        plan = plan_of({"seed": seed})
        approved(SignedPlan(plan, sign(plan, key=coordinator_key)), site)
    first = [one.study[0] for one in studies.known(site, key=KEY, today=TODAY)]
    shared = next(digit for digit in first if first.count(digit) > 1)
    with pytest.raises(DocumentError, match=f"{first.count(shared)} of 17"):
        studies.look_up(shared, site, key=KEY, today=TODAY)

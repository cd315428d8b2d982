"""What sites tell at the desk is kept as far as they signed it, and no story is told twice over."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server import desk as desks
from server import report, store
from server.desk import Desk
from server.store import RunSettings, SiteKeys
from shared_models import weights as weights_of
from shared_models.contracts import (
    Approval,
    Bulletin,
    Checkpoint,
    Countersignature,
    Health,
    RoundRecord,
    SignedCheckpoint,
    Visit,
)
from shared_models.errors import ConsiliaError, SignatureError
from shared_models.plan import StudyPlan, parse
from shared_models.signing import digest, is_signed_by, public_key, sign

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
TODAY = date(2026, 3, 1)
SITES = ("north", "south")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.ljust(32).encode()) for name in SITES}
HEALTH = Health(version="0.1.0", started_at=NOON, free_mb=1, has_gpu=False, certificate_days=9)
SETTINGS = RunSettings(signing_key=Path("signing.pem"), sites={})

NewPlan = Callable[..., StudyPlan]


@pytest.fixture
def desk(tmp_path: Path, coordinator_key: Ed25519PrivateKey) -> Desk:
    keys = {name: SiteKeys(signing=public_key(key), node="n") for name, key in KEYS.items()}
    return Desk(tmp_path / "office", coordinator_key, keys)


@pytest.fixture
def offered(desk: Desk, plan: StudyPlan) -> desks.Study:
    return desks.propose(desk, plan, settings=SETTINGS, today=TODAY)


def decided(plan: StudyPlan, decision: str, *, minute: int = 0, **changed: Any) -> Countersignature:
    key = changed.pop("key", KEYS["north"])
    when = NOON + timedelta(minutes=minute)
    fields = {"study": digest(plan), "site": "north", "decision": decision, "who": "x"}
    approval = Approval.model_validate(fields | {"when": when} | changed)
    return Countersignature(approval=approval, signature=sign(approval, key=key))


def point(
    index: int, head: str = "a", *, minute: int | None = None, **changed: Any
) -> SignedCheckpoint:
    key = changed.pop("key", KEYS["north"])
    when = NOON + timedelta(minutes=index if minute is None else minute)
    at = Checkpoint(site=changed.get("site", "north"), index=index, head=head * 64, when=when)
    return SignedCheckpoint(checkpoint=at, signature=sign(at, key=key))


def told(
    desk: Desk, *decisions: Countersignature, checkpoint: SignedCheckpoint | None = None
) -> Bulletin:
    visit = Visit(
        site="north", when=NOON, decisions=decisions, checkpoint=checkpoint, health=HEALTH
    )
    return desks.visit(desk, visit, site="north", today=TODAY)


def on_file(desk: Desk, offered: desks.Study) -> dict[str, Countersignature]:
    return store.approvals(offered.run_dir, offered.signed, store.read_settings(offered.run_dir))


# --- proposing


def test_a_proposed_plan_is_signed_and_offered_to_the_sites_it_names(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    assert offered.run_dir.name == digest(plan)[:12]
    (offer,) = told(desk).offers
    found = parse(offer.plan_toml)
    assert found.plan == plan
    assert is_signed_by(plan, found.signature, key=plan.coordinator)
    assert (offer.state, offer.num_rounds_done) == ("offered", 0)
    assert store.read_settings(offered.run_dir).sites == dict(desk.sites)


def test_a_site_is_offered_no_study_that_does_not_name_it(desk: Desk, new_plan: NewPlan) -> None:
    plan = new_plan(sites=["south"], rounds={"quorum": 1})
    desks.propose(desk, plan, settings=SETTINGS, today=TODAY)
    assert told(desk).offers == ()


def test_the_same_plan_again_is_the_same_study(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    told(desk, decided(plan, "approved"))
    assert desks.propose(desk, plan, settings=SETTINGS, today=TODAY).run_dir == offered.run_dir
    assert set(on_file(desk, offered)) == {"north"}


def test_a_closed_study_is_told_as_closed_and_cannot_be_proposed_again(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    told(desk, decided(plan, "approved"))
    assert told(desk).offers[0].state == "offered"
    store.write_failure(offered.run_dir, ["too few sites"])
    shut = desk._replace(closed={digest(plan)})
    (offer,) = told(shut).offers
    assert offer.state == "closed"
    with pytest.raises(ConsiliaError, match=r"closed, for good.*seed"):
        desks.propose(shut, plan, settings=SETTINGS, today=TODAY)
    (offered.run_dir / report.JSON_NAME).write_text("{}")
    assert told(shut).offers[0].state == "finished", "it has its report all the same"


def test_a_changed_plan_is_a_new_study_that_nobody_approved(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    told(desk, decided(plan, "approved"))
    changed = plan.model_copy(update={"seed": 5})
    other = desks.propose(desk, changed, settings=SETTINGS, today=TODAY)
    assert other.run_dir != offered.run_dir
    assert on_file(desk, other) == {}
    assert len(told(desk).offers) == 2


def test_all_that_is_wrong_with_a_proposal_is_told_and_nothing_is_offered(
    desk: Desk, new_plan: NewPlan
) -> None:
    plan = new_plan(coordinator="0" * 64, sites=["north", "west"], start="1" * 64)
    with pytest.raises(ConsiliaError) as caught:
        desks.propose(desk, plan, settings=SETTINGS, today=TODAY)
    fields = [objection.split(":")[0] for objection in caught.value.objections]
    assert fields == ["coordinator", "sites", "start"]
    assert "west" in str(caught.value)
    assert desks.studies(desk.folder, today=TODAY) == []


def test_a_warm_start_is_copied_if_it_is_the_plans(
    desk: Desk, new_plan: NewPlan, tmp_path: Path
) -> None:
    arrays = {"w": np.ones(3, np.float32)}
    file = tmp_path / "start.safetensors"
    weights_of.save(file, arrays)
    plan = new_plan(start=weights_of.digest(weights_of.flatten(arrays)))
    found = desks.propose(desk, plan, settings=SETTINGS, today=TODAY, start=file)
    assert (found.run_dir / "start.safetensors").read_bytes() == file.read_bytes()
    other = new_plan(start="1" * 64)
    with pytest.raises(ConsiliaError, match="not those that the plan states"):
        desks.propose(desk, other, settings=SETTINGS, today=TODAY, start=file)


def test_where_a_study_stands_is_read_from_its_folder(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    def state() -> tuple[str, int]:
        (offer,) = told(desk).offers
        return offer.state, offer.num_rounds_done

    record = RoundRecord(
        round_=0,
        kind="train",
        replies=(),
        weights_digest="0" * 64,
        seconds=1,
        sent_bytes=1,
        received_bytes=1,
    )
    store.append_round(offered.run_dir, record)
    assert state() == ("running", 1)
    store.write_failure(offered.run_dir, ["x"])
    assert state() == ("failed", 1)
    late = desks.studies(desk.folder, today=plan.expires + timedelta(days=1))
    assert late[0].state == "closed"
    (offered.run_dir / "report.json").write_text("{}")
    assert state() == ("finished", 1)


def test_a_study_that_cannot_be_read_hides_no_other(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    broken = desk.folder / "studies" / "broken"
    broken.mkdir()
    (broken / "plan.toml").write_text("x = ")
    assert [one.study for one in desks.studies(desk.folder, today=TODAY)] == [digest(plan)]


# --- decisions


def test_a_told_approval_is_what_orders_need(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    assert on_file(desk, offered) == {}
    found = decided(plan, "approved")
    told(desk, found)
    assert on_file(desk, offered) == {"north": found}


@pytest.mark.parametrize("decision", ["withdrawn", "refused"])
def test_a_newer_no_ends_the_orders_and_an_older_yes_does_not_bring_them_back(
    decision: str, desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    yes, no = decided(plan, "approved"), decided(plan, decision, minute=1)
    told(desk, yes)
    told(desk, no)
    assert on_file(desk, offered) == {}
    told(desk, yes)
    assert on_file(desk, offered) == {}
    again = decided(plan, "approved", minute=2)
    told(desk, again)
    assert on_file(desk, offered) == {"north": again}


def test_of_two_decisions_of_one_time_no_approval_wins(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    yes, no = decided(plan, "approved"), decided(plan, "withdrawn")
    for order in ((yes, no), (no, yes)):
        told(desk, *order)
        assert on_file(desk, offered) == {}


@pytest.mark.parametrize(
    "changed",
    [{"key": KEYS["south"]}, {"site": "south"}, {"site": "south", "key": KEYS["south"]}],
)
def test_a_decision_that_is_not_the_visitors_own_is_not_kept(
    changed: dict[str, Any], desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    told(desk, decided(plan, "approved", **changed))
    assert not (offered.run_dir / "approvals").exists()


def test_a_decision_about_a_study_not_offered_is_not_kept(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    told(desk, decided(plan.model_copy(update={"seed": 9}), "approved"))
    assert not (offered.run_dir / "approvals").exists()


@pytest.mark.parametrize(("who", "site"), [("south", "north"), ("west", "west")])
def test_a_visit_in_anothers_name_or_of_nobody_enrolled_is_refused(
    who: str, site: str, desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    visit = Visit(site=site, when=NOON, decisions=(decided(plan, "approved"),), health=HEALTH)
    with pytest.raises(SignatureError):
        desks.visit(desk, visit, site=who, today=TODAY)
    assert not (offered.run_dir / "approvals").exists()


# --- who takes part in the next round


def test_who_withdrew_takes_part_in_no_further_round(desk: Desk, offered: desks.Study) -> None:
    """``server.study`` reads the approvals on file before each round."""
    plan, settings = offered.signed.plan, store.read_settings(offered.run_dir)

    def approving() -> set[str]:
        return set(store.approvals(offered.run_dir, offered.signed, settings))

    told(desk, decided(plan, "approved"))
    assert approving() == {"north"}
    told(desk, decided(plan, "withdrawn", minute=1))
    assert approving() == set()
    told(desk, decided(plan, "approved", minute=2))
    assert approving() == {"north"}
    history = (offered.run_dir / "approvals" / "north.jsonl").read_text().splitlines()
    said = [Countersignature.model_validate_json(line).approval.decision for line in history]
    assert said == ["approved", "withdrawn", "approved"]


def test_who_decides_too_often_can_only_step_back(
    desk: Desk, offered: desks.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "MOST_DECISIONS", 3)
    plan, history = offered.signed.plan, offered.run_dir / "approvals" / "north.jsonl"
    words = ["approved", "withdrawn", "approved", "approved", "withdrawn", "withdrawn", "approved"]
    for minute, word in enumerate(words):
        told(desk, decided(plan, word, minute=minute))
    assert desks.decision(offered.run_dir, "north") == "withdrawn"
    said = [Countersignature.model_validate_json(x) for x in history.read_text().splitlines()]
    assert [one.approval.decision for one in said] == [*words[:3], "withdrawn"]


# --- checkpoints


def forks(desk: Desk) -> int:
    (north, _) = desks.sites(desk, today=TODAY)
    return north.num_forks


def kept(desk: Desk) -> list[int]:
    lines = (desk.folder / "checkpoints" / "north.jsonl").read_bytes().splitlines()
    return [SignedCheckpoint.model_validate_json(line).checkpoint.index for line in lines]


def test_a_journal_that_grows_gets_a_receipt_for_each_checkpoint(
    desk: Desk, coordinator_key: Ed25519PrivateKey
) -> None:
    for index in (3, 3, 8):  # the same may be told twice
        found = told(desk, checkpoint=point(index)).receipt
        assert found is not None
        assert found.receipt.checkpoint == digest(point(index).checkpoint)
        assert is_signed_by(found.receipt, found.signature, key=public_key(coordinator_key))
    assert kept(desk) == [3, 8]
    assert told(desk, checkpoint=point(3)).receipt is not None
    assert forks(desk) == 0


@pytest.mark.parametrize(
    "lie",
    [point(5, "b", minute=9), point(5, "b", minute=2), point(3, "b", minute=9), point(4, minute=9)],
    ids=["another head", "another head, dated back", "an old one's other head", "gone back"],
)
def test_a_journal_that_tells_another_story_is_noted_for_good_and_gets_no_receipt(
    lie: SignedCheckpoint, desk: Desk
) -> None:
    for index in (3, 5):
        told(desk, checkpoint=point(index))
    for _ in range(2):
        assert told(desk, checkpoint=lie).receipt is None
    assert forks(desk) == 1
    assert kept(desk) == [3, 5]
    assert told(desk, checkpoint=point(12)).receipt is not None
    assert forks(desk) == 1


def test_forks_are_kept_to_a_number(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "MOST_FORKS", 2)
    told(desk, checkpoint=point(5))
    for head in "bcdef":
        assert told(desk, checkpoint=point(5, head)).receipt is None
    assert (forks(desk), kept(desk)) == (2, [5])


def test_a_checkpoint_costs_the_same_however_many_there_are(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(desk, checkpoint=point(1))
    told(desk, checkpoint=point(2))
    with monkeypatch.context() as patch:
        patch.setattr(store, "read_lines", lambda *_, **__: pytest.fail("all of it was read"))
        assert told(desk, checkpoint=point(7)).receipt is not None
    assert kept(desk) == [1, 2, 7]
    assert told(desk, checkpoint=point(2)).receipt is not None, "told again, it is there"
    assert told(desk, checkpoint=point(7, "b")).receipt is None
    assert (forks(desk), kept(desk)) == (1, [1, 2, 7])


def test_a_checkpoint_that_was_long_on_its_way_is_no_fork(desk: Desk) -> None:
    told(desk, checkpoint=point(5))
    assert told(desk, checkpoint=point(4)).receipt is None
    assert forks(desk) == 0
    assert kept(desk) == [5]


@pytest.mark.parametrize("changed", [{"key": KEYS["south"]}, {"site": "south"}])
def test_a_checkpoint_that_is_not_the_visitors_own_is_not_kept(
    changed: dict[str, Any], desk: Desk
) -> None:
    assert told(desk, checkpoint=point(5, **changed)).receipt is None
    assert not (desk.folder / "checkpoints").exists()


def test_the_table_knows_who_was_here_and_what_they_decided(
    desk: Desk, plan: StudyPlan, offered: desks.Study
) -> None:
    told(desk, decided(plan, "refused"), checkpoint=point(5))
    told(desk)
    north, south = desks.sites(desk, today=TODAY)
    assert (north.site, north.decisions) == ("north", {digest(plan): "refused"})
    assert north.seen is not None
    assert (north.seen.health, north.seen.num_entries) == (HEALTH, 6)
    assert south == ("south", None, {}, 0)

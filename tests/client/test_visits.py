"""A visit tells what happened, once; what comes back is believed as far as it is signed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import journal, studies, visits
from client.config import SiteConfig
from shared_models import plan as plans
from shared_models.contracts import (
    Bulletin,
    Health,
    Offer,
    Receipt,
    SignedCheckpoint,
    SignedReceipt,
    StudyState,
    Visit,
)
from shared_models.errors import DocumentError
from shared_models.journal import RECEIPTS, Receipted, parse, receipt_faults
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, public_key, sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
TODAY = datetime.now(UTC).date()
NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HEALTH = Health(version="0.1.0", started_at=NOON, free_mb=1, has_gpu=False, certificate_days=9)
AGENT = visits.Agent(started_at=NOON, has_gpu=False, certificate_days=9)


@pytest.fixture
def site(site_of, tmp_path: Path) -> SiteConfig:
    found: SiteConfig = site_of({"state_dir": tmp_path / "state"})
    return found


@pytest.fixture
def signed(plan_of, coordinator_key: Ed25519PrivateKey) -> SignedPlan:
    return SignedPlan(plan_of(), sign(plan_of(), key=coordinator_key))


class Coordinator:
    """Offers plans, and signs a receipt for whatever it is told."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.key = key
        self.offers: list[Offer] = []
        self.told: list[Visit] = []
        self.is_silent = False

    def offer(self, signed: SignedPlan, state: StudyState = "offered", done: int = 0) -> None:
        text = plans.render(signed.plan, signed.signature)
        self.offers = [Offer(plan_toml=text, state=state, num_rounds_done=done)]

    def __call__(self, visit: Visit) -> Bulletin:
        self.told.append(visit)
        if self.is_silent:
            raise ConnectionError
        point = visit.checkpoint
        receipt = None if point is None else self.receipt(point)
        return bulletin(self.offers, receipt=receipt)

    def receipt(self, signed: SignedCheckpoint, **changed: Any) -> SignedReceipt:
        at = signed.checkpoint
        fields = {"site": at.site, "checkpoint": digest(at), "index": at.index, "when": NOON}
        receipt = Receipt.model_validate(fields | changed)
        return SignedReceipt(receipt=receipt, signature=sign(receipt, key=self.key))


@pytest.fixture
def coordinator(coordinator_key: Ed25519PrivateKey) -> Coordinator:
    return Coordinator(coordinator_key)


def bulletin(offers: list[Offer], *, receipt: SignedReceipt | None = None) -> Bulletin:
    return Bulletin(site="north", when=NOON, offers=tuple(offers), receipt=receipt)


def prepared(site: SiteConfig) -> Visit:
    return visits.prepare(site, KEY, health=HEALTH, today=TODAY)


def visited(site: SiteConfig, coordinator: Coordinator) -> list[str]:
    return visits.visit_once(site, KEY, coordinator, agent=AGENT)


def kinds(site: SiteConfig) -> list[str]:
    return [line.entry.kind for line in parse((site.state_dir / "journal.jsonl").read_bytes())]


def test_an_offered_plan_is_kept_and_journalled_once(
    signed: SignedPlan, site: SiteConfig, coordinator: Coordinator
) -> None:
    coordinator.offer(signed)
    assert visited(site, coordinator) == [digest(signed.plan)]
    coordinator.offer(signed, "running", 2)
    assert visited(site, coordinator) == []
    (known,) = studies.known(site, key=KEY, today=TODAY)
    assert (known.signed, known.status) == (signed, "offered")
    assert known.word is not None
    assert (known.word.state, known.word.num_rounds_done) == ("running", 2)
    assert kinds(site).count("offered") == 1
    assert studies.approved(known.study, site, key=KEY) is None


def stranger(plan: StudyPlan) -> str:
    return plans.render(plan, sign(plan, key=Ed25519PrivateKey.generate()))


def renamed(plan: StudyPlan, *, key: Ed25519PrivateKey) -> str:
    changed = plan.model_copy(update={"sites": ("south",)})
    return plans.render(changed, sign(changed, key=key))


def of_another(plan: StudyPlan) -> str:
    key = Ed25519PrivateKey.generate()
    changed = plan.model_copy(update={"coordinator": public_key(key)})
    return plans.render(changed, sign(changed, key=key))


BAD_OFFERS: dict[str, Callable[[StudyPlan, Ed25519PrivateKey], str]] = {
    "unsigned": lambda plan, key: plans.render(plan),
    "signed by a stranger": lambda plan, key: stranger(plan),
    "of another coordinator": lambda plan, key: of_another(plan),
    "for another site": lambda plan, key: renamed(plan, key=key),
    "changed": lambda plan, key: plans.render(plan, sign(plan, key=key)).replace(
        "seed = 3", "seed = 4"
    ),
    "no plan": lambda plan, key: "MARKED-7731 = [",
    "far too deep": lambda plan, key: "a = " + "[" * 100_000,
}


@pytest.mark.parametrize("kind", BAD_OFFERS)
def test_an_offer_that_is_not_the_coordinators_for_us_is_ignored(
    kind: str,
    plan_of,
    site: SiteConfig,
    coordinator: Coordinator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = plan_of({"description": "MARKED-7731"})
    text = BAD_OFFERS[kind](plan, coordinator.key)
    good = plan_of({"seed": 9})
    coordinator.offer(SignedPlan(good, sign(good, key=coordinator.key)))
    coordinator.offers.insert(0, Offer(plan_toml=text, state="offered"))
    with caplog.at_level(logging.DEBUG):
        assert visited(site, coordinator) == [digest(good)]
    assert "offer 0 is not a plan of this coordinator for this site" in caplog.text
    assert "MARKED" not in caplog.text
    assert [folder.name for folder in (site.state_dir / "studies").iterdir()] == [digest(good)]


def test_a_site_that_knows_many_studies_keeps_no_more(
    signed: SignedPlan,
    site: SiteConfig,
    plan_of,
    coordinator: Coordinator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(visits, "MOST_STUDIES", 1)
    coordinator.offer(signed)
    assert len(visited(site, coordinator)) == 1
    other = plan_of({"seed": 9})
    coordinator.offers += [
        Offer(plan_toml=plans.render(other, sign(other, key=coordinator.key)), state="offered")
    ]
    coordinator.offers[0] = coordinator.offers[0].model_copy(update={"state": "closed"})
    assert visited(site, coordinator) == []
    (known,) = studies.known(site, key=KEY, today=TODAY)
    assert known.word is not None
    assert known.word.state == "closed"


def test_a_visit_tells_the_newest_decision_about_each_plan(
    signed: SignedPlan, site: SiteConfig
) -> None:
    first = studies.approve(signed, site, key=KEY, who="Dr. Reed")
    assert prepared(site).decisions == (first,)
    second = studies.withdraw(signed, site, key=KEY, who="Dr. Reed")
    assert prepared(site).decisions == (second,)


def test_a_decision_about_a_study_that_expired_is_told_still(
    signed: SignedPlan, site: SiteConfig
) -> None:
    first = studies.approve(signed, site, key=KEY, who="Dr. Reed")
    visit = visits.prepare(site, KEY, health=HEALTH, today=date(2099, 1, 1))
    assert visit.decisions == (first,)


# --- checkpoints and receipts


def test_a_checkpoint_is_told_until_its_receipt_is_here_and_then_no_more(
    site: SiteConfig, coordinator: Coordinator
) -> None:
    coordinator.is_silent = True
    for _ in range(3):
        with pytest.raises(ConnectionError):
            visited(site, coordinator)
    assert kinds(site) == ["opened", "checkpoint"]
    assert len({visit.checkpoint for visit in coordinator.told}) == 1
    coordinator.is_silent = False
    for _ in range(3):
        visited(site, coordinator)
    assert [visit.checkpoint is None for visit in coordinator.told[3:]] == [False, True, True]
    assert kinds(site) == ["opened", "checkpoint"]


def test_a_journal_that_has_grown_is_told_once(site: SiteConfig, coordinator: Coordinator) -> None:
    book = journal.Book(site.state_dir, site.name, KEY)
    visited(site, coordinator)
    for _ in range(2):
        journal.append(book, journal.Event("started"))
        for _ in range(2):
            visited(site, coordinator)
    assert kinds(site) == ["opened", "checkpoint"] + 2 * ["started", "checkpoint"]
    receipts = [
        Receipted.model_validate_json(line)
        for line in (site.state_dir / RECEIPTS).read_bytes().splitlines()
    ]
    assert [one.receipt.receipt.index for one in receipts] == [0, 2, 4]
    lines = parse(book.file.read_bytes())
    assert list(receipt_faults(lines, receipts, coordinator=site.coordinator)) == []


def test_a_checkpoint_that_a_crash_lost_is_made_again(
    site: SiteConfig, coordinator: Coordinator
) -> None:
    prepared(site)
    (site.state_dir / visits.CHECKPOINT).unlink()
    visited(site, coordinator)
    visited(site, coordinator)
    assert kinds(site) == ["opened", "checkpoint", "checkpoint"]


@pytest.mark.parametrize(
    "changed", [{"checkpoint": "9" * 64}, {"index": 7}, {"site": "south"}, {"key": "a stranger's"}]
)
def test_a_receipt_that_is_not_the_coordinators_for_our_checkpoint_is_not_kept(
    changed: dict[str, Any], site: SiteConfig, coordinator: Coordinator
) -> None:
    if changed.pop("key", None):
        coordinator.key = Ed25519PrivateKey.generate()
    point = prepared(site).checkpoint
    assert point is not None
    receipt = coordinator.receipt(point, **changed)
    visits.take(site, KEY, bulletin([], receipt=receipt), today=TODAY)
    assert visits.last_receipt(site.state_dir) is None
    assert prepared(site).checkpoint == point


def test_a_receipt_told_twice_is_kept_once(site: SiteConfig, coordinator: Coordinator) -> None:
    point = prepared(site).checkpoint
    assert point is not None
    for _ in range(2):
        receipt = coordinator.receipt(point)
        visits.take(site, KEY, bulletin([], receipt=receipt), today=TODAY)
    assert len((site.state_dir / RECEIPTS).read_bytes().splitlines()) == 1


def test_a_bulletin_for_another_site_is_not_taken(site: SiteConfig) -> None:
    with pytest.raises(DocumentError, match="another site"):
        visits.take(site, KEY, bulletin([]).model_copy(update={"site": "south"}), today=TODAY)


# --- again and again


def test_visits_go_on_after_failures_and_end_when_told(
    site: SiteConfig, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    stop, seen = threading.Event(), threading.Event()

    def call(visit: Visit) -> Bulletin:
        coordinator.is_silent = len(coordinator.told) < 3
        found = coordinator(visit)
        seen.set()
        return found

    with caplog.at_level(logging.INFO):
        thread = threading.Thread(
            target=visits.keep_visiting,
            args=(site, KEY, call),
            kwargs={"agent": lambda: AGENT, "stop": stop, "every_s": 0.001},
        )
        thread.start()
        assert seen.wait(30)
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    assert visits.last_visit(site.state_dir) is not None
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["a visit to the coordinator failed: ConnectionError"]
    assert "answers visits again" in caplog.text


def test_a_visit_that_failed_leaves_the_last_one_as_it_was(
    site: SiteConfig, coordinator: Coordinator
) -> None:
    visited(site, coordinator)
    before = visits.last_visit(site.state_dir)
    coordinator.is_silent = True
    with pytest.raises(ConnectionError):
        visited(site, coordinator)
    assert visits.last_visit(site.state_dir) == before


def test_pauses_grow_with_failures_up_to_a_limit() -> None:
    for failures, expected in ((0, 20), (1, 40), (2, 80), (9, 300), (10_000, 300)):
        assert 0.9 * expected <= visits.pause_s(failures) <= 1.1 * expected

"""A small real hospital: what it answers, what it refuses, and what nobody ever hears from it."""

from __future__ import annotations

import base64
import csv
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import config as configs
from client import ledger, outbox, peers, studies, train
from client.answer import NO_STUDY, Site, answer, introduce, open_site, rehearse
from client.config import LimitSettings
from client.masks import label_of
from client.work import Bench, Cohort, Job, Outcome, Ready, device_of
from shared_models import masking, nets
from shared_models import plan as plans
from shared_models.contracts import (
    Countersignature,
    Evaluation,
    Refusal,
    RoundOrder,
    SiteReply,
)
from shared_models.errors import ConsiliaError, DocumentError, MachineError
from shared_models.journal import parse
from shared_models.masking import GRID, LARGEST, masked, public_mask_key
from shared_models.nets.base import weights_of
from shared_models.plan import SignedPlan, StudyPlan, event_of
from shared_models.privacy import epsilon, spent
from shared_models.signing import digest, public_key, sign
from shared_models.weights import Array, flatten
from shared_models.weights import digest as digest_of
from shared_models.wire import Letter, seal, unseal

NOW = datetime.now(UTC)


class House(NamedTuple):
    """A site that approved ``plan``, and what is needed to send it orders."""

    site: Site
    plan: StudyPlan
    weights: Array
    coordinator: Ed25519PrivateKey

    def order(self, kind: str = "train", round_: int = 0, **changed: Any) -> RoundOrder:
        fields = {
            "study": digest(self.plan),
            "round_": round_,
            "kind": kind,
            "site": "north",
            "weights_digest": digest_of(self.weights),
            "issued_at": NOW,
            "expires_at": NOW + timedelta(hours=1),
        }
        return RoundOrder.model_validate(fields | changed)

    def letter(self, kind: str = "train", round_: int = 0, **changed: Any) -> Letter:
        order = self.order(kind, round_, **changed)
        return seal(order, key=self.coordinator, vector=self.weights)

    def ask(self, kind: str = "train", round_: int = 0, **changed: Any) -> SiteReply | Refusal:
        return self.hear(self.letter(kind, round_, **changed))[0]

    def hear(self, letter: Letter) -> tuple[Any, Array | None]:
        """Return what the site says to ``letter``, its signature checked."""
        return unseal(answer(letter, self.site), key=public_key(self.site.key))

    def charged(self) -> list[tuple[int, str, int]]:
        entries = ledger.read(self.site.config.state_dir).reservations
        return [(entry.round_, entry.event.purpose, entry.event.steps) for entry in entries]


Houses = Callable[..., House]


@pytest.fixture
def house_of(hospital, plan_of, coordinator_key: Ed25519PrivateKey) -> Houses:
    """Return a hospital with changes in its approved plan and in its own policy."""

    def make(
        plan: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
        *,
        is_approved: bool = True,
        **settings: Any,
    ) -> House:
        agreed: StudyPlan = plan_of(plan or {})
        config = configs.read(hospital.config_file)
        changed = {"policy": config.policy.model_copy(update=policy or {})} | settings
        site = Site(config.model_copy(update=changed), key=hospital.key)
        if is_approved:
            signed = SignedPlan(agreed, sign(agreed, key=coordinator_key))
            studies.approve(signed, site.config, key=hospital.key, who="Dr. Reed")
        net = nets.make(agreed.net.name, agreed.net.params, seed=1, num_outputs=2)
        return House(site, agreed, flatten(weights_of(net)), coordinator_key)

    return make


@pytest.fixture
def house(house_of: Houses) -> House:
    return house_of()


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list that grows by what training was given each time it begins."""
    begun: list[dict[str, Any]] = []
    real = train.train

    def spied(net: Any, patients: Any, **given_: Any) -> Any:
        begun.append(given_ | {"patients": patients})
        return real(net, patients, **given_)

    monkeypatch.setattr(train, "train", spied)
    return begun


def rewrite(manifest: Path, change: Callable[[dict[str, str]], dict[str, str] | None]) -> None:
    """Write the manifest again, each line changed or left out."""
    with manifest.open(newline="", encoding="utf-8") as handle:
        rows = [changed for row in csv.DictReader(handle) if (changed := change(row)) is not None]
    with manifest.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_by(house: House) -> Ready:
    """Return what the site read of its patients."""
    assert isinstance(house.site.trainer, Bench)
    return house.site.trainer.studies[digest(house.plan)]


# --- orders that are answered


def test_an_order_to_train_is_answered_with_an_update_of_the_plans_net(house: House) -> None:
    reply, update = house.hear(house.letter(round_=1))
    assert isinstance(reply, SiteReply)
    assert (reply.study, reply.round_, reply.kind) == (digest(house.plan), 1, "train")
    assert (reply.site, reply.num_patients) == ("north", 12)
    assert update is not None
    assert update.shape == house.weights.shape
    assert reply.update_digest == digest_of(update)
    assert np.abs(update).max() > 0
    assert reply.evaluation is not None
    assert set(reply.evaluation.metrics) == {"auc", "accuracy", "sensitivity", "specificity"}
    assert (reply.evaluation.num_patients, reply.evaluation.num_images) == (6, 12)


def test_an_order_to_evaluate_is_answered_with_metrics_and_intervals_only(
    house: House, trainings: list[Any]
) -> None:
    reply, update = house.hear(house.letter("evaluate"))
    assert isinstance(reply, SiteReply)
    assert update is None
    assert reply.update_digest is reply.privacy is reply.train_loss is None
    assert reply.evaluation is not None
    assert set(reply.evaluation.intervals) == set(reply.evaluation.metrics)
    assert trainings == []
    assert house.charged() == []


def test_an_order_to_train_alone_keeps_the_model_and_answers_its_metrics(house: House) -> None:
    reply, update = house.hear(house.letter("alone", 3))
    assert isinstance(reply, SiteReply)
    assert update is None
    assert reply.update_digest is None
    assert reply.evaluation is not None
    assert house.charged() == [(3, "alone", 6)]


def test_training_alone_answers_the_metrics_of_the_model_it_trained(house_of: Houses) -> None:
    """Without privacy, so that what the training gives does not depend on chance."""
    changes = {"privacy": None, "training.learning_rate": 0.5}, {"allow_without_privacy": True}
    house = house_of(*changes)
    alone, first = house.ask("alone", 3), house.ask("evaluate", 3)
    assert isinstance(alone, SiteReply)
    assert isinstance(first, SiteReply)
    assert alone.evaluation is not None
    assert alone.evaluation != first.evaluation


@pytest.mark.parametrize(("kind", "rounds"), [("train", [0]), ("alone", [0, 1, 2])])
def test_only_training_patients_are_trained_on(
    kind: str, rounds: list[int], house: House, trainings: list[Any]
) -> None:
    house.ask(kind)
    (given_,) = trainings
    assert len(given_["patients"]) == 12
    assert list(given_["rounds"]) == rounds


def test_the_same_order_gives_the_same_update_without_privacy(
    house_of: Houses, tmp_path: Path
) -> None:
    updates = []
    for name in ("first", "second"):
        changes = {"privacy": None}, {"allow_without_privacy": True}
        house = house_of(*changes, state_dir=tmp_path / name)
        reply, update = house.hear(house.letter(round_=1))
        assert isinstance(reply, SiteReply)
        assert reply.train_loss is not None
        assert reply.privacy is None
        updates.append(update)
    assert np.array_equal(*updates)
    assert house.charged() == []


def test_an_update_is_what_training_added_to_the_weights_sent(house_of: Houses) -> None:
    house = house_of({"privacy": None}, {"allow_without_privacy": True})
    _, update = house.hear(house.letter(round_=1))
    study, plan = read_by(house), house.plan
    net = nets.make(plan.net.name, plan.net.params, seed=1, num_outputs=2)
    train.train(
        net,
        study.patients["train"],
        plan=plan,
        task=study.task,
        rounds=[1],
        randomness=train.randomness_of(plan, site="north", round_=1, purpose="train"),
        performance=train.Performance(),
    )
    assert np.array_equal(update, flatten(weights_of(net)) - house.weights)


def test_training_again_gives_another_update_with_privacy(house: House) -> None:
    updates = []
    for _ in range(2):
        updates.append(house.hear(house.letter())[1])
        kept(house).unlink()
    assert not np.array_equal(*updates)


@pytest.mark.parametrize("kind", ["train", "alone"])
def test_private_training_never_reports_its_loss(
    kind: str, house: House, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.train
    loss = 0.77317731
    monkeypatch.setattr(train, "train", lambda *a, **k: real(*a, **k)._replace(loss=loss))
    with caplog.at_level(logging.DEBUG):
        letter = answer(house.letter(kind), house.site)
    reply, _ = unseal(letter, key=public_key(house.site.key))
    assert isinstance(reply, SiteReply)
    assert reply.train_loss is None
    assert "0.773" not in letter.document + caplog.text


def test_every_reply_states_what_the_study_has_cost_so_far(house: House) -> None:
    for round_ in range(2):
        reply = house.ask("train", round_)
        assert isinstance(reply, SiteReply)
        assert reply.privacy is not None
        events = [event_of(house.plan, steps=2)] * (round_ + 1)
        assert reply.privacy.epsilon == epsilon(events, delta=0.01)
        assert reply.privacy.steps == 2 * (round_ + 1)
    assert house.charged() == [(0, "train", 2), (1, "train", 2)]


def test_the_whole_planned_study_fits_into_the_epsilon_it_states(house_of: Houses) -> None:
    cost = epsilon([event_of(house_of().plan, steps=12)], delta=0.01)
    house = house_of({"privacy.epsilon": cost})
    said = [house.ask("train", round_) for round_ in range(3)]
    said += [house.ask("evaluate", 3), house.ask("alone", 3)]
    assert all(isinstance(reply, SiteReply) for reply in said)
    entries = ledger.read(house.site.config.state_dir).reservations
    assert spent(entries, delta=0.01).epsilon == cost
    assert refused(house._replace(weights=house.weights * 2).ask("train", 2)) == "budget"
    assert house.ask("train", 2) == said[2]  # which costs nothing


# --- the ledger comes first


@pytest.mark.parametrize(("kind", "steps"), [("train", 2), ("alone", 6)])
def test_nothing_is_trained_before_its_cost_is_on_disk(
    kind: str, steps: int, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = []
    real = train.train

    def spied(*args: Any, **given_: Any) -> Any:
        on_disk.append(house.charged())
        return real(*args, **given_)

    monkeypatch.setattr(train, "train", spied)
    assert isinstance(house.ask(kind), SiteReply)
    assert on_disk[0] == [(0, kind, steps)]


def test_training_that_fails_stays_charged(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "train", failing)
    assert refused(house.ask()) == "failed"
    assert house.charged() == [(0, "train", 2)]


def test_performance_settings_do_not_change_what_is_charged(house_of: Houses) -> None:
    charged = []
    for most_images in (1, 32):
        config = house_of().site.config
        faster = config.performance.model_copy(update={"most_images": most_images})
        house = house_of(performance=faster, state_dir=config.state_dir / str(most_images))
        assert isinstance(house.ask(), SiteReply)
        charged.append([e.event for e in ledger.read(house.site.config.state_dir).reservations])
    assert charged[0] == charged[1] != []


@pytest.mark.parametrize("kind", ["train", "alone"])
@pytest.mark.parametrize("limit", ["per study", "lifetime"])
def test_an_exhausted_budget_is_refused_and_nothing_is_trained(
    limit: str, kind: str, house_of: Houses, trainings: list[Any]
) -> None:
    house = house_of(
        {"privacy.epsilon": 3.0}, {"max_epsilon_lifetime": 0.5 if limit == "lifetime" else 100.0}
    )
    if limit == "per study":
        event = event_of(house.plan, steps=100)
        other = ledger.Budget(per_study=100.0, lifetime=100.0, delta=0.01)
        ledger.reserve(
            house.site.config.state_dir,
            study=digest(house.plan),
            round_=0,
            event=event,
            budget=other,
        )
    before = house.charged()
    assert refused(house.ask(kind)) == "budget"
    assert trainings == []
    assert house.charged() == before
    assert isinstance(house.ask("evaluate"), SiteReply)


def test_a_broken_ledger_trains_nothing(house: House, trainings: list[Any]) -> None:
    assert isinstance(house.ask(), SiteReply)
    assert len(trainings) == 1
    file = house.site.config.state_dir / ledger.FILE
    file.write_bytes(file.read_bytes().replace(b"poisson", b"shuffle"))
    for round_ in (0, 1):
        assert refused(house.ask("train", round_)) == "budget"
    assert len(trainings) == 1


def test_what_a_crash_left_of_a_line_stops_nothing(house: House) -> None:
    assert isinstance(house.ask(), SiteReply)
    with (house.site.config.state_dir / ledger.FILE).open("ab") as handle:
        handle.write(b'{"kind":"reserv')
    assert isinstance(house.ask("train", 0), SiteReply)
    assert isinstance(house.ask("train", 1), SiteReply)
    assert house.charged() == [(0, "train", 2), (1, "train", 2)]


def test_the_ledger_outlives_the_agent(house_of: Houses) -> None:
    cost = epsilon([event_of(house_of().plan, steps=12)], delta=0.01)
    for round_ in range(3):
        assert isinstance(house_of({"privacy.epsilon": cost}).ask("train", round_), SiteReply)
    assert len(house_of({"privacy.epsilon": cost}).charged()) == 3


def ends(job: Job, weights: Array | None) -> Any:
    raise MachineError("the worker was ended: it took longer than its limit")


@pytest.mark.parametrize("kind", ["train", "alone"])
def test_training_that_was_ended_stays_charged_and_the_next_order_is_answered(
    kind: str, house: House, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    house.site.trainer = lambda job, weights: (ends if job.step == kind else bench)(job, weights)
    assert refused(house.ask(kind)) == "failed"
    assert len(house.charged()) == 1
    assert "it took longer than its limit" in caplog.text
    entries = parse((house.site.config.state_dir / "journal.jsonl").read_bytes())
    assert [line.entry.kind for line in entries][-3:] == ["order", "reservation", "refusal"]
    house.site.trainer = bench
    assert isinstance(house.ask(kind), SiteReply)
    assert len(house.charged()) == 2


def test_a_worker_that_ends_before_training_costs_nothing(house: House) -> None:
    bench = Bench()
    for step in ("judge", "prepare"):
        house.site.trainer = lambda job, weights, at=step: (ends if job.step == at else bench)(
            job, weights
        )
        assert refused(house.ask()) == "failed"
    assert house.charged() == []


def changed_outcome(step: str, **changed: Any) -> Callable[..., Any]:
    """Return a trainer that does the work and then changes what came of a step."""
    bench = Bench()

    def do(job: Job, weights: Array | None) -> tuple[Outcome, Array | None]:
        outcome, update = bench(job, weights)
        if job.step == step:
            update = changed.get("update", update)
            fields = {name: value for name, value in changed.items() if name != "update"}
            return outcome.model_copy(update=fields), update
        return outcome, update

    return do


SMUGGLED = "7731" * 12
NUMBERS = {"num_patients": 12, "num_test_patients": 6, "num_test_images": 12, "is_mixed": False}
HOSTILE = {
    "other patients": {"cohort": Cohort.model_validate(NUMBERS | {"num_patients": 7731})},
    "other test images": {"cohort": Cohort.model_validate(NUMBERS | {"num_test_images": 7731})},
    "no patients": {"cohort": None},
    "a loss": {"loss": 0.7731},
    "no update": {"update": None},
    "another update": {"update": np.zeros(7, np.float32)},
    "an update not finite": {"update": np.float32("nan")},
    "doubles": {"update": np.float64(0)},
    "a metric that is large": {"evaluation": {"auc": 7731e300}},
    "a count that is large": {"evaluation": {}, "num_images": int(SMUGGLED)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_training_answers_nothing_hostile_leaves(name: str, house: House) -> None:
    changes = dict(HOSTILE[name])
    update = changes.get("update")
    if isinstance(update, np.generic):
        changes["update"] = np.full(house.weights.shape, update)
    if "evaluation" in changes:
        changes["evaluation"] = Evaluation(
            metrics=changes["evaluation"],
            num_patients=6,
            num_images=changes.pop("num_images", 12),
        )
    house.site.trainer = changed_outcome("train", **changes)
    letter = answer(house.letter(), house.site)
    assert letter.kind == "refusal"
    assert letter.buckets == ()
    assert "7731" not in letter.document
    assert house.charged() == [(0, "train", 2)]


def test_metrics_that_spell_something_leave_rounded_and_by_the_sites_names_only(
    house: House,
) -> None:
    pixels = 0.5 + int.from_bytes(b"MARK") * 2.0**-52
    found = Evaluation(metrics={"auc": pixels, "marked_7731": 0.5}, num_patients=6, num_images=12)
    house.site.trainer = changed_outcome("evaluate", evaluation=found)
    reply = house.ask("evaluate")
    assert isinstance(reply, SiteReply)
    assert reply.evaluation is not None
    assert reply.evaluation.metrics == {"auc": 0.5}


def test_the_one_who_trains_is_told_of_the_site_only_where_its_images_are(house: House) -> None:
    jobs: list[str] = []
    bench = Bench()
    house.site.trainer = lambda job, weights: (
        jobs.append(job.model_dump_json()) or bench(job, weights)
    )
    assert isinstance(house.ask(), SiteReply)
    config = house.site.config
    assert len(jobs) == 3
    assert all(str(config.data.root) in job for job in jobs)
    for secret in (config.signing_key, config.link.node_key, config.state_dir):
        assert not any(str(secret) in job for job in jobs)


@pytest.mark.parametrize(("kind", "rounds"), [("train", 1), ("alone", 3), ("evaluate", 1)])
def test_work_takes_no_longer_than_the_site_allows_nor_than_the_order_lasts(
    kind: str, rounds: int, house_of: Houses
) -> None:
    for minutes, left, most in ((0.5, 3600, 30.0 * rounds), (600.0, 90, 90.0)):
        house = house_of(limits=LimitSettings(max_minutes_per_round=minutes))
        jobs: list[Job] = []
        bench = Bench()
        house.site.trainer = lambda job, weights, jobs=jobs, bench=bench: (
            jobs.append(job) or bench(job, weights)
        )
        expires = datetime.now(UTC) + timedelta(seconds=left)
        assert isinstance(house.ask(kind, 2 if minutes > 1 else 1, expires_at=expires), SiteReply)
        assert most - 60 < jobs[-1].limit_s <= most


# --- an order given again


def kept(house: House, kind: str = "train") -> Path:
    """Return the file of the last reply to an order of ``kind``."""
    return house.site.config.state_dir / "outbox" / f"{digest(house.plan)}.{kind}"


def attempts(house: House) -> list[int]:
    return [e.attempt for e in ledger.read(house.site.config.state_dir).reservations]


@pytest.mark.parametrize("is_private", [True, False])
@pytest.mark.parametrize("kind", ["train", "alone"])
def test_an_order_given_again_is_answered_with_the_same_bytes_for_nothing(
    kind: str, is_private: bool, house_of: Houses, trainings: list[Any]
) -> None:
    changes = {} if is_private else {"privacy": None}, {"allow_without_privacy": not is_private}
    house = house_of(*changes)
    first = answer(house.letter(kind, 1), house.site)
    assert first.kind == "reply"
    num_trainings, charged = len(trainings), house.charged()
    later = {"issued_at": NOW + timedelta(minutes=1), "expires_at": NOW + timedelta(hours=3)}
    for site in (house.site, house_of(*changes).site):  # the same agent, and one started anew
        assert answer(house.letter(kind, 1, **later), site) == first
        assert site.last_round == {(digest(house.plan), kind): 1}
    assert len(trainings) == num_trainings
    assert house.charged() == charged


def test_the_commit_names_the_reply_that_left(house: House) -> None:
    replies = [house.ask(), house.ask("alone", 3)]
    commits = ledger.read(house.site.config.state_dir).commits
    assert [c.reply for c in commits] == [digest(reply) for reply in replies]
    assert [(c.round_, c.purpose, c.attempt) for c in commits] == [(0, "train", 0), (3, "alone", 0)]


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


def lose_the_commit(file: Path) -> None:
    lines = (file.parents[1] / ledger.FILE).read_bytes().splitlines(keepends=True)
    (file.parents[1] / ledger.FILE).write_bytes(lines[0])


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, flip_a_bit, lose_the_commit])
def test_an_order_given_again_is_charged_again_if_its_reply_was_lost(
    damage: Callable[[Path], None], house: House, trainings: list[Any]
) -> None:
    first = answer(house.letter(), house.site)
    damage(kept(house))
    again = answer(house.letter(), house.site)
    assert again.kind == "reply"
    assert again.buckets != first.buckets
    assert len(trainings) == 2
    assert attempts(house) == [0, 1]
    assert answer(house.letter(), house.site) == again  # the newest is kept


def test_an_order_with_other_weights_is_charged_again(house: House) -> None:
    first = answer(house.letter(), house.site)
    other = house._replace(weights=house.weights * 2)
    assert answer(other.letter(), house.site).document != first.document
    assert attempts(house) == [0, 1]


def test_an_order_given_again_under_other_rules_is_charged_again(house_of: Houses) -> None:
    house = house_of()
    assert isinstance(house.ask(), SiteReply)
    stricter = house_of({}, {"metrics": ("auc",)})
    said = stricter.ask()
    assert isinstance(said, SiteReply)
    assert said.evaluation is not None
    assert set(said.evaluation.metrics) == {"auc"}
    assert attempts(house) == [0, 1]


def test_an_order_given_again_is_checked_like_any_other(house_of: Houses) -> None:
    house = house_of()
    assert isinstance(house.ask("train", 1), SiteReply)
    assert refused(house.ask("train", 1, expires_at=NOW - timedelta(seconds=1))) == "expired"
    letter = house.letter("train", 1)
    assert refused(house.hear(letter._replace(signature="00" * 64))[0]) == "bad-signature"
    strict = house_of({}, {"max_epsilon_per_study": 1.0}, is_approved=False)
    assert refused(strict.ask("train", 1)) == "policy"
    approval = house.site.config.state_dir / "studies" / digest(house.plan) / "approval.json"
    approval.unlink()
    assert refused(house.ask("train", 1)) == "not-approved"
    assert attempts(house) == [0]


def test_a_metric_is_computed_again_and_not_kept(house: House) -> None:
    assert isinstance(house.ask("evaluate"), SiteReply)
    assert not kept(house, "evaluate").exists()


@pytest.mark.parametrize("step", ["keep", "commit"])
def test_a_reply_that_cannot_be_kept_and_committed_does_not_leave(
    step: str, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(*((outbox, "keep") if step == "keep" else (ledger, "commit")), full)
    letter = answer(house.letter(), house.site)
    assert letter.kind == "refusal"
    assert letter.buckets == ()
    assert attempts(house) == [0]
    monkeypatch.undo()
    assert isinstance(house.ask(), SiteReply)
    assert attempts(house) == [0, 1]


# --- secure aggregation

SECURE = {
    "sites": ["north", "south", "west"],
    "rounds.secure_aggregation": True,
    "rounds.quorum": 2,
    "training.steps_per_round": 1,
}
PEERS = {n: Ed25519PrivateKey.from_private_bytes(n.ljust(32).encode()) for n in ("south", "west")}
MASKS = {n: X25519PrivateKey.from_private_bytes(n.ljust(32).encode()) for n in ("south", "west")}


class Secure(NamedTuple):
    """A site under a secure plan, and the countersignatures of all that take part."""

    house: House
    participants: tuple[Countersignature, ...]

    def order(self, round_: int = 0, **changed: Any) -> RoundOrder:
        return self.house.order("train", round_, participants=self.participants, **changed)

    def letter(self, round_: int = 0, **changed: Any) -> Letter:
        order = self.order(round_, **changed)
        return seal(order, key=self.house.coordinator, vector=self.house.weights)

    def answer(self, round_: int = 0, **changed: Any) -> Letter:
        return answer(self.letter(round_, **changed), self.house.site)

    def ask(self, round_: int = 0, **changed: Any) -> tuple[Any, Array | None]:
        return self.house.hear(self.letter(round_, **changed))

    def masks_of_the_others(self, size: int, **changed: Any) -> Any:
        """Return what the other two would send if their updates were all zeros."""
        keys = {c.approval.site: str(c.approval.mask_key) for c in self.participants}
        total = np.zeros(size, np.uint64)
        for name, own in MASKS.items():
            total += masked(
                np.zeros(size),
                own=own,
                peers=[key for other, key in keys.items() if other != name],
                label=label_of(self.order(**changed)),
            )
        return total


@pytest.fixture
def secure_of(house_of: Houses, countersign, tmp_path: Path) -> Callable[..., Secure]:
    """Return what makes a site that trusts two others, with changes in its plan."""

    def make(plan: dict[str, Any] | None = None, policy: dict[str, Any] | None = None) -> Secure:
        known = tmp_path / "peers.toml"
        for name, key in PEERS.items():
            peers.trust(known, name=name, key=public_key(key))
        house = house_of(SECURE | (plan or {}), {"peers": known} | (policy or {}))
        folder = house.site.config.state_dir / "studies" / digest(house.plan)
        own = Countersignature.model_validate_json((folder / "approval.json").read_bytes())
        others = [
            countersign(house.plan, n, key=key, mask_key=public_mask_key(MASKS[n]))
            for n, key in PEERS.items()
        ]
        return Secure(house, (own, *others))

    return make


def test_a_site_under_a_secure_plan_answers_with_a_masked_vector(
    secure_of: Callable[..., Secure],
) -> None:
    secure = secure_of()
    reply, vector = secure.ask()
    assert isinstance(reply, SiteReply)
    assert reply.is_masked
    assert vector is not None
    assert (vector.dtype, vector.shape) == (np.dtype("<u8"), secure.house.weights.shape)
    assert reply.update_digest == digest_of(vector)
    assert reply.privacy is not None
    assert np.abs(opened_sum(vector)).mean() > LARGEST


def test_the_masked_update_is_what_training_added_times_the_patients(
    secure_of: Callable[..., Secure],
) -> None:
    """Without privacy training can be repeated, so that what was hidden is known."""
    changes = {"privacy": None}, {"allow_without_privacy": True}
    secure = secure_of(*changes)
    reply, vector = secure.ask(1)
    assert isinstance(reply, SiteReply)
    assert vector is not None
    house, net = (
        secure.house,
        nets.make("densenet", secure.house.plan.net.params, num_outputs=2, seed=1),
    )
    study = read_by(house)
    train.train(
        net,
        study.patients["train"],
        plan=house.plan,
        task=study.task,
        rounds=[1],
        randomness=train.randomness_of(house.plan, site="north", round_=1, purpose="train"),
        performance=train.Performance(),
    )
    update = flatten(weights_of(net)) - house.weights
    found = opened_sum(vector + secure.masks_of_the_others(len(vector), round_=1))
    assert np.abs(found).max() > 0
    assert found == pytest.approx(12 * update.astype(float), abs=GRID)


def opened_sum(total: Any) -> Any:
    return masking.opened(total.astype(np.uint64))


def test_the_same_order_under_a_secure_plan_gives_the_same_bytes(
    secure_of: Callable[..., Secure], trainings: list[Any]
) -> None:
    secure = secure_of()
    first = secure.answer()
    assert first.kind == "reply"
    later = {"issued_at": NOW + timedelta(minutes=1), "expires_at": NOW + timedelta(hours=3)}
    assert secure.answer(**later) == first
    assert len(trainings) == 1
    assert attempts(secure.house) == [0]


def test_the_same_order_whose_reply_was_lost_is_refused_for_its_mask_is_used(
    secure_of: Callable[..., Secure], trainings: list[Any]
) -> None:
    secure = secure_of()
    assert secure.answer().kind == "reply"
    kept(secure.house).unlink()
    assert refused(secure.ask()[0]) == "out-of-order"
    assert len(trainings) == 1
    assert attempts(secure.house) == [0]


def test_another_attempt_is_charged_again_and_has_a_new_mask_and_new_noise(
    secure_of: Callable[..., Secure], trainings: list[Any]
) -> None:
    secure = secure_of()
    vectors = [secure.ask(attempt=attempt)[1] for attempt in range(2)]
    assert vectors[0] is not None
    assert vectors[1] is not None
    assert attempts(secure.house) == [0, 1]
    assert len(trainings) == 2
    assert np.abs(opened_sum(vectors[0] - vectors[1])).mean() > LARGEST
    size = len(secure.house.weights)
    updates = [
        opened_sum(v + secure.masks_of_the_others(size, attempt=attempt))
        for attempt, v in enumerate(vectors)
    ]
    assert all(np.abs(update).max() < 1e3 for update in updates)
    assert not np.allclose(*updates)


def test_training_that_failed_after_its_mask_was_noted_takes_another_attempt(
    secure_of: Callable[..., Secure], monkeypatch: pytest.MonkeyPatch
) -> None:
    secure = secure_of()

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", failing)
        assert refused(secure.ask()[0]) == "failed"
    assert refused(secure.ask()[0]) == "out-of-order"
    assert isinstance(secure.ask(attempt=1)[0], SiteReply)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda secure: secure._replace(participants=()), "bad-order"),
        (lambda secure: secure._replace(participants=secure.participants[1:]), "bad-order"),
        (lambda secure: secure._replace(participants=secure.participants[:1]), "bad-order"),
        (
            lambda secure: (secure.house.site.config.policy.peers.write_text(""), secure)[1],
            "policy",
        ),
    ],
    ids=["nobody", "the others only", "this site only", "nobody is trusted"],
)
def test_without_peers_to_hide_among_nothing_is_trained_or_charged(
    spoil: Callable[[Secure], Secure],
    code: str,
    secure_of: Callable[..., Secure],
    trainings: list[Any],
) -> None:
    secure = spoil(secure_of())
    assert refused(secure.ask()[0]) == code
    assert trainings == []
    assert secure.house.charged() == []


def test_peers_no_longer_trusted_end_the_updates_of_a_study_begun(
    secure_of: Callable[..., Secure],
) -> None:
    secure = secure_of()
    assert isinstance(secure.ask()[0], SiteReply)
    secure.house.site.config.policy.peers.write_text("")
    assert refused(secure.ask(1)[0]) == "peers"
    assert secure.house.charged() == [(0, "train", 1)]


def test_participants_of_a_plan_without_secure_aggregation_change_nothing(
    house: House, secure_of: Callable[..., Secure]
) -> None:
    reply = house.ask(participants=secure_of().participants)
    assert isinstance(reply, SiteReply)
    assert not reply.is_masked


# --- the noise a site adds by itself


@pytest.fixture
def deviations(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows by the deviation of each noise that is added."""
    added: list[float] = []
    real = train.add_noise

    def spied(sums: Any, **given_: Any) -> Any:
        added.append(given_["noise_multiplier"] * given_["max_grad_norm"])
        return real(sums, **given_)

    monkeypatch.setattr(train, "add_noise", spied)
    return added


@pytest.mark.parametrize("noise_shares", [1, 2, 3])
def test_a_round_of_training_adds_this_sites_share_of_the_noise_and_training_alone_all_of_it(
    noise_shares: int, secure_of: Callable[..., Secure], deviations: list[float]
) -> None:
    secure = secure_of(
        {"privacy.noise_shares": noise_shares, "privacy.max_grad_norm": 0.5, "rounds.quorum": 3}
    )
    reply, _ = secure.ask()
    assert isinstance(reply, SiteReply)
    assert deviations == [pytest.approx(2.0 * 0.5 / noise_shares**0.5, rel=1e-12)]
    assert noise_shares * (deviations[0] / 0.5) ** 2 >= 4.0 * (1 - 1e-15)
    assert reply.privacy is not None
    assert reply.privacy.noise_shares == noise_shares
    assert (reply.privacy.epsilon_unmasked is None) == (noise_shares == 1)
    deviations.clear()
    assert isinstance(secure.house.ask("alone", 3), SiteReply)
    assert deviations == [2.0 * 0.5] * 3
    events = [e.event for e in ledger.read(secure.house.site.config.state_dir).reservations]
    assert [(e.purpose, e.noise_shares) for e in events] == [("train", noise_shares), ("alone", 1)]


# --- the start a plan states


@pytest.mark.parametrize("kind", ["train", "alone"])
def test_weights_other_than_the_start_the_plan_states_are_refused(
    kind: str, house_of: Houses
) -> None:
    start = digest_of(house_of().weights)
    house = house_of({"start": start})
    other = house._replace(weights=house.weights * 2)
    assert code_of(house, other.letter(kind)) == "bad-order"
    assert isinstance(house.ask(kind), SiteReply)


def test_later_rounds_and_evaluations_begin_with_other_weights_than_the_start(
    house_of: Houses,
) -> None:
    house = house_of({"start": "ab" * 32})
    assert isinstance(house.ask("train", 1), SiteReply)
    assert isinstance(house.ask("evaluate", 3), SiteReply)


# --- orders that are refused


def refused(said: SiteReply | Refusal) -> str:
    assert isinstance(said, Refusal), said
    return said.code


def code_of(house: House, letter: Letter) -> str:
    """Return the code the site refuses ``letter`` with; nothing is trained or charged."""
    found = answer(letter, house.site)
    said, vector = unseal(found, key=public_key(house.site.key))
    assert vector is None
    assert isinstance(said, Refusal)
    assert said.site == "north"
    assert house.charged() == []
    return said.code


def test_an_order_nobody_signed_is_refused(house: House) -> None:
    assert code_of(house, house.letter()._replace(key="", signature="")) == "bad-signature"


def test_an_order_signed_by_anybody_else_is_refused(house: House) -> None:
    stranger = Ed25519PrivateKey.generate()
    letter = seal(house.order(), key=stranger, vector=house.weights)
    assert code_of(house, letter) == "bad-signature"
    disguised = letter._replace(key=public_key(house.coordinator))
    assert code_of(house, disguised) == "bad-signature"


def test_the_sites_own_key_gives_no_orders(house: House) -> None:
    letter = seal(house.order(), key=house.site.key, vector=house.weights)
    assert code_of(house, letter) == "bad-signature"


def test_the_plans_coordinator_gives_no_orders_unless_it_is_the_sites(house_of: Houses) -> None:
    house = house_of(coordinator="ab" * 32)
    assert code_of(house, house.letter()) == "bad-signature"


@pytest.mark.parametrize("field", ["round_", "kind", "site", "expires_at"])
def test_an_order_changed_on_its_way_is_refused(field: str, house: House) -> None:
    other = {
        "round_": 1,
        "kind": "alone",
        "site": "south",
        "expires_at": NOW + timedelta(hours=2),
    }
    document = seal(house.order(**{field: other[field]}), key=house.coordinator).document
    assert code_of(house, house.letter()._replace(document=document)) == "bad-signature"


@pytest.mark.parametrize("document", ["", "{}", "\x00", '{"study": "' + "5a" * 32 + '"}'])
def test_an_order_that_cannot_be_read_is_refused(document: str, house: House) -> None:
    assert code_of(house, house.letter()._replace(document=document)) == "bad-signature"


def test_another_sites_order_is_refused(house: House) -> None:
    assert code_of(house, house.letter(site="south")) == "bad-order"


@pytest.mark.parametrize("kind", ["reply", "refusal", "order "])
def test_a_letter_that_is_no_order_is_refused(kind: str, house: House) -> None:
    assert code_of(house, house.letter()._replace(kind=kind)) == "bad-signature"


def test_a_signed_letter_that_is_no_order_is_refused(house: House) -> None:
    said = answer(house.letter(site="south"), house.site)  # the site's own refusal, sent back
    theirs = Refusal.model_validate_json(said.document)
    letter = seal(theirs, key=house.coordinator, vector=house.weights)
    assert code_of(house, letter) == "bad-order"


def test_weights_other_than_the_orders_are_refused(house: House) -> None:
    letter = house.letter()
    raw = bytearray(letter.buckets[0])
    raw[5] ^= 1
    assert code_of(house, letter._replace(buckets=(bytes(raw),))) == "bad-order"
    assert (
        code_of(house, letter._replace(buckets=(*letter.buckets, *letter.buckets))) == "bad-order"
    )
    assert code_of(house, letter._replace(buckets=())) == "bad-order"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_before_anything_is_charged(
    value: float, house: House
) -> None:
    weights = house.weights.copy()
    weights[7] = value
    assert code_of(house, house._replace(weights=weights).letter()) == "bad-order"


def test_weights_of_another_net_are_refused(house: House) -> None:
    for weights in (house.weights[:-1], np.append(house.weights, np.float32(0))):
        other = house._replace(weights=weights)
        assert code_of(house, other.letter()) == "bad-order"


def test_an_order_that_came_too_late_is_refused(house: House) -> None:
    assert code_of(house, house.letter(expires_at=NOW - timedelta(seconds=1))) == "expired"


def test_a_plan_this_site_did_not_approve_is_refused(house_of: Houses) -> None:
    house = house_of(is_approved=False)
    assert code_of(house, house.letter()) == "not-approved"


def test_an_expired_plan_is_refused(house_of: Houses) -> None:
    house = house_of({"expires": NOW.date() - timedelta(days=2)})
    assert code_of(house, house.letter()) == "expired"


def test_a_plan_the_sites_rules_no_longer_allow_is_refused(house_of: Houses) -> None:
    house = house_of(policy={"max_epsilon_per_study": 1.0})
    assert code_of(house, house.letter()) == "policy"


@pytest.mark.parametrize("kind", ["train", "evaluate", "alone"])
def test_an_earlier_round_than_the_last_answered_is_refused(kind: str, house: House) -> None:
    assert isinstance(house.ask(kind, 1), SiteReply)
    charged = house.charged()
    assert refused(house.ask(kind, 0)) == "out-of-order"
    assert house.charged() == charged


@pytest.mark.parametrize("is_private", [True, False])
@pytest.mark.parametrize("kind", ["train", "evaluate", "alone"])
def test_an_earlier_round_is_refused_by_an_agent_started_anew_as_well(
    kind: str, is_private: bool, house_of: Houses, trainings: list[Any]
) -> None:
    changes = {} if is_private else {"privacy": None}, {"allow_without_privacy": not is_private}
    house = house_of(*changes)
    assert isinstance(house.ask(kind, 2), SiteReply)
    charged, num_trainings = house.charged(), len(trainings)
    anew = Site(house.site.config, key=house.site.key)
    assert refused(house._replace(site=anew).ask(kind, 1)) == "out-of-order"
    assert anew.last_round[digest(house.plan), kind] == 2
    assert (house.charged(), len(trainings)) == (charged, num_trainings)
    assert isinstance(house._replace(site=anew).ask(kind, 2), SiteReply)


def test_a_refused_round_is_not_taken_for_one_that_was_answered(house: House) -> None:
    assert isinstance(house.ask("train", 0), SiteReply)
    assert refused(house.ask("train", 99)) == "out-of-order"
    anew = house._replace(site=Site(house.site.config, key=house.site.key))
    assert isinstance(anew.ask("train", 1), SiteReply)


@pytest.mark.parametrize(("ahead", "is_refused"), [(timedelta(minutes=4), False), (None, True)])
def test_an_order_dated_ahead_of_the_clock_is_refused(
    ahead: timedelta | None, is_refused: bool, house: House
) -> None:
    when = datetime.now(UTC) + (ahead or timedelta(minutes=6))
    letter = house.letter(issued_at=when, expires_at=when + timedelta(hours=1))
    if is_refused:
        assert code_of(house, letter) == "bad-order"
    else:
        assert answer(letter, house.site).kind == "reply"


def test_a_plan_changed_where_it_is_kept_is_no_longer_approved(
    house: House, plan_of, coordinator_key: Ed25519PrivateKey
) -> None:
    folder = house.site.config.state_dir / "studies" / digest(house.plan)
    file, other = folder / "plan.toml", plan_of({"training.num_rounds": 2})
    signed = file.read_text()
    forged = [
        plans.render(other, sign(other, key=coordinator_key)),  # its own signature holds
        plans.render(other, sign(house.plan, key=coordinator_key)),
        plans.render(house.plan, sign(house.plan, key=house.site.key)),
        plans.render(house.plan, sign(house.plan, key=Ed25519PrivateKey.generate())),
        signed.partition("[signature]")[0],
        signed.replace("num_rounds = 3", "num_rounds = 2"),
        "",
    ]
    for text in forged:
        assert text != signed
        file.write_text(text)
        assert code_of(house, house.letter()) == "not-approved"
    file.write_text(signed)
    assert isinstance(house.ask(), SiteReply)


def test_an_approval_of_another_plan_approves_nothing(house_of: Houses) -> None:
    house, other = house_of(), house_of({"training.num_rounds": 2})
    folder = house.site.config.state_dir / "studies"
    approval = (folder / digest(other.plan) / "approval.json").read_bytes()
    (folder / digest(house.plan) / "approval.json").write_bytes(approval)
    assert code_of(house, house.letter()) == "not-approved"


@pytest.mark.parametrize(("kind", "last"), [("train", 2), ("evaluate", 3), ("alone", 3)])
def test_more_rounds_than_planned_are_refused(kind: str, last: int, house: House) -> None:
    assert code_of(house, house.letter(kind, last + 1)) == "out-of-order"
    assert isinstance(house.ask(kind, last), SiteReply)


def test_training_alone_is_refused_where_the_plan_does_not_compare_with_it(
    house_of: Houses,
) -> None:
    house = house_of({"compare_alone": False})
    assert code_of(house, house.letter("alone", 3)) == "bad-order"


@pytest.mark.parametrize("whose", ["plan", "policy"])
def test_too_few_patients_are_refused(whose: str, house_of: Houses) -> None:
    house = (
        house_of({"min_patients": 13}) if whose == "plan" else house_of({}, {"min_patients": 13})
    )
    for kind in ("train", "evaluate", "alone"):
        assert code_of(house, house.letter(kind)) == "too-few-patients"


@pytest.mark.parametrize(("share", "is_obeyed"), [(1.0, False), (0.999, True)])
def test_delta_must_be_below_one_over_the_patients(
    share: float, is_obeyed: bool, house_of: Houses
) -> None:
    house = house_of({"privacy.delta": share / 12}, {"max_delta": 0.5})
    if is_obeyed:
        assert isinstance(house.ask(), SiteReply)
    else:
        assert code_of(house, house.letter()) == "policy"


def test_a_net_in_which_patients_meet_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.probe.mixes_images", lambda net, images: len(images) == 2)
    assert code_of(house, house.letter()) == "policy"


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"min_patients": 13}, "expected at least 13 patients to train on, got 12; list more"),
        ({"privacy.delta": 0.09}, "got 0.09; ask for a plan with a smaller one"),
    ],
)
def test_the_sites_log_tells_the_cure(
    change: dict[str, Any], cure: str, house_of: Houses, caplog: pytest.LogCaptureFixture
) -> None:
    house = house_of(change, {"max_delta": 0.5})
    code_of(house, house.letter())
    assert cure in caplog.text


def test_a_broken_image_is_refused(hospital, house: House, mark: str) -> None:
    file = hospital.images / f"{mark}-3-0.png"
    file.write_bytes(file.read_bytes()[:120])
    assert code_of(house, house.letter()) == "data"


@pytest.mark.parametrize(
    "column", ["image", "patient", "label", "split"], ids=lambda column: f"a {column}"
)
def test_a_manifest_with_a_wrong_line_is_refused(
    column: str, hospital, house: House, mark: str
) -> None:
    wrong = {"image": f"{mark}-none.png", "patient": "", "label": f"{mark}-ill", "split": mark}
    rewrite(
        hospital.manifest,
        lambda row: row | {column: wrong[column]} if "-5-" in row["image"] else row,
    )
    assert code_of(house, house.letter()) == "data"


def test_data_put_right_is_used_at_the_next_order(hospital, house: House, mark: str) -> None:
    file = hospital.images / f"{mark}-3-0.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:120])
    assert refused(house.ask()) == "data"
    file.write_bytes(whole)
    assert isinstance(house.ask(), SiteReply)


def test_a_refusal_names_the_order_it_refuses(house: House) -> None:
    said = house.ask("evaluate", 4)
    assert isinstance(said, Refusal)
    assert (said.study, said.round_, said.kind) == (digest(house.plan), 4, "evaluate")


def test_a_refusal_of_an_order_that_cannot_be_trusted_repeats_nothing_of_it(house: House) -> None:
    said, _ = house.hear(house.letter("alone", 2)._replace(signature="00" * 64))
    assert (said.study, said.round_, said.kind) == (NO_STUDY, 0, "train")


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.builds(
        Letter,
        st.sampled_from(["order", "reply", ""]) | st.text(),
        st.text(),
        st.text(),
        st.text(),
        st.lists(st.binary(max_size=20), max_size=3).map(tuple),
    )
)
def test_any_letter_is_answered_with_a_signed_refusal(house: House, letter: Letter) -> None:
    assert code_of(house, letter) in ("bad-signature", "bad-order")


# --- nothing of a patient leaves, or stays anywhere but where it was


def everything_said(house: House, letters: list[Letter], *, log_text: str) -> bytes:
    """Return all that could be read by others: letters, logs, and the site's own records."""
    said = [json.dumps(letter[:4]).encode() + b"".join(letter.buckets) for letter in letters]
    kept = [
        str(file).encode() + file.read_bytes()
        for file in house.site.config.state_dir.rglob("*")
        if file.is_file()
    ]
    assert kept
    return b"\n".join([*said, log_text.encode(), *kept])


@pytest.mark.parametrize("is_private", [True, False])
def test_no_reply_log_or_record_holds_anything_of_a_patient(
    is_private: bool,
    house_of: Houses,
    mark: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    house = house_of(
        {} if is_private else {"privacy": None}, {"allow_without_privacy": not is_private}
    )
    letters = [answer(house.letter(kind), house.site) for kind in ("train", "evaluate", "alone")]
    assert [letter.kind for letter in letters] == ["reply"] * 3
    printed = "".join(capfd.readouterr())
    assert caplog.text
    found = everything_said(house, letters, log_text=caplog.text + printed)
    assert mark.encode() not in found
    assert mark.lower().encode() not in found


SPOILED: dict[str, Callable[[Any, str], None]] = {
    "a broken image": lambda h, m: (h.images / f"{m}-3-0.png").write_bytes(
        b"\x89PNG " + m.encode()
    ),
    "a missing image": lambda h, m: (h.images / f"{m}-3-0.png").unlink(),
    "an unknown label": lambda h, m: rewrite(h.manifest, lambda row: row | {"label": f"{m}-ill"}),
    "an unknown split": lambda h, m: rewrite(h.manifest, lambda row: row | {"split": m}),
    "two splits": lambda h, m: rewrite(
        h.manifest, lambda row: row | {"split": "test"} if "-3-0" in row["image"] else row
    ),
    "one patient": lambda h, m: rewrite(
        h.manifest, lambda row: row if f"{m}-3-" in row["image"] else None
    ),
    "a column missing": lambda h, m: rewrite(
        h.manifest, lambda row: {k: v for k, v in row.items() if k != "label"}
    ),
    "no text": lambda h, m: h.manifest.write_bytes(b"image,patient,label\n\xff" + m.encode()),
    "no images": lambda h, m: h.manifest.write_text(f"image,patient,label\n{m}\n"),
    "a folder": lambda h, m: (
        (h.images / f"{m}-3-0.png").unlink(),
        (h.images / f"{m}-3-0.png").mkdir(),
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_no_refusal_log_or_record_holds_anything_of_a_patient(
    name: str,
    hospital,
    house: House,
    mark: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    SPOILED[name](hospital, mark)
    letters = [answer(house.letter(kind), house.site) for kind in ("train", "evaluate")]
    assert [letter.kind for letter in letters] == ["refusal"] * 2
    printed = "".join(capfd.readouterr())
    assert "refused" in caplog.text
    assert mark.encode() not in everything_said(house, letters, log_text=caplog.text + printed)


def test_an_exception_that_quotes_a_patient_is_told_without_its_text(
    house: House, mark: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{mark}-3-0.png does not fit")

    monkeypatch.setattr(train, "train", failing)
    letter = answer(house.letter(), house.site)
    assert "RuntimeError" in caplog.text
    assert "in _train" in caplog.text  # where it failed can be seen
    assert mark.encode() not in everything_said(house, [letter], log_text=caplog.text)


def test_a_patient_left_out_for_a_non_finite_gradient_is_told_to_the_log_only(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(house.ask("evaluate"), SiteReply)  # reads the images
    read_by(house).patients["train"][0].images[:] = np.nan
    letters = [answer(house.letter("alone"), house.site)]
    assert letters[0].kind == "reply"
    assert "not finite, left out" in caplog.text
    assert "finite" not in letters[0].document


def test_the_journal_holds_nothing_of_a_patient(house: House, mark: str) -> None:
    house.ask("evaluate")
    house.ask()
    house.ask(round_=99)
    content = (house.site.config.state_dir / "journal.jsonl").read_bytes()
    assert content.count(b'"kind":"reply"') == 2
    assert mark.encode() not in content


# --- opening a site, rehearsing


def test_an_opened_site_answers_as_its_site_toml_says(house: House, hospital) -> None:
    with open_site(hospital.config_file) as desk:
        reply, _ = unseal(desk.answer(house.letter()), key=public_key(hospital.key))
    assert isinstance(reply, SiteReply)


AGENT = """
import base64, json, sys
from pathlib import Path
from client import agent
from client.answer import open_site
from shared_models.wire import Letter
*texts, bucket = json.loads(sys.stdin.read())
with open_site(Path(sys.argv[1])) as desk:
    said = desk.answer(Letter(*texts, (base64.b64decode(bucket),)))
libraries = {name.partition(".")[0] for name in sys.modules}
print(said.kind, *sorted({"torch", "monai", "opacus", "PIL", "pydicom"} & libraries))
"""


def test_who_holds_the_keys_imports_nothing_that_reads_or_trains(house: House, hospital) -> None:
    letter = house.letter()
    told = json.dumps([*letter[:4], base64.b64encode(letter.buckets[0]).decode()])
    done = subprocess.run(
        [sys.executable, "-c", AGENT, str(hospital.config_file)],
        input=told,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["reply"], done.stderr


def test_an_opened_site_has_put_its_ledger_right(house: House, hospital) -> None:
    assert isinstance(house.ask(), SiteReply)
    file = house.site.config.state_dir / ledger.FILE
    with file.open("ab") as handle:
        handle.write(b'{"kind":"reserv')
    with open_site(hospital.config_file):
        pass
    assert len(house.charged()) == 1
    assert file.with_name(ledger.TORN).read_bytes() == b'{"kind":"reserv\n'


def test_a_site_without_its_key_cannot_be_opened(hospital) -> None:
    (hospital.folder / "keys" / "signing.pem").unlink()
    with (
        pytest.raises(DocumentError, match="cannot read the signing key"),
        open_site(hospital.config_file),
    ):
        pass


@pytest.fixture
def signed(plan_of, coordinator_key: Ed25519PrivateKey) -> SignedPlan:
    return SignedPlan(plan_of(), sign(plan_of(), key=coordinator_key))


def test_a_rehearsal_is_neither_charged_nor_mistaken_for_the_study(
    house_of: Houses, hospital, signed: SignedPlan, tmp_path: Path
) -> None:
    house = house_of(is_approved=False)
    ours = public_key(house.coordinator)
    seat = rehearse(
        hospital.config_file,
        signed=signed,
        coordinator=ours,
        state_dir=tmp_path / "r",
        trusted=dict([introduce(hospital.config_file)]),
    )
    assert (seat.name, seat.public_key) == ("north", public_key(hospital.key))
    reply, _ = unseal(seat.answer(house.letter()), key=seat.public_key)
    assert isinstance(reply, SiteReply)
    assert len(ledger.read(tmp_path / "r" / "north").reservations) == 1
    assert not (hospital.folder / "state").exists()
    assert code_of(house, house.letter()) == "not-approved"


def test_a_site_that_objects_does_not_rehearse(
    hospital, plan_of, coordinator_key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    plan = plan_of({"training.num_rounds": 300, "privacy.epsilon": 400.0})
    signed = SignedPlan(plan, sign(plan, key=coordinator_key))
    with pytest.raises(ConsiliaError) as caught:
        rehearse(
            hospital.config_file,
            signed=signed,
            coordinator=plan.coordinator,
            state_dir=tmp_path,
            trusted={},
        )
    assert len(caught.value.objections) == 3
    assert all(objection.startswith("north: ") for objection in caught.value.objections)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_the_device_is_the_one_configured_or_the_one_there_is(device: str, site_of) -> None:
    found = device_of(site_of({"performance.device": device}).performance)
    assert found in ("cpu", "cuda") if device == "auto" else found == device


@pytest.mark.parametrize("kind", ["train", "evaluate", "alone"])
def test_in_quiet_hours_nothing_is_done_or_charged(
    kind: str, house_of: Houses, trainings: list[dict[str, Any]]
) -> None:
    house = house_of({}, {"quiet_hours": ("00:00-24:00",)})
    assert code_of(house, house.letter(kind)) == "quiet-hours"
    assert (trainings, house.charged()) == ([], [])


def test_in_quiet_hours_a_reply_made_before_is_given_again(
    house_of: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = house_of({}, {"quiet_hours": ("00:00-24:00",)})
    letter = house.letter()
    with monkeypatch.context() as loud:
        loud.setattr("client.answer.is_quiet", lambda *_: False)
        before = answer(letter, house.site)
    assert before.kind == "reply"
    assert answer(letter, house.site) == before

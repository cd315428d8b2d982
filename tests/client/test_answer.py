"""A small real hospital: what it answers, what it refuses, and what nobody ever hears from it."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import config as configs
from client import ledger, studies, train
from client.answer import NO_STUDY, Site, answer, device_of, open_site, rehearse
from shared_models import nets
from shared_models.contracts import Refusal, RoundOrder, SiteReply
from shared_models.errors import ConsiliaError, DocumentError
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
        entries = ledger.read(self.site.config.state_dir)
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
    first = house.ask("evaluate", 3)
    assert isinstance(first, SiteReply)
    assert reply.evaluation != first.evaluation


@pytest.mark.parametrize(("kind", "num_trainings"), [("train", 1), ("alone", 3)])
def test_only_training_patients_are_trained_on(
    kind: str, num_trainings: int, house: House, trainings: list[Any]
) -> None:
    house.ask(kind)
    assert [len(given_["patients"]) for given_ in trainings] == [12] * num_trainings
    assert [given_["round_"] for given_ in trainings] == list(range(num_trainings))


def test_the_same_order_gives_the_same_update_without_privacy(house_of: Houses) -> None:
    updates = []
    for _ in range(2):
        house = house_of({"privacy": None}, {"allow_without_privacy": True})
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
    study, plan = house.site.studies[digest(house.plan)], house.plan
    net = nets.make(plan.net.name, plan.net.params, seed=1, num_outputs=2)
    train.train(
        net,
        study.cohort["train"],
        plan=plan,
        task=study.task,
        round_=1,
        randomness=train.randomness_of(plan, site="north", round_=1, purpose="train"),
        performance=train.Performance(),
    )
    assert np.array_equal(update, flatten(weights_of(net)) - house.weights)


def test_the_same_order_gives_another_update_with_privacy(house: House) -> None:
    updates = [house.hear(house.letter())[1] for _ in range(2)]
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
    assert spent(ledger.read(house.site.config.state_dir), delta=0.01).epsilon == cost
    assert refused(house.ask("train", 2)) == "budget"


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
        charged.append([e.event for e in ledger.read(house.site.config.state_dir)])
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
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(house.ask("train", 1)) == "budget"
    assert len(trainings) == 1


def test_the_ledger_outlives_the_agent(house_of: Houses) -> None:
    cost = epsilon([event_of(house_of().plan, steps=12)], delta=0.01)
    for _ in range(3):
        assert isinstance(house_of({"privacy.epsilon": cost}).ask("train", 0), SiteReply)
    assert len(house_of({"privacy.epsilon": cost}).charged()) == 3


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
    assert code_of(house, letter._replace(buckets=letter.buckets * 2)) == "bad-order"
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
    study = house.site.studies[digest(house.plan)]
    study.cohort["train"][0].images[:] = np.nan
    letters = [answer(house.letter("alone"), house.site)]
    assert letters[0].kind == "reply"
    assert "not finite and left out" in caplog.text
    assert "finite" not in letters[0].document


# --- opening a site, rehearsing


def test_an_opened_site_answers_as_its_site_toml_says(house: House, hospital) -> None:
    answering = open_site(hospital.config_file)
    reply, _ = unseal(answering(house.letter()), key=public_key(hospital.key))
    assert isinstance(reply, SiteReply)


def test_a_site_without_its_key_cannot_be_opened(hospital) -> None:
    (hospital.folder / "keys" / "signing.pem").unlink()
    with pytest.raises(DocumentError, match="cannot read the signing key"):
        open_site(hospital.config_file)


@pytest.fixture
def signed(plan_of, coordinator_key: Ed25519PrivateKey) -> SignedPlan:
    return SignedPlan(plan_of(), sign(plan_of(), key=coordinator_key))


def test_a_rehearsal_is_neither_charged_nor_mistaken_for_the_study(
    house_of: Houses, hospital, signed: SignedPlan, tmp_path: Path
) -> None:
    house = house_of(is_approved=False)
    ours = public_key(house.coordinator)
    seat = rehearse(hospital.config_file, signed=signed, coordinator=ours, state_dir=tmp_path / "r")
    assert (seat.name, seat.public_key) == ("north", public_key(hospital.key))
    reply, _ = unseal(seat.answer(house.letter()), key=seat.public_key)
    assert isinstance(reply, SiteReply)
    assert len(ledger.read(tmp_path / "r" / "north")) == 1
    assert not (hospital.folder / "state").exists()
    assert code_of(house, house.letter()) == "not-approved"


def test_a_site_that_objects_does_not_rehearse(
    hospital, plan_of, coordinator_key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    plan = plan_of({"training.num_rounds": 300, "privacy.epsilon": 400.0})
    signed = SignedPlan(plan, sign(plan, key=coordinator_key))
    with pytest.raises(ConsiliaError) as caught:
        rehearse(
            hospital.config_file, signed=signed, coordinator=plan.coordinator, state_dir=tmp_path
        )
    assert len(caught.value.objections) == 2
    assert all(objection.startswith("north: ") for objection in caught.value.objections)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_the_device_is_the_one_configured_or_the_one_there_is(device: str, site_of) -> None:
    found = device_of(site_of({"performance.device": device}))
    assert found in ("cpu", "cuda") if device == "auto" else found == device

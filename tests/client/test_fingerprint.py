"""A site's fingerprint, from its images to the one reply that leaves."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from client import config as configs
from client import fingerprint, ledger, policy, show, status, studies
from client.answer import Site, answer
from client.fingerprint import Measured, chosen, counted, measure, told
from client.gate import Result, pass_out
from client.work import Bench, Job, Outcome
from shared_models import volume
from shared_models.cohort import Row
from shared_models.contracts import Fingerprint, Refusal, RoundOrder, SiteReply
from shared_models.fingerprint import event_of_fingerprint, gathered, layouts, sensitivity
from shared_models.journal import parse
from shared_models.phantoms import HOSPITALS, write_hospitals
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.privacy import epsilon
from shared_models.randomness import seeded
from shared_models.series import read_files
from shared_models.signing import digest, public_key, sign
from shared_models.tasks import classification, segmentation
from shared_models.weights import digest as digest_of
from shared_models.wire import Letter, seal, unseal

NOW = datetime.now(UTC)
NOTHING = np.zeros(0, np.float32)
TERMS: dict[str, Any] = {
    "size": {"low": 4, "high": 256, "num_cells": 30},
    "intensity": {"low": 0, "high": 256, "num_cells": 64, "percentiles": (50.0, 99.0)},
    "modalities": ("CT",),
    "classes": "label",
}
NOISED: dict[str, Any] = {
    "fingerprint": TERMS | {"noise_multiplier": 2.0},
    "privacy": {"epsilon": 1.2, "delta": 0.01, "noise_multiplier": 1.0, "max_grad_norm": 1.0},
}
PLAIN: dict[str, Any] = {"fingerprint": TERMS, "privacy": None}
ALLOWED = {"allow_fingerprint": True, "allow_without_privacy": True}


@pytest.fixture
def asking(plan_of) -> Callable[..., StudyPlan]:
    def make(changes: dict[str, Any] = NOISED, **terms: Any) -> StudyPlan:
        asked = changes | {"imaging": (), "fingerprint": changes["fingerprint"] | terms}
        return plan_of(asked)

    return make


patients = st.builds(
    Measured,
    size=st.tuples(*[st.integers(1, 600)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.01, 30)] * 3),
    modality=st.sampled_from(["CT", "MR", "OT"]),
    values=st.tuples(*[st.floats(-3000, 3000)] * 2),
    classes=st.tuples(st.integers(0, 1)),
)


# --- what is counted


@given(st.lists(patients, max_size=6), patients)
def test_adding_one_patient_changes_all_histograms_by_the_sensitivity(
    cohort: list[Measured], one: Measured
) -> None:
    plan = HISTOGRAMS
    before, after = counted(cohort, plan), counted([*cohort, one], plan)
    change = np.concatenate(after).astype(float) - np.concatenate(before)
    assert np.linalg.norm(change) == pytest.approx(math.sqrt(len(layouts(plan))))
    assert np.linalg.norm(change) <= sensitivity(plan)
    assert all(sum(each) == len(cohort) + 1 for each in after)


@given(st.lists(patients, max_size=6), patients, patients)
def test_whatever_a_patients_image_is_like_it_counts_as_much(
    cohort: list[Measured], one: Measured, other: Measured
) -> None:
    sums = [[sum(each) for each in counted([*cohort, who], HISTOGRAMS)] for who in (one, other)]
    assert sums[0] == sums[1]


HISTOGRAMS = StudyPlan.model_validate(
    {
        "name": "tiny",
        "purpose": "research",
        "coordinator": "0" * 64,
        "sites": ["north"],
        "expires": "2099-01-01",
        "task": {"name": "classification", "params": {"classes": ["clear", "opaque"]}},
        "net": {"name": "densenet", "params": {"spatial_dims": 3}},
        "strategy": {"name": "fedavg"},
        "training": {
            "num_rounds": 1,
            "steps_per_round": 1,
            "sample_rate": 0.1,
            "learning_rate": 0.1,
        },
        "rounds": {"quorum": 1},
        "fingerprint": TERMS
        | {
            "spacing": {"low": 0.2, "high": 8, "num_cells": 32},
            "extent": {"low": 20, "high": 900, "num_cells": 32},
        },
    }
)


def test_which_image_speaks_for_a_patient_depends_on_no_other_patient() -> None:
    rows = [
        Row(2 + 3 * number + view, f"{number}-{view}.png", str(number), "clear", "train")
        for number in range(20)
        for view in range(3)
    ]
    of = {row.patient: row.image for row in chosen(rows, key="study")}
    assert len(of) == 20
    assert len({image[-5] for image in of.values()}) > 1  # not always the first
    fewer = [row for row in rows if int(row.patient) % 2]
    assert {row.patient: row.image for row in chosen(fewer[::-1], key="study")} == {
        patient: image for patient, image in of.items() if int(patient) % 2
    }
    assert {row.patient: row.image for row in chosen(rows, key="another")} != of


def test_the_noise_has_the_deviation_that_is_charged(asking) -> None:
    plan = asking(noise_multiplier=3.0)
    event = event_of_fingerprint(plan)
    cohort = [Measured((1, 20, 20), (1.0, 1.0, 1.0), "OT", (60.0, 118.0), (0,))] * 50
    exact = np.concatenate(counted(cohort, plan))
    found = [
        told(cohort, plan, noise_multiplier=3.0, min_cell=5, randomness=seeded(number))
        for number in range(60)
    ]
    noise = [np.concatenate([one.counts for one in each.histograms]) - exact for each in found]
    deviation = event.noise_multiplier * event.max_grad_norm
    assert np.std(noise) == pytest.approx(deviation, rel=0.03)
    assert abs(np.mean(noise)) < deviation / 20
    assert all(each.min_cell == 0 for each in found)


def test_noise_is_never_the_same_twice(asking) -> None:
    plan = asking()
    cohort = [Measured((1, 20, 20), (1.0, 1.0, 1.0), "OT", (60.0, 118.0), (0,))] * 5
    assert told(cohort, plan, noise_multiplier=2.0, min_cell=5) != told(
        cohort, plan, noise_multiplier=2.0, min_cell=5
    )


def test_noise_stands_under_privacy_terms_and_only_then(asking) -> None:
    for plan, noise in ((asking(), 0.0), (asking(PLAIN), 1.0)):
        with pytest.raises(ValueError, match="noise under privacy terms"):
            told([], plan, noise_multiplier=noise, min_cell=5)


def test_without_noise_counts_are_gathered_to_the_larger_floor(asking) -> None:
    plan = asking(PLAIN)
    cohort = [
        Measured((1, side, 20), (1.0, 1.0, 1.0), "CT", (60.0, 118.0), (0,))
        for side in [20] * 9 + [30] * 4
    ]
    for floor, least in ((3, 5), (7, 7)):
        found = told(cohort, plan, noise_multiplier=0, min_cell=floor)
        assert found.min_cell == least
        for exact, one in zip(counted(cohort, plan), found.histograms, strict=True):
            assert one.counts == gathered(exact, least=least)


# --- how it is measured


def test_geometry_alone_is_read_off_the_headers(
    data_dir: Path, tmp_path: Path, plan_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real hippocampi, turned to another orientation, against reading them whole."""
    folder = data_dir / "hippocampus_mr"
    with (folder / "manifest.csv").open(newline="") as handle:
        images = [row["image"] for row in csv.DictReader(handle)][:6]
    manifest = tmp_path / "manifest.csv"
    with manifest.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "patient", "label", "split"])
        writer.writerows([image, image, "clear", "train"] for image in images)
    axes = {"size": TERMS["size"], "spacing": {"low": 0.2, "high": 8.0, "num_cells": 20}}
    turned = {"imaging": ({"name": "orient", "params": {"axes": "SAR"}},), "privacy": None}
    quick = plan_of(turned | {"fingerprint": axes})
    slow = plan_of(turned | {"fingerprint": axes | {"intensity": TERMS["intensity"]}})
    task = classification.make(classes=["clear", "opaque"])
    whole = measure(manifest, root=folder, plan=slow, task=task)

    def unread(path: Path) -> Any:
        raise AssertionError("a voxel was read")

    monkeypatch.setattr("shared_models.cohort.read_volume", unread)
    found = measure(manifest, root=folder, plan=quick, task=task)
    assert [one.size for one in found] == [one.size for one in whole]
    assert [one.spacing_mm for one in found] == [one.spacing_mm for one in whole]
    assert len({one.size for one in found}) > 1


def test_a_dicom_series_header_is_that_of_the_volume_read_from_it(tmp_path: Path) -> None:
    (folder,) = write_hospitals(tmp_path, seed=1, num_patients=1, size=16, profiles=HOSPITALS[:1])
    (series,) = (folder / "series").iterdir()
    whole = read_files(sorted(series.iterdir()))
    header = volume.read_header(series)
    assert header.shape == whole.data.shape
    assert np.array_equal(header.affine, whole.affine)
    assert header.modality == whole.modality


def test_a_picture_is_measured_by_its_header(tmp_path: Path) -> None:
    file = tmp_path / "film.png"
    Image.fromarray(np.zeros((7, 5), np.uint8)).save(file)
    assert volume.read_header(file).shape == volume.read_volume(file).data.shape == (1, 7, 5)


def test_classes_and_intensities_of_a_label_map(tmp_path: Path, plan_of) -> None:
    label = np.zeros((6, 5, 4), np.uint8)
    label[2:4, 1:3, 1:3] = 2
    image = np.where(label > 0, 100, 10).astype(np.int16)
    for name, data in (("image", image), ("label", label)):
        nibabel.Nifti1Image(data, np.diag([2.0, 1.0, 3.0, 1.0])).to_filename(
            tmp_path / f"{name}.nii"
        )
    (tmp_path / "m.csv").write_text(
        "image,patient,label,split\nimage.nii,a,label.nii,train\n", encoding="utf-8"
    )
    plan = plan_of(
        PLAIN
        | {
            "imaging": (),
            "task": {"name": "segmentation", "params": {"classes": ("near", "far")}},
            "fingerprint": TERMS
            | {
                "classes": "present",
                "intensity": TERMS["intensity"] | {"within": "foreground"},
            },
        }
    )
    task = segmentation.make(classes=["near", "far"])
    (found,) = measure(tmp_path / "m.csv", root=tmp_path, plan=plan, task=task)
    assert found == Measured((4, 5, 6), (3.0, 1.0, 2.0), "MR", (100.0, 100.0), (0, 2))
    of = dict(zip((one.name for one in layouts(plan)), counted([found], plan), strict=True))
    assert (of["class-1"], of["class-2"]) == ([1, 0], [0, 1])


# --- what a site answers


@pytest.fixture
def site_of_(hospital, asking, coordinator_key: Ed25519PrivateKey) -> Callable[..., Any]:
    """Return a site that approved a plan, and what asks it for its fingerprint."""

    def make(
        changes: dict[str, Any] = NOISED,
        rules: dict[str, Any] = ALLOWED,
        *,
        is_approved: bool = True,
        **terms: Any,
    ) -> tuple[Site, StudyPlan, Callable[..., Any]]:
        plan = asking(changes, **terms)
        config = configs.read(hospital.config_file)
        config = config.model_copy(update={"policy": config.policy.model_copy(update=rules)})
        site = Site(config, key=hospital.key)
        if is_approved:
            signed = SignedPlan(plan, sign(plan, key=coordinator_key))
            studies.approve(signed, config, key=hospital.key, who="Dr. Reed")

        def ask(kind: str = "fingerprint", **changed: Any) -> Any:
            order = order_of(plan, kind, **changed)
            return said(answer(seal(order, key=coordinator_key, vector=NOTHING), site), site)

        return site, plan, ask

    return make


def order_of(plan: StudyPlan, kind: str = "fingerprint", **changed: Any) -> RoundOrder:
    fields = {
        "study": digest(plan),
        "round_": 0,
        "kind": kind,
        "site": "north",
        "weights_digest": digest_of(NOTHING),
        "issued_at": NOW,
        "expires_at": NOW + timedelta(hours=1),
    }
    return RoundOrder.model_validate(fields | changed)


def said(letter: Letter, site: Site) -> Any:
    return unseal(letter, key=public_key(site.key))[0]


def code_of(found: Any) -> str:
    assert isinstance(found, Refusal)
    return found.code


def test_a_noised_fingerprint_is_charged_committed_and_stated(site_of_) -> None:
    site, plan, ask = site_of_()
    reply = ask()
    assert isinstance(reply, SiteReply)
    assert reply.num_patients == 12
    assert reply.evaluation is reply.update_digest is reply.train_loss is None
    assert reply.fingerprint is not None
    assert [one.name for one in reply.fingerprint.histograms] == [o.name for o in layouts(plan)]
    book = ledger.read(site.config.state_dir)
    assert [entry.event for entry in book.reservations] == [event_of_fingerprint(plan)]
    assert [entry.reply for entry in book.commits] == [digest(reply)]
    assert reply.privacy is not None
    assert reply.privacy.epsilon == epsilon([event_of_fingerprint(plan)], delta=0.01)
    assert "histogram" in reply.privacy.covers
    entries = parse((site.config.state_dir / "journal.jsonl").read_bytes())
    kinds = [line.entry.kind for line in entries]
    assert kinds[-4:] == ["order", "reservation", "commit", "reply"]
    assert {line.entry.order_kind for line in entries[-4:]} == {"fingerprint"}


def test_asked_again_it_is_the_same_bytes_for_nothing(site_of_) -> None:
    site, _, ask = site_of_()
    assert ask() == ask(expires_at=NOW + timedelta(hours=2))
    assert len(ledger.read(site.config.state_dir).reservations) == 1


def test_another_attempt_is_charged_again_or_refused(site_of_) -> None:
    site, plan, ask = site_of_()
    once = epsilon([event_of_fingerprint(plan)], delta=0.01)
    twice = epsilon([event_of_fingerprint(plan)] * 2, delta=0.01)
    assert once < 1.2 < twice
    assert isinstance(ask(), SiteReply)
    assert code_of(ask(attempt=1)) == "budget"
    assert len(ledger.read(site.config.state_dir).reservations) == 1


def test_nothing_is_noised_before_its_cost_is_on_disk(
    site_of_, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _, ask = site_of_()
    real, on_disk = fingerprint.told, list[int]()

    def spied(*args: Any, **given_: Any) -> Fingerprint:
        on_disk.append(len(ledger.read(site.config.state_dir).reservations))
        return real(*args, **given_)

    monkeypatch.setattr(fingerprint, "told", spied)
    assert isinstance(ask(), SiteReply)
    assert on_disk == [1]


def test_without_noise_counts_are_gathered_and_none_is_charged(site_of_) -> None:
    site, _, ask = site_of_(PLAIN)
    reply = ask()
    assert isinstance(reply, SiteReply)
    assert reply.privacy is None
    counts = [count for one in reply.fingerprint.histograms for count in one.counts]
    assert all(count == 0 or count >= 5 for count in counts)
    assert all(sum(one.counts) == 12 for one in reply.fingerprint.histograms)
    of = {one.name: one.counts for one in reply.fingerprint.histograms}
    assert of["class"] == (6.0, 6.0)
    assert of["modality"] == (0.0, 12.0)
    assert ledger.read(site.config.state_dir).reservations == ()


def test_without_noise_nothing_is_counted_twice(site_of_) -> None:
    """Whoever comes or goes between two counts would be what differs."""
    site, _, ask = site_of_(PLAIN)
    first = ask()
    assert ask() == first
    assert code_of(ask(attempt=1)) == "out-of-order"
    (kept,) = (site.config.state_dir / "outbox").iterdir()
    kept.unlink()
    assert code_of(ask()) == "out-of-order"
    anew = Site(site.config, key=site.key)
    assert anew.last_round == {}
    site.last_round, site.is_recalled = {}, False  # as an agent that was started anew
    assert code_of(ask()) == "out-of-order"


@pytest.mark.parametrize("changes", [NOISED, PLAIN])
@pytest.mark.parametrize("kind", ["train", "evaluate", "alone"])
def test_nothing_is_trained_or_evaluated_under_its_plan(
    kind: str, changes: dict[str, Any], site_of_
) -> None:
    site, _, ask = site_of_(changes)
    assert code_of(ask(kind)) == "bad-order"
    assert ledger.read(site.config.state_dir).reservations == ()


def test_it_is_asked_in_round_0_and_with_no_weights(site_of_, coordinator_key) -> None:
    site, plan, ask = site_of_()
    assert code_of(ask(round_=1)) == "out-of-order"
    weights = np.ones(3, np.float32)
    order = order_of(plan, weights_digest=digest_of(weights))
    letter = seal(order, key=coordinator_key, vector=weights)
    assert code_of(said(answer(letter, site), site)) == "bad-order"


def test_a_plan_that_asks_for_none_gets_none(
    hospital, plan_of, coordinator_key: Ed25519PrivateKey
) -> None:
    plan = plan_of()
    site = Site(configs.read(hospital.config_file), key=hospital.key)
    signed = SignedPlan(plan, sign(plan, key=coordinator_key))
    studies.approve(signed, site.config, key=hospital.key, who="Dr. Reed")
    letter = seal(order_of(plan), key=coordinator_key, vector=NOTHING)
    assert code_of(said(answer(letter, site), site)) == "bad-order"


def test_it_is_told_only_if_the_site_says_so(site_of_, asking, site_of) -> None:
    _, _, ask = site_of_(rules=ALLOWED | {"allow_fingerprint": False})
    assert code_of(ask()) == "policy"
    site = site_of({"policy.allow_fingerprint": False})
    objections = policy.judge(asking(), site, today=NOW.date())
    assert [text for text in objections if text.startswith("fingerprint")]
    allowed = site_of({"policy.allow_fingerprint": True})
    assert policy.judge(asking(), allowed, today=NOW.date()) == []


@pytest.mark.parametrize("rules", [{"min_patients": 13}, {"min_cell": 13}])
def test_too_few_patients_are_not_told_of(rules: dict[str, Any], site_of_) -> None:
    _, _, ask = site_of_(PLAIN, ALLOWED | rules)
    assert code_of(ask()) == "too-few-patients"


def test_an_image_that_cannot_be_read_costs_nothing_and_is_not_named(
    site_of_, hospital, mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    site, _, ask = site_of_()
    for file in sorted(hospital.images.glob("*-3-*.png")):
        file.write_bytes(b"\x89PNG broken")
    assert code_of(ask()) == "data"
    assert mark not in caplog.text
    assert ledger.read(site.config.state_dir).reservations == ()


# --- the gate looks again


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one.model_copy(update={"counts": (9.0, 3.0)}),
        lambda one: one.model_copy(update={"counts": (6.5, 5.5)}),
        lambda one: one.model_copy(update={"counts": (6.0, 7.0)}),
        lambda one: one.model_copy(update={"counts": (12.0,)}),
        lambda one: one.model_copy(update={"name": "marked"}),
        lambda one: one.model_copy(update={"counts": (math.nan, 12.0)}),
        lambda one: one.model_copy(update={"counts": (1e30, -1e30)}),
    ],
)
def test_a_hostile_worker_gets_no_other_counts_out(spoil: Callable[..., Any], site_of_) -> None:
    site, _, ask = site_of_(PLAIN)
    bench = Bench()

    def hostile(job: Job, weights: Any) -> Any:
        outcome, update = bench(job, weights)
        if outcome.fingerprint is None:
            return outcome, update
        *rest, last = outcome.fingerprint.histograms
        spoiled = outcome.fingerprint.model_copy(update={"histograms": (*rest, spoil(last))})
        return outcome.model_copy(update={"fingerprint": spoiled}), update

    site.trainer = hostile
    assert code_of(ask()) == "gate"


@pytest.mark.parametrize("kind", ["missing", "ungathered", "with a loss"])
def test_a_result_that_is_no_fingerprint_does_not_leave(kind: str, asking, site_of) -> None:
    plan, site = (
        asking(PLAIN),
        site_of({f"policy.{name}": value for name, value in ALLOWED.items()}),
    )
    cohort = [Measured((1, 20, 20), (1.0, 1.0, 1.0), "OT", (60.0, 118.0), (0,))] * 12
    good = Result(12, 1.0, fingerprint=told(cohort, plan, noise_multiplier=0, min_cell=5))
    order = order_of(plan)
    passed = pass_out(good, order=order, plan=plan, site=site, schema=())
    assert isinstance(passed, tuple)
    bad = {
        "missing": good._replace(fingerprint=None),
        "ungathered": good._replace(
            fingerprint=good.fingerprint.model_copy(update={"min_cell": 0})  # type: ignore[union-attr]
        ),
        "with a loss": good._replace(train_loss=0.5),
    }[kind]
    found = pass_out(bad, order=order, plan=plan, site=site, schema=())
    assert isinstance(found, Refusal)
    assert found.code == "gate"


def test_a_fingerprint_does_not_leave_with_an_order_to_evaluate(asking, plan_of, site_of) -> None:
    plan = plan_of({"privacy": None})
    cohort = [Measured((1, 20, 20), (1.0, 1.0, 1.0), "OT", (60.0, 118.0), (0,))] * 12
    found = told(cohort, asking(PLAIN), noise_multiplier=0, min_cell=5)
    site = site_of({f"policy.{name}": value for name, value in ALLOWED.items()})
    order = order_of(plan, "evaluate")
    passed = pass_out(
        Result(12, 1.0, fingerprint=found), order=order, plan=plan, site=site, schema=()
    )
    assert isinstance(passed, Refusal)


# --- what people see


def test_people_are_shown_what_is_asked_and_what_it_costs(site_of_) -> None:
    for changes, words in ((NOISED, "with noise added here"), (PLAIN, "WITHOUT any noise")):
        site, plan, _ = site_of_(changes)
        known = studies.look_up(digest(plan), site.config, key=site.key, today=NOW.date())
        console = Console(width=120, file=StringIO())
        console.print(show.plan_in_words(known, test_floor=5))
        text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert "no net is trained" in text
        assert words in text
        assert "In every round" not in text


def test_its_cost_and_its_reply_stand_in_the_sites_status(site_of_) -> None:
    site, _, ask = site_of_()
    reply = ask()
    found = status.gather(site.config, key=site.key, now=datetime.now(UTC))
    assert found.lifetime is not None
    assert found.lifetime.epsilon == reply.privacy.epsilon
    assert [one.kind for one in found.left] == ["fingerprint"]


def test_the_worker_is_told_no_key_and_answers_counts_alone(asking, hospital) -> None:
    config = configs.read(hospital.config_file)
    job = Job(
        step="fingerprint",
        study="0" * 64,
        plan=asking(PLAIN),
        site="north",
        data=config.data,
        performance=config.performance,
        today=NOW.date(),
        min_cell=5,
    )
    outcome, update = Bench()(job, None)
    assert update is None
    assert outcome == Outcome(cohort=outcome.cohort, fingerprint=outcome.fingerprint)
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome

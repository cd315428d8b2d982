"""Hostile results at the one way out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from client.config import SiteConfig
from client.gate import Result, pass_out, refusal
from shared_models import weights as weights_of
from shared_models.contracts import (
    Evaluation,
    PrivacyEvent,
    Refusal,
    RefusalCode,
    RoundOrder,
    SiteReply,
)
from shared_models.masking import GRID, LARGEST, masked, opened, public_mask_key
from shared_models.privacy import statement
from shared_models.tasks import segmentation
from shared_models.weights import digest, flatten

MARK = "marked_7731"
SCHEMA = (("a.bias", (3,)), ("a.weight", (3, 2)), ("b", ()))
EVENT = PrivacyEvent(
    sample_rate=0.5, noise_multiplier=2.0, max_grad_norm=1.0, images_per_patient=2, steps=2
)
CHARGED = statement((EVENT,), delta=0.01)
METRICS = {"auc": 0.75, "accuracy": 0.5}


def update_of(**changed: Any) -> dict[str, Any]:
    arrays = {name: np.full(shape, 0.5, np.float32) for name, shape in SCHEMA}
    return arrays | {name.replace("__", "."): value for name, value in changed.items()}


def evaluation_of(metrics: dict[str, float], num_patients: int = 6) -> Evaluation:
    return Evaluation(
        metrics=metrics,
        intervals=dict.fromkeys(metrics, (0.1, 0.9)),
        num_patients=num_patients,
        num_images=2 * num_patients,
    )


def sound(**changed: Any) -> Result:
    """Return what an honest private round of training gives, with changes."""
    result = Result(
        num_patients=12,
        seconds=1.23456,
        update=update_of(),
        evaluation=evaluation_of(METRICS),
        privacy=CHARGED,
    )
    return result._replace(**changed)


def order_of(kind: str = "train") -> RoundOrder:
    when = "2030-01-01T00:00:00Z"
    return RoundOrder.model_validate(
        {
            "study": "5a" * 32,
            "round_": 2,
            "kind": kind,
            "site": "north",
            "weights_digest": "c3" * 32,
            "issued_at": when,
            "expires_at": when,
        }
    )


Passes = Callable[..., Any]


@pytest.fixture
def passes(plan_of, site_of) -> Passes:
    """Return a function that sends a result through the gate of a site."""

    def run(
        result: Result,
        *,
        kind: str = "train",
        plan: dict[str, Any] | None = None,
        site: dict[str, Any] | None = None,
    ) -> Any:
        return pass_out(
            result,
            order=order_of(kind),
            plan=plan_of(plan or {}),
            site=site_of(site or {}),
            schema=SCHEMA,
        )

    return run


def is_refused(answer: Any) -> bool:
    return isinstance(answer, Refusal) and answer.code == "gate"


# --- what may leave


def test_a_sound_result_leaves_as_a_reply_with_the_vector_it_announces(passes: Passes) -> None:
    reply, vector = passes(sound())
    assert isinstance(reply, SiteReply)
    assert (reply.study, reply.round_, reply.kind) == ("5a" * 32, 2, "train")
    assert (reply.site, reply.num_patients, reply.seconds) == ("north", 12, 1.23)
    assert reply.update_digest == digest(vector) == digest(flatten(update_of()))
    assert reply.evaluation == evaluation_of(METRICS)
    assert reply.privacy == CHARGED
    assert reply.train_loss is None


def test_an_evaluation_leaves_without_a_vector(passes: Passes) -> None:
    reply, vector = passes(sound(update=None, privacy=None), kind="evaluate")
    assert vector is None
    assert reply.update_digest is None
    assert reply.evaluation is not None


def test_without_privacy_terms_the_loss_leaves_rounded(passes: Passes) -> None:
    reply, _ = passes(sound(train_loss=0.123456, privacy=None), plan={"privacy": None})
    assert reply.train_loss == 0.1235


# --- updates

BIG_ENDIAN_NAN = np.full(3, np.nan, ">f4")
HOSTILE_UPDATES = {
    "an array more": update_of(extra=np.zeros(1, np.float32)),
    "an array less": {name: np.zeros(shape, np.float32) for name, shape in SCHEMA[1:]},
    "no array at all": {},
    "a name changed": {
        name.replace("bias", MARK): np.zeros(shape, np.float32) for name, shape in SCHEMA
    },
    "a longer array": update_of(a__bias=np.zeros(4, np.float32)),
    "another shape of the same size": update_of(a__weight=np.zeros((2, 3), np.float32)),
    "one axis more": update_of(b=np.zeros(1, np.float32)),
    "float64": update_of(a__bias=np.zeros(3)),
    "float64 everywhere": {name: np.zeros(shape) for name, shape in SCHEMA},
    "integers": update_of(a__bias=np.zeros(3, np.int32)),
    "bytes": update_of(a__bias=np.array([b"MARK", b"ED77", b"31!!"])),
    "text": update_of(a__bias=np.array([MARK] * 3)),
    "objects": update_of(a__bias=np.array([MARK] * 3, dtype=object)),
}


@pytest.mark.parametrize("name", HOSTILE_UPDATES)
def test_an_update_of_another_shape_size_or_kind_than_the_plans_net_never_leaves(
    name: str, passes: Passes
) -> None:
    assert is_refused(passes(sound(update=HOSTILE_UPDATES[name])))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name, _ in SCHEMA])
def test_a_number_that_is_not_finite_never_leaves_in_an_update(
    name: str, value: float, passes: Passes
) -> None:
    update = update_of()
    update[name].flat[-1:] = value
    assert is_refused(passes(sound(update=update)))


def test_an_update_that_is_not_finite_in_another_byte_order_does_not_leave_either(
    passes: Passes,
) -> None:
    assert is_refused(passes(sound(update=update_of(a__bias=BIG_ENDIAN_NAN))))


def test_an_update_over_the_sites_size_does_not_leave(passes: Passes) -> None:
    megabytes = weights_of.size_of(SCHEMA) * 4 / 2**20
    assert is_refused(passes(sound(), site={"policy.max_update_mb": megabytes * 0.99}))
    assert not is_refused(passes(sound(), site={"policy.max_update_mb": megabytes}))


@pytest.mark.parametrize("kind", ["evaluate", "alone"])
def test_an_update_leaves_with_an_order_to_train_only(kind: str, passes: Passes) -> None:
    assert is_refused(passes(sound(), kind=kind))
    assert not is_refused(passes(sound(update=None), kind=kind))


def test_an_order_to_train_is_not_answered_without_an_update(passes: Passes) -> None:
    assert is_refused(passes(sound(update=None)))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    arrays=st.fixed_dictionaries(
        {
            name: st.tuples(
                st.sampled_from([shape] * 9 + [(6,)]),
                st.sampled_from(["f4"] * 7 + ["f8", "i4", "f2"]),
                st.sampled_from([0.0, 1e-30, 1.5, -2.0, 1e9, math.nan, math.inf]),
            )
            for name, shape in SCHEMA
        },
        optional={"c": st.just(((1,), "f4", 0.0))},
    )
)
def test_whatever_leaves_is_finite_float32_of_the_plans_net(
    arrays: dict[str, tuple[tuple[int, ...], str, float]], plan_of, site_text: str
) -> None:
    from client import config

    with np.errstate(invalid="ignore"):
        update = {n: np.full(s, v).astype(d) for n, (s, d, v) in arrays.items()}
    passed = pass_out(
        sound(update=update),
        order=order_of(),
        plan=plan_of(),
        site=config.parse(site_text),
        schema=SCHEMA,
    )
    is_sound = {n: (s, d) for n, (s, d, _) in arrays.items()} == {
        name: (shape, "f4") for name, shape in SCHEMA
    } and all(math.isfinite(v) for _, _, v in arrays.values())
    assert is_refused(passed) != is_sound


# --- numbers that are not finite elsewhere


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["train_loss", "seconds", "metric", "interval", "privacy"])
def test_a_number_that_is_not_finite_never_leaves(where: str, value: float, passes: Passes) -> None:
    unchecked = Evaluation.model_construct(
        metrics={"auc": value if where == "metric" else 0.5},
        intervals={"auc": (0.0, value if where == "interval" else 1.0)},
        num_patients=6,
        num_images=12,
    )
    changes: dict[str, dict[str, Any]] = {
        "train_loss": {"train_loss": value},
        "seconds": {"seconds": value},
        "metric": {"evaluation": unchecked},
        "interval": {"evaluation": unchecked},
        "privacy": {"privacy": CHARGED.model_copy(update={"epsilon_rdp": value})},
    }
    assert is_refused(passes(sound(**changes[where]), plan={"privacy": None}))


PIXELS = float(np.float64(0.5) + int.from_bytes(b"PIX") * 2.0**-50)


def test_a_number_beside_the_update_leaves_with_four_decimals_at_most(passes: Passes) -> None:
    found = Evaluation(
        metrics={"auc": PIXELS}, intervals={"auc": (PIXELS, PIXELS)}, num_patients=6, num_images=9
    )
    result = sound(evaluation=found, train_loss=PIXELS, seconds=PIXELS, privacy=None)
    reply, _ = passes(result, plan={"privacy": None})
    assert reply.evaluation.metrics == {"auc": 0.5}
    assert reply.evaluation.intervals == {"auc": (0.5, 0.5)}
    assert (reply.train_loss, reply.seconds) == (0.5, 0.5)


@pytest.mark.parametrize("value", [1e7, -1e7, 1e300])
@pytest.mark.parametrize("where", ["train_loss", "seconds", "metric", "interval", "count"])
def test_a_number_beside_the_update_leaves_only_as_large_as_a_measure_is(
    where: str, value: float, passes: Passes
) -> None:
    found = Evaluation(
        metrics={"auc": value if where == "metric" else 0.5},
        intervals={"auc": (0.0, value if where == "interval" else 1.0)},
        num_patients=6,
        num_images=int(abs(value)) * 100 if where == "count" else 9,
    )
    others = {where: value} if where in ("train_loss", "seconds") else {}
    result = sound(evaluation=found, privacy=None, **others)
    assert is_refused(passes(result, plan={"privacy": None}))


# --- privacy


@pytest.mark.parametrize("kind", ["train", "alone"])
def test_under_a_plan_with_privacy_terms_nothing_trained_leaves_without_a_charge_in_the_ledger(
    kind: str, passes: Passes
) -> None:
    update = update_of() if kind == "train" else None
    assert is_refused(passes(sound(update=update, privacy=None), kind=kind))
    assert not is_refused(passes(sound(update=update), kind=kind))


@pytest.mark.parametrize("kind", ["train", "alone", "evaluate"])
def test_under_a_plan_with_privacy_terms_the_training_loss_never_leaves(
    kind: str, passes: Passes
) -> None:
    update = update_of() if kind == "train" else None
    assert is_refused(passes(sound(update=update, train_loss=0.5), kind=kind))


@pytest.mark.parametrize("whose", ["plan", "site"])
def test_an_epsilon_over_the_plans_or_the_sites_does_not_leave(whose: str, passes: Passes) -> None:
    field = {"plan": "privacy.epsilon", "site": "policy.max_epsilon_per_study"}[whose]
    spent = CHARGED.epsilon
    assert is_refused(passes(sound(), **{whose: {field: spent * 0.999}}))
    assert not is_refused(passes(sound(), **{whose: {field: spent}}))


@pytest.mark.parametrize("kind", ["train", "alone"])
@pytest.mark.parametrize("whose", ["plan", "site"])
def test_too_few_patients_train_nothing_that_leaves(whose: str, kind: str, passes: Passes) -> None:
    field = {"plan": "min_patients", "site": "policy.min_patients"}[whose]
    result = sound(update=update_of() if kind == "train" else None)
    assert is_refused(passes(result, kind=kind, **{whose: {field: 13}}))
    assert not is_refused(passes(result, kind=kind, **{whose: {field: 12}}))


# --- metrics


def test_a_metric_the_site_does_not_list_never_leaves(passes: Passes) -> None:
    found = evaluation_of({"auc": 0.5, "loss": 0.1, "youngest": 3.0})
    reply, _ = passes(sound(evaluation=found))
    assert reply.evaluation.metrics == {"auc": 0.5}
    assert set(reply.evaluation.intervals) == {"auc"}


def test_a_metric_over_fewer_patients_than_the_sites_minimum_never_leaves(
    passes: Passes,
) -> None:
    for num_patients, leaves in ((4, False), (5, True)):
        found = evaluation_of(METRICS, num_patients)
        reply, _ = passes(
            sound(evaluation=found, update=None, privacy=None),
            kind="evaluate",
            site={"policy.min_test_patients": 5},
        )
        assert (reply.evaluation is not None) == leaves


@pytest.mark.parametrize(
    "name", ["dice_marked_7731", "dice_organ_marked7731", "auc_7731", "dice_", "dice__organ"]
)
def test_a_metric_is_named_by_the_sites_list_and_the_plans_classes_by_nothing_else(
    name: str, passes: Passes
) -> None:
    plan = {"task.params": {"classes": ["organ"]}}
    reply, _ = passes(sound(evaluation=evaluation_of({name: 0.5, "dice_organ": 0.25})), plan=plan)
    assert reply.evaluation.metrics == {"dice_organ": 0.25}
    assert set(reply.evaluation.intervals) == {"dice_organ"}


def test_every_metric_of_a_segmentation_leaves_if_its_first_word_is_listed(
    passes: Passes,
) -> None:
    classes = ["left lung", "Heart", "aorta-2"]
    metrics = segmentation.make(classes=classes).metrics(np.full((4, 6), 0.5))
    assert len(metrics) == 8
    reply, _ = passes(
        sound(evaluation=evaluation_of(metrics)), plan={"task.params": {"classes": classes}}
    )
    assert reply.evaluation.metrics == metrics


def test_a_listed_name_of_several_words_leaves(passes: Passes) -> None:
    found = evaluation_of({"average_precision": 0.5})
    reply, _ = passes(sound(evaluation=found), site={"policy.metrics": ["average_precision"]})
    assert reply.evaluation.metrics == {"average_precision": 0.5}


@pytest.mark.parametrize("name", ["auc " + MARK, "AUC", "auc\n", MARK + "\x00", "dice_" + "x" * 60])
def test_a_name_that_is_no_metrics_cannot_be_smuggled_past_the_contract(
    name: str, passes: Passes
) -> None:
    unchecked = Evaluation.model_construct(
        metrics={name: 0.5}, intervals={name: (0.0, 1.0)}, num_patients=6, num_images=12
    )
    passed = passes(sound(evaluation=unchecked), site={"policy.metrics": ["auc", "dice"]})
    assert is_refused(passed) or passed[0].evaluation.metrics == {}


TEXTS = [
    *("metric", "interval", "num_images", "field"),
    *("unit", "covers", "does_not_cover", "patient"),
]


@pytest.mark.parametrize("where", TEXTS)
def test_text_where_none_belongs_does_not_leave(where: str, passes: Passes) -> None:
    fields: dict[str, Any] = {
        "metrics": {"auc": MARK if where == "metric" else 0.5},
        "intervals": {"auc": (0.0, MARK if where == "interval" else 1.0)},
        "num_patients": 6,
        "num_images": MARK if where == "num_images" else 12,
    }
    unchecked = Evaluation.model_construct(**fields)
    if where == "field":
        unchecked = evaluation_of(METRICS).model_copy(update={"note": MARK})
    charged = CHARGED
    if where in ("unit", "covers", "does_not_cover", "patient"):
        charged = CHARGED.model_copy(update={where: MARK})
    passed = passes(sound(evaluation=unchecked, privacy=charged))
    if where in ("field", "patient"):  # a field no contract has
        assert MARK not in passed[0].model_dump_json()
    else:
        assert is_refused(passed)


# --- refusals


@pytest.mark.parametrize("code", get_args(RefusalCode))
def test_a_refusal_repeats_the_order_and_says_a_code(code: str) -> None:
    found = refusal(order_of("alone"), code)
    assert found.model_dump(exclude={"schema_version"}) == {
        "study": "5a" * 32,
        "round_": 2,
        "kind": "alone",
        "site": "north",
        "code": code,
    }


def test_a_refusal_says_nothing_but_a_code_from_the_closed_list() -> None:
    with pytest.raises(ValidationError) as caught:
        refusal(order_of(), f"{MARK} was too ill")
    assert MARK not in str(caught.value)


def test_what_was_wrong_stands_in_the_sites_log_and_not_in_the_refusal(
    passes: Passes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        found = passes(sound(update=update_of(a__bias=np.zeros(3)), train_loss=0.5))
    assert "the update is not float32" in caplog.text
    assert "the training loss is not noised" in caplog.text
    assert found == refusal(order_of(), "gate")


def test_the_sites_name_is_its_own_whatever_the_order_says(plan_of, site_of) -> None:
    site: SiteConfig = site_of({"name": "south"})
    passed = pass_out(sound(), order=order_of(), plan=plan_of(), site=site, schema=SCHEMA)
    assert isinstance(passed, tuple)
    assert passed[0].site == "south"


# --- secure aggregation

SECURE = {"rounds.secure_aggregation": True, "rounds.quorum": 2}
OWN, OTHER = (X25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
MASK = partial(masked, own=OWN, peers=[public_mask_key(OTHER)], label="a")


@pytest.mark.parametrize("is_secure", [True, False])
@pytest.mark.parametrize("has_mask", [True, False])
def test_under_a_plan_with_secure_aggregation_no_update_leaves_without_its_mask(
    has_mask: bool, is_secure: bool, passes: Passes
) -> None:
    answer = passes(sound(mask=MASK if has_mask else None), plan=SECURE if is_secure else {})
    assert is_refused(answer) == (has_mask != is_secure)
    if not is_refused(answer):
        reply, vector = answer
        assert reply.is_masked == has_mask
        assert vector.dtype == (np.uint64 if has_mask else np.float32)
        assert reply.update_digest == digest(vector)


def test_what_leaves_under_a_mask_is_the_number_of_patients_times_the_update(
    passes: Passes,
) -> None:
    update = {name: np.full(shape, 0.1, np.float32) for name, shape in SCHEMA}
    _, vector = passes(sound(update=update, num_patients=12, mask=MASK), plan=SECURE)
    zeros = np.zeros(weights_of.size_of(SCHEMA))
    theirs = masked(zeros, own=OTHER, peers=[public_mask_key(OWN)], label="a")
    expected = 12 * np.full(len(zeros), np.float32(0.1), np.float64)
    assert opened(vector + theirs) == pytest.approx(expected, abs=GRID / 2)
    assert not np.allclose(opened(vector), expected, atol=1.0)


@pytest.mark.parametrize(("value", "leaves"), [(LARGEST / 16, True), (LARGEST / 15, False)])
def test_a_number_too_large_to_be_masked_does_not_leave(
    value: float, leaves: bool, passes: Passes
) -> None:
    update = update_of(a__bias=np.full(3, value, np.float32))
    answer = passes(sound(update=update, num_patients=16, mask=MASK), plan=SECURE)
    assert is_refused(answer) != leaves


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_hides_no_number_that_is_not_finite(value: float, passes: Passes) -> None:
    update = update_of(a__bias=np.full(3, value, np.float32))
    used: list[Any] = []
    answer = passes(sound(update=update, mask=lambda v: used.append(v) or MASK(v)), plan=SECURE)
    assert is_refused(answer)
    assert used == []


def test_a_masked_update_is_measured_by_what_leaves(passes: Passes) -> None:
    megabytes = weights_of.size_of(SCHEMA) * 8 / 2**20
    result = sound(mask=MASK)
    assert is_refused(passes(result, plan=SECURE, site={"policy.max_update_mb": megabytes * 0.99}))
    assert not is_refused(passes(result, plan=SECURE, site={"policy.max_update_mb": megabytes}))


def test_nothing_of_a_layer_that_stays_leaves(passes: Passes) -> None:
    plan = {"training.personal": ["a."]}
    zero = {"a__bias": np.zeros(3, np.float32), "a__weight": np.zeros((3, 2), np.float32)}
    assert not is_refused(passes(sound(update=update_of(**zero)), plan=plan))
    for name, value in zero.items():
        some = value.copy()
        some.flat[-1] = 1e-30
        assert is_refused(passes(sound(update=update_of(**zero | {name: some})), plan=plan))


@pytest.mark.parametrize("noise_shares", [1, 2])
def test_a_statement_is_in_the_words_for_its_shares_of_noise(
    noise_shares: int, passes: Passes
) -> None:
    said = statement((EVENT.model_copy(update={"noise_shares": noise_shares}),), delta=0.01)
    assert not is_refused(passes(sound(privacy=said)))
    other = said.model_copy(update={"noise_shares": 3 - noise_shares})
    assert is_refused(passes(sound(privacy=other)))

"""The one way out: whatever training produced becomes a reply here or nowhere.

Guarantees:
    An update of another shape, size or kind than the plan's net never leaves.
    A number that is not finite never leaves.
    Of a layer that the plan leaves with the sites nothing leaves.
    Under a plan with privacy terms nothing trained leaves without a charge in the ledger.
    Under a plan with privacy terms the training loss never leaves, for it is not noised.
    A metric the site does not list never leaves, nor one over fewer patients than its minimum.
    A number beside the update leaves with four decimals at most, and only as large as a measure is.
    A metric is named by the site's list and the plan's classes, by nothing else.
    Under a plan with secure aggregation no update leaves without its mask.
    A fingerprint leaves under a plan that asks for it, in that plan's cells, and nothing beside it.
    A fingerprint without noise never leaves with a count of fewer patients than plan or site allow.

Design: the gate sees results only, not how they came about, and depends on nothing a study chooses
but the plan itself. Any doubt is a refusal; what was wrong goes to the site's log, never out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from client.config import SiteConfig
from shared_models import weights as weights_of
from shared_models.contracts import (
    Evaluation,
    Fingerprint,
    PrivacyStatement,
    Refusal,
    Reservation,
    RoundOrder,
    SiteReply,
)
from shared_models.fingerprint import faults
from shared_models.masking import Masked
from shared_models.plan import StudyPlan
from shared_models.privacy import sentences_for
from shared_models.weights import Schema, Weights
from shared_models.wire import Vector

log = logging.getLogger(__name__)

MOST_MEASURE = 1e6  # metrics, losses, seconds: more digits than that could spell something else
MOST_COUNT = 10**8


class Refused(Exception):
    """This site will not obey; ``code`` is from the contracts' closed list."""

    def __init__(self, code: str, why: str) -> None:
        self.code = code
        super().__init__(why)


class Result(NamedTuple):
    """What a round gave, still inside the hospital.

    ``charge`` is its line in the ledger; ``mask`` hides the update under secure aggregation;
    ``own`` are the layers that stay here, as training left them, and are never passed out.
    """

    num_patients: int
    seconds: float
    train_loss: float | None = None
    update: Weights | None = None
    evaluation: Evaluation | None = None
    privacy: PrivacyStatement | None = None
    charge: Reservation | None = None
    mask: Callable[[NDArray[np.floating]], Masked] | None = None
    fingerprint: Fingerprint | None = None
    own: Weights | None = None


def pass_out(
    result: Result, *, order: RoundOrder, plan: StudyPlan, site: SiteConfig, schema: Schema
) -> tuple[SiteReply, Vector | None] | Refusal:
    """Return the reply to ``order`` and the update's vector, or a refusal.

    A masked update is times ``num_patients`` first, so that a sum over sites is that of patients.
    """
    objections = _objections(result, order=order, plan=plan, site=site, schema=schema)
    if objections:
        for objection in objections:
            log.error("gate: %s", objection)
        return refusal(order, "gate")
    vector: Vector | None = None
    try:
        if result.update is not None:
            vector = weights_of.flatten(result.update)
            if result.mask is not None:
                vector = result.mask(result.num_patients * vector.astype(np.float64))
        return _reply(result, vector, order=order, plan=plan, site=site), vector
    except OverflowError:
        log.error("gate: a number too large to be masked")
        return refusal(order, "gate")
    except ValidationError:
        log.error("gate: a number or a name that no reply may hold")
        return refusal(order, "gate")


def refusal(order: RoundOrder, code: str) -> Refusal:
    """Return a refusal of ``order``; its code is from the closed list or this raises."""
    return Refusal.model_validate(
        {
            "study": order.study,
            "round_": order.round_,
            "kind": order.kind,
            "site": order.site,
            "code": code,
        }
    )


def allowed_metrics(plan: StudyPlan, site: SiteConfig) -> set[str]:
    """Return the names of the metrics that may leave: those listed, and each for each class."""
    listed = set(site.policy.metrics)
    return listed | {f"{metric}_{name}" for metric in listed for name in _classes(plan)}


def _reply(
    result: Result, vector: Vector | None, *, order: RoundOrder, plan: StudyPlan, site: SiteConfig
) -> SiteReply:
    """Make the reply from plain values, so that every one of them is checked once more."""
    evaluation, privacy = _redacted(result.evaluation, plan, site), result.privacy
    fingerprint = result.fingerprint
    return SiteReply.model_validate(
        {
            "study": order.study,
            "round_": order.round_,
            "kind": order.kind,
            "attempt": order.attempt,
            "site": site.name,
            "num_patients": result.num_patients,
            "train_loss": None if result.train_loss is None else round(result.train_loss, 4),
            "update_digest": None if vector is None else weights_of.digest(vector),
            "is_masked": vector is not None and result.mask is not None,
            "evaluation": None if evaluation is None else evaluation.model_dump(warnings=False),
            "privacy": None if privacy is None else privacy.model_dump(warnings=False),
            "fingerprint": None if fingerprint is None else _rounded(fingerprint),
            "seconds": round(result.seconds, 2),
        }
    )


def _objections(
    result: Result, *, order: RoundOrder, plan: StudyPlan, site: SiteConfig, schema: Schema
) -> list[str]:
    found = []
    is_charged = order.kind != "evaluate"
    if (result.update is not None) != (order.kind == "train"):
        found.append("an update leaves with an order to train, and only then")
    if result.update is not None:
        found += _update_objections(
            result.update,
            schema,
            site.policy.max_update_mb,
            is_masked=result.mask is not None,
            personal=plan.training.personal,
        )
        if (result.mask is not None) != plan.rounds.secure_aggregation:
            found.append("an update is masked under secure aggregation, and only then")
    if plan.privacy is not None and result.train_loss is not None:
        found.append("the plan is private but the training loss is not noised")
    if is_charged and plan.privacy is not None and result.privacy is None:
        found.append("the plan is private but nothing was charged for this round")
    if result.privacy is not None and plan.privacy is not None:
        allowed = min(plan.privacy.epsilon, site.policy.max_epsilon_per_study)
        if result.privacy.epsilon > allowed:
            found.append("the study's epsilon exceeds what plan and site allow")
    if result.privacy is not None and not _is_ours(result.privacy, plan):
        found.append("the privacy statement is not in the platform's own words")
    if not all(_is_plain(value, most=most) for value, most in _numbers(result)):
        found.append("a number beside the update is none, not finite, or larger than a measure is")
    if is_charged and result.num_patients < max(plan.min_patients, site.policy.min_patients):
        found.append("fewer patients than the plan or the site allows")
    return found or _fingerprint_objections(result, order=order, plan=plan, site=site)


def _fingerprint_objections(
    result: Result, *, order: RoundOrder, plan: StudyPlan, site: SiteConfig
) -> list[str]:
    is_asked = order.kind == "fingerprint"
    if (plan.fingerprint is not None) != is_asked:
        return ["a plan that asks for a fingerprint asks for nothing else"]
    if result.fingerprint is None:
        return ["the fingerprint asked for is missing"] if is_asked else []
    if not is_asked:
        return ["a fingerprint leaves with an order for it, and only then"]
    if result.evaluation is not None or result.train_loss is not None:
        return ["a fingerprint leaves alone"]
    if not site.policy.allow_fingerprint:
        return ["this site tells no fingerprints"]
    return faults(
        result.fingerprint,
        plan,
        num_patients=result.num_patients,
        min_cell=site.policy.min_cell,
    )


def _update_objections(
    update: Weights, schema: Schema, max_mb: float, *, is_masked: bool, personal: tuple[str, ...]
) -> list[str]:
    if weights_of.schema_of(update) != schema:
        return ["the update's names or shapes are not those of the plan's net"]
    if any(value.dtype.name != "float32" for value in update.values()):
        return ["the update is not float32"]
    found = []
    bytes_each = 8 if is_masked else 4
    if weights_of.size_of(schema) * bytes_each > max_mb * 2**20:
        found.append(f"the update is over the site's {max_mb:g} MB")
    if not all(weights_of.is_finite(value.ravel()) for value in update.values()):
        found.append("the update holds a number that is not finite")
    if any(value.any() for name, value in update.items() if name.startswith(personal)):
        found.append("the update holds something of a layer that stays here")
    return found


def _numbers(result: Result) -> Iterator[tuple[object, float]]:
    """Yield every number that may leave beside the update, with the most it can be."""
    measures: list[object] = [result.seconds]
    counts: list[object] = [result.num_patients]
    if result.train_loss is not None:
        measures.append(result.train_loss)
    if (evaluation := result.evaluation) is not None:
        counts += [evaluation.num_patients, evaluation.num_images]
        measures += evaluation.metrics.values()
        measures += [bound for bounds in evaluation.intervals.values() for bound in bounds]
    if result.fingerprint is not None:
        counts += [count for one in result.fingerprint.histograms for count in one.counts]
    yield from ((measure, MOST_MEASURE) for measure in measures)
    yield from ((count, MOST_COUNT) for count in counts)


def _is_plain(value: object, *, most: float) -> bool:
    return isinstance(value, int | float) and abs(value) <= most


def _is_ours(privacy: PrivacyStatement, plan: StudyPlan) -> bool:
    return (privacy.covers, privacy.does_not_cover) == sentences_for(
        privacy.noise_shares, is_fingerprint=plan.fingerprint is not None
    )


def _rounded(fingerprint: Fingerprint) -> dict[str, object]:
    """Return a fingerprint's plain values, its counts with four decimals at most."""
    histograms = [
        {"name": one.name, "counts": [round(count, 4) for count in one.counts]}
        for one in fingerprint.histograms
    ]
    return {"min_cell": fingerprint.min_cell, "histograms": histograms}


def _redacted(
    evaluation: Evaluation | None, plan: StudyPlan, site: SiteConfig
) -> Evaluation | None:
    """Keep the metrics the site lists (``dice`` allows ``dice_<class>``), over enough patients."""
    if evaluation is None or evaluation.num_patients < site.policy.min_test_patients:
        return None
    allowed = allowed_metrics(plan, site)
    return evaluation.model_copy(
        update={
            "metrics": {k: round(v, 4) for k, v in evaluation.metrics.items() if k in allowed},
            "intervals": {
                k: (round(low, 4), round(high, 4))
                for k, (low, high) in evaluation.intervals.items()
                if k in allowed
            },
        }
    )


def _classes(plan: StudyPlan) -> set[str]:
    """Return the plan's class names, written as the task writes them in metrics."""
    given = plan.task.params.get("classes", ())
    names = given if isinstance(given, tuple) else ()
    return {"".join(c if c.isalnum() else "_" for c in str(n).lower()) for n in names}

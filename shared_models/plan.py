"""The study plan: one TOML document a hospital can read, judge and countersign.

A study is data, not code. A plan names things from allow-lists (net, task, imaging steps, strategy)
with parameters; any change to it is a new plan with a new digest. The coordinator's signature
stands in the same file, in its last table, and is not part of what is signed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tomli_w
from pydantic import Field, ValidationError

from shared_models.contracts import (
    Contract,
    Digest,
    Name,
    NonNegative,
    Positive,
    PrivacyEvent,
    Probability,
    PublicKey,
    Shares,
    Signature,
    SiteName,
)
from shared_models.errors import DocumentError
from shared_models.fingerprint import FingerprintTerms, event_of_fingerprint
from shared_models.fingerprint import objections as fingerprint_objections
from shared_models.privacy import epsilon

Purpose = Literal["demonstration", "research", "quality-assurance"]
Scalar = bool | int | float | str
Param = Scalar | tuple[Scalar, ...] | tuple[tuple[Scalar, ...], ...]
Params = dict[Name, Param]


NamePrefix = Annotated[str, Field(min_length=1, max_length=200)]
PatchLength = Annotated[int, Field(ge=4, le=4096)]


class Choice(Contract):
    """Something chosen by name from an allow-list, with its parameters."""

    name: Name
    params: Params = Field(default_factory=dict)


class Training(Contract):
    """How every site trains in every round.

    Each of ``steps_per_round`` steps draws every training patient with probability ``sample_rate``
    and at most ``images_per_patient`` of a drawn patient's images. ``proximal_mu`` is FedProx's
    pull towards the weights received (Li et al. 2020, eq. 2); 0 is FedAvg. The learning rate falls
    from ``learning_rate`` in the first round to ``learning_rate_end`` in the last along a cosine.
    An image drawn enters as ``views`` of it, each mirrored left to right at random (``flips``) and
    moved by up to ``shift`` pixels or voxels along each axis, and counts once in its patient's mean
    (augmentation multiplicity, De et al. 2022). With ``patch``, ([z,] y, x) voxels, an image drawn
    enters as ``patches_per_image`` random patches of it instead of whole, anywhere in it or, with
    ``patch_foreground``, that share of them around voxels whose label is not 0; whole images are
    answered by the mean of overlapping patches. Parameters whose names begin with one of ``frozen``
    stay as they were sent. Those that begin with one of ``personal`` are each site's own: trained
    and kept there, never sent (FedBN, Li et al. 2021). ``adam-bc`` is Adam with the noise's own
    variance taken out of its second moment (Tang et al. 2024); it needs privacy terms.
    """

    num_rounds: Annotated[int, Field(ge=1, le=10_000)]
    steps_per_round: Annotated[int, Field(ge=1, le=100_000)]
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    images_per_patient: Annotated[int, Field(ge=1, le=1000)] = 4
    optimizer: Literal["adamw", "sgd", "adam-bc"] = "adamw"
    learning_rate: Positive
    learning_rate_end: Positive | None = None
    weight_decay: NonNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    proximal_mu: NonNegative = 0.0
    flips: bool = False
    shift: Annotated[int, Field(ge=0, le=64)] = 0
    views: Annotated[int, Field(ge=1, le=64)] = 1
    patch: Annotated[tuple[PatchLength, ...], Field(max_length=3)] = ()
    patches_per_image: Annotated[int, Field(ge=1, le=64)] = 1
    patch_foreground: Annotated[float, Field(ge=0, le=1)] | None = None
    frozen: tuple[NamePrefix, ...] = ()
    personal: tuple[NamePrefix, ...] = ()


class PrivacyTerms(Contract):
    """Patient-level differential privacy, as agreed.

    ``noise_multiplier`` is the noise's standard deviation over ``max_grad_norm``; with it the whole
    study must cost at most ``epsilon`` at ``delta``, which every site recomputes for itself.
    ``noise_shares`` over 1 splits that noise: each site adds noise_multiplier / sqrt(noise_shares),
    and only the sum of that many sites, which is all that secure aggregation shows, is private. The
    sites a round may have beyond that many may tell their shares without harm.
    ``clipping``: ``flat`` scales gradients over ``max_grad_norm`` down to it; ``automatic`` scales
    every gradient to it (Bu et al. 2023), so that the norm need not be known beforehand.
    """

    unit: Literal["patient"] = "patient"
    epsilon: Positive
    delta: Probability
    noise_multiplier: Positive
    max_grad_norm: Positive
    noise_shares: Shares = 1
    clipping: Literal["flat", "automatic"] = "flat"


class RoundTerms(Contract):
    """How many sites a round needs, how long it waits for them, and what it sees of them.

    Under ``secure_aggregation`` the coordinator sees the sum of the updates and none of them. Such
    a round needs all sites it began with; if one is missing, it is asked again of the others. A
    round asked again costs the patients again: the budget covers ``spare`` of them.

    Where ``averaging`` is over 0, what is validated and released is the exponential moving average
    of the models of all rounds, with that decay; sites train from the last model itself.
    """

    quorum: Annotated[int, Field(ge=1)]
    deadline_s: Annotated[float, Field(gt=0, le=7 * 24 * 3600)] = 600.0
    secure_aggregation: bool = False
    spare: Annotated[int, Field(ge=0, le=10_000)] = 0
    averaging: Annotated[float, Field(ge=0, lt=1)] = 0.0


class StudyPlan(Contract):
    """Everything a study does, agreed by all before it starts.

    ``start`` is the digest of the weights the study begins with, trained beforehand on images the
    coordinator may use (``server.start``); without it they are drawn from ``seed``.

    With ``fingerprint`` the plan is a draft: sites tell what it asks of their images, and nothing
    is trained or evaluated under it. What follows from that is another plan.
    """

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    purpose: Purpose
    description: Annotated[str, Field(max_length=2000)] = ""
    coordinator: PublicKey
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1, max_length=1000)]
    expires: date
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    min_patients: Annotated[int, Field(ge=2)] = 10
    compare_alone: bool = False
    start: Digest | None = None
    task: Choice
    net: Choice
    imaging: tuple[Choice, ...] = ()
    strategy: Choice
    training: Training
    rounds: RoundTerms
    privacy: PrivacyTerms | None = None
    fingerprint: FingerprintTerms | None = None


class SignedPlan(NamedTuple):
    """A plan and the signature that stands in its file, if any."""

    plan: StudyPlan
    signature: Signature | None


def planned_events(plan: StudyPlan) -> tuple[PrivacyEvent, ...]:
    """Return what the whole plan will do to one site's cohort; empty without privacy terms.

    Training alone, where the plan compares with it, costs as much again: its metrics leave. Under
    a plan that asks for a fingerprint nothing else is done.
    """
    if plan.privacy is None:
        return ()
    if plan.fingerprint is not None:
        has_noise = plan.fingerprint.noise_multiplier is not None
        return (event_of_fingerprint(plan),) if has_noise else ()
    training = plan.training
    together = (training.num_rounds + plan.rounds.spare) * training.steps_per_round
    alone = training.num_rounds * training.steps_per_round
    events = (event_of(plan, steps=together), event_of(plan, steps=alone, purpose="alone"))
    return events if plan.compare_alone else events[:1]


def event_of(plan: StudyPlan, *, steps: int, purpose: Any = "train") -> PrivacyEvent:
    """Return the event of ``steps`` noisy steps under ``plan``; who trains alone adds all noise.

    Raises:
        ValueError: if the plan has no privacy terms.
    """
    if plan.privacy is None:
        raise ValueError("expected a plan with privacy terms")
    return PrivacyEvent(
        purpose=purpose,
        sample_rate=plan.training.sample_rate,
        noise_multiplier=plan.privacy.noise_multiplier,
        max_grad_norm=plan.privacy.max_grad_norm,
        images_per_patient=plan.training.images_per_patient,
        steps=steps,
        noise_shares=plan.privacy.noise_shares if purpose == "train" else 1,
    )


def fewest_honest(plan: StudyPlan) -> int:
    """Return how many sites must keep to secure aggregation's rules for it to hide any of them.

    The site that asks counts itself. Where the noise is split, they are those whose shares count.
    """
    return max(2, 1 if plan.privacy is None else plan.privacy.noise_shares)


def own_objections(plan: StudyPlan, *, today: date) -> Iterator[str]:
    """Yield what is wrong with a plan taken by itself, each as a sentence with its cure.

    Names of nets, tasks, steps and strategies are checked by ``allowlists.objections``.
    """
    if plan.expires < today:
        yield f"expires: the plan expired on {plan.expires}; propose a new one"
    if len(set(plan.sites)) != len(plan.sites):
        yield "sites: expected each site once"
    if plan.rounds.quorum > len(plan.sites):
        yield (
            f"rounds.quorum: expected at most the {len(plan.sites)} sites of the plan, "
            f"got {plan.rounds.quorum}"
        )
    yield from _terms_objections(plan)
    yield from fingerprint_objections(plan)
    if plan.privacy is not None:
        cost = epsilon(planned_events(plan), delta=plan.privacy.delta)
        if cost > plan.privacy.epsilon:
            yield (
                f"privacy.epsilon: the plan's steps and noise cost {cost:.4f} per patient at delta "
                f"{plan.privacy.delta:g}, over the {plan.privacy.epsilon:g} it states; raise "
                "noise_multiplier or plan fewer steps"
            )


def _terms_objections(plan: StudyPlan) -> Iterator[str]:
    rounds, training = plan.rounds, plan.training
    if rounds.secure_aggregation and rounds.quorum < 2:
        yield "rounds.quorum: expected at least 2 under secure_aggregation; one site hides nothing"
    if training.optimizer == "adam-bc" and plan.privacy is None:
        yield "training.optimizer: adam-bc corrects for noise; add privacy terms or choose adamw"
    dims = plan.net.params.get("spatial_dims", 2)
    if training.patch and len(training.patch) != dims:
        yield (
            f"training.patch: expected {dims} lengths, as many as the net has dimensions, "
            f"got {len(training.patch)}"
        )
    if not training.patch and (training.patches_per_image > 1 or training.patch_foreground):
        yield "training.patch: how patches are drawn is stated, but not their size; add it"
    if plan.privacy is None or plan.privacy.noise_shares == 1:
        return
    if not rounds.secure_aggregation:
        yield (
            "privacy.noise_shares: a split noise protects only sums; set "
            "rounds.secure_aggregation = true, or noise_shares = 1"
        )
    if plan.privacy.noise_shares > rounds.quorum:
        yield (
            f"privacy.noise_shares: expected at most the quorum of {rounds.quorum}, "
            f"got {plan.privacy.noise_shares}"
        )
    if training.personal:
        yield (
            "training.personal: layers that stay at a site have its share of the noise only, which "
            "protects sums; set noise_shares = 1, or keep no layers there"
        )
    if training.steps_per_round != 1 or training.optimizer != "sgd":
        yield (
            "privacy.noise_shares: what is summed must be one step's gradients; set "
            'training.steps_per_round = 1 and optimizer = "sgd"'
        )


def parse(text: str) -> SignedPlan:
    """Read a plan from TOML.

    Raises:
        DocumentError: with every objection at once; it never repeats a value.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DocumentError(f"the plan is not TOML: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(
            "the plan is not TOML that can be read: too deep or too long"
        ) from error
    signature = data.pop("signature", None)
    try:
        return SignedPlan(
            StudyPlan.model_validate(data),
            None if signature is None else Signature.model_validate(signature),
        )
    except ValidationError as error:
        raise DocumentError(sentences(error, model=StudyPlan)) from error


def read(file: Path) -> SignedPlan:
    """Read a plan file.

    Raises:
        DocumentError: if it is missing, not TOML or no plan, with every objection at once.
    """
    return parse(read_text(file))


def render(plan: StudyPlan, signature: Signature | None = None) -> str:
    """Return the plan's TOML, with its signature in the last table if given."""
    data = plan.model_dump(mode="json", exclude_none=True)
    data["expires"] = plan.expires
    if signature is not None:
        data["signature"] = signature.model_dump()
    return tomli_w.dumps(data)


def read_text(file: Path) -> str:
    """Read a UTF-8 text file, turning what can go wrong into one sentence."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DocumentError(f"there is no file {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"cannot read {file} as text: {type(error).__name__}") from error


def sentences(error: ValidationError, *, model: type[Contract]) -> list[str]:
    """Turn pydantic's objections into sentences that name the field and never the value."""
    lines = []
    for problem in error.errors(include_input=False, include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or model.__name__
        if problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(_fields_at(model, problem["loc"][:-1])))
            lines.append(f"{where}: unknown key; known here: {known}")
        else:
            lines.append(f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return lines


def _fields_at(model: type[Contract], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, Contract)]
        model = inner[0] if inner else model
    return list(model.model_fields)

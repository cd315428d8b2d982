"""The work itself: a study's images in, numbers out. Whether it may be done is decided elsewhere.

It is given no key and no path but the images', and knows neither ledger nor journal: it runs in a
process of its own (``worker.py``), or, at a rehearsal, in the one that asks.

Guarantees:
    A job is judged, prepared and trained the same in whichever process it is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import date
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from client.config import DataSettings, PerformanceSettings
from shared_models.contracts import (
    Contract,
    Count,
    Digest,
    Evaluation,
    NonNegative,
    Positive,
    SiteName,
)
from shared_models.plan import StudyPlan
from shared_models.weights import (
    Array,
    Flat,
    Schema,
    Stored,
    Weights,
    unpacked,
)

log = logging.getLogger(__name__)

Step = Literal["judge", "prepare", "evaluate", "train", "alone"]


class Job(Contract):
    """One thing to do for a study.

    ``judge``: say what is wrong with the plan, and its net's tensors; no image is read for that.
    ``prepare``: read the patients and count them. The rest as in an order, with weights beside it.
    ``round_`` and ``noise_multiplier`` are for training; ``today`` is for judging.
    A worker that takes longer than ``limit_s`` is ended.
    """

    step: Step
    study: Digest
    plan: StudyPlan
    site: SiteName
    data: DataSettings
    performance: PerformanceSettings
    plugins: tuple[str, ...] = ()
    today: date
    round_: Count = 0
    noise_multiplier: NonNegative = 0.0
    limit_s: Positive = 3600.0


class Cohort(Contract):
    """How many patients there are, and whether they meet inside the plan's net."""

    num_patients: Count
    num_test_patients: Count
    num_test_images: Count
    is_mixed: bool


class Outcome(Contract):
    """What came of a job; an update's numbers stand beside it, flat."""

    objections: tuple[str, ...] = ()
    tensors: tuple[tuple[str, tuple[Annotated[int, Field(ge=0)], ...]], ...] = ()
    cohort: Cohort | None = None
    loss: float | None = None
    evaluation: Evaluation | None = None


#: Does a job; the bytes of weights go in beside it, an update comes out.
Trainer = Callable[[Job, Flat | None], tuple[Outcome, Array | None]]


class Ready(NamedTuple):
    """A study made ready: its task, its patients by split, its net's schema, and their count."""

    task: Any
    patients: Any
    schema: Schema
    cohort: Cohort


class Bench:
    """Does jobs in this process; a study's images are read once."""

    def __init__(self) -> None:
        self.studies: dict[str, Ready] = {}

    def __call__(self, job: Job, weights: Flat | None) -> tuple[Outcome, Array | None]:
        """Do ``job``.

        Raises:
            DataError: if the site's images or labels cannot be used.
            ValueError: if the weights are not of the plan's net.
        """
        import torch

        torch.set_num_threads(job.performance.threads)
        if job.step == "judge":
            return _judged(job), None
        if job.study not in self.studies:
            self.studies[job.study] = _read(job)
        study = self.studies[job.study]
        if job.step == "prepare":
            return Outcome(cohort=study.cohort), None
        if weights is None:
            raise ValueError(f"expected weights to {job.step} from, got none")
        return _done(job, weights, study)


def device_of(performance: PerformanceSettings) -> str:
    """Return the torch device the settings mean on this machine."""
    import torch

    wanted = performance.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def warm_up() -> None:
    """Import what training needs once, before the first job."""
    import opacus  # noqa: F401
    from monai.networks.nets import densenet, unet  # noqa: F401

    from client import train  # noqa: F401
    from shared_models import allowlists, cohort, evaluation  # noqa: F401


def _judged(job: Job) -> Outcome:
    from shared_models.allowlists import objections
    from shared_models.nets.base import schema_of

    found = objections(job.plan, today=job.today, plugins=job.plugins)
    if found:
        return Outcome(objections=tuple(found))
    return Outcome(tensors=schema_of(_net(job, _task(job))))


def _read(job: Job) -> Ready:
    """Read the site's patients and find out whether they can be trained on."""
    import torch

    from client.probe import mixes_images
    from shared_models import cohort
    from shared_models.nets.base import schema_of

    task = _task(job)
    patients = cohort.load(
        job.data.manifest,
        root=job.data.root,
        plan=job.plan,
        task=task,
        splits=("train", "test"),
        plugins=job.plugins,
    )
    train, test = patients["train"], patients["test"]
    net = _net(job, task)
    first = [patient.images[:1] for patient in train[:2]]
    is_private = job.plan.privacy is not None
    return Ready(
        task,
        patients,
        schema_of(net),
        Cohort(
            num_patients=len(train),
            num_test_patients=len(test),
            num_test_images=sum(len(patient.images) for patient in test),
            is_mixed=is_private and len(first) > 1 and mixes_images(net, torch.cat(first)),
        ),
    )


def _done(job: Job, weights: Flat, study: Ready) -> tuple[Outcome, Array | None]:
    """Evaluate, train, or train alone, from ``weights``."""
    from shared_models.evaluation import evaluate

    device = device_of(job.performance)
    given = unpacked(weights, study.schema)
    net = _net(job, study.task, given)
    test = study.patients["test"]
    if job.step == "train":
        evaluation = evaluate(net, test, task=study.task, device=device)
        loss = _train(net, job, study, [job.round_])
        return Outcome(cohort=study.cohort, loss=loss, evaluation=evaluation), _moved(net, given)
    loss = None
    if job.step == "alone":
        loss = _train(net, job, study, range(job.plan.training.num_rounds))
    evaluation = evaluate(net, test, task=study.task, device=device, with_intervals=True)
    return Outcome(cohort=study.cohort, loss=loss, evaluation=evaluation), None


def _moved(net: Any, given: Stored) -> Array:
    """Return how far each weight of ``net`` is from where it was, as one vector."""
    from shared_models.nets.base import weight_of

    update = np.empty(given.flat.size // 4, np.float32)
    state, start = net.state_dict(), 0
    for name in given:
        difference = weight_of(state.pop(name)) - given[name]
        update[start : start + difference.size] = difference.ravel()
        start += difference.size
    return update


def _train(net: Any, job: Job, study: Ready, rounds: Sequence[int]) -> float | None:
    """Train ``net`` in place and return the loss, if it may be told: it is not noised."""
    from client.train import Performance, randomness_of, train

    settings = job.performance
    trained = train(
        net,
        study.patients["train"],
        plan=job.plan,
        task=study.task,
        rounds=rounds,
        randomness=randomness_of(job.plan, site=job.site, round_=rounds[0], purpose=job.step),
        noise_multiplier=job.noise_multiplier,
        performance=Performance(
            device=device_of(settings),
            autocast=settings.autocast,
            most_images=settings.most_images,
            engine=settings.engine,
        ),
    )
    if trained.num_non_finite:
        log.warning("round %d: some patients' gradients were not finite, left out", rounds[-1])
    return trained.loss if job.plan.privacy is None else None


def _task(job: Job) -> Any:
    from shared_models import tasks
    from shared_models.registry import find

    choice = job.plan.task
    return find("tasks", choice.name, builtin=tasks.BUILTIN, plugins=job.plugins)(**choice.params)


def _net(job: Job, task: Any, weights: Weights | None = None) -> Any:
    """Return the plan's net with ``weights``, or as it is drawn."""
    from shared_models import nets

    given = {"num_outputs": task.num_outputs, "plugins": job.plugins}
    if weights is None:
        return nets.make(job.plan.net.name, job.plan.net.params, seed=0, **given)
    return nets.filled(job.plan.net.name, job.plan.net.params, weights, **given)

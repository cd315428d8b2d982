"""The work itself: a study's images in, numbers out. Whether it may be done is decided elsewhere.

It is given no key and no path but the images', and knows neither ledger nor journal: it runs in a
process of its own (``worker.py``), or, at a rehearsal, in the one that asks.

Guarantees:
    A job is judged, prepared and trained the same in whichever process it is done, and whether
    prepared images are kept or not.
    An image is prepared once: a second round, and a second process, find it prepared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from client import mapping
from client.config import CacheSettings, DataSettings, PerformanceSettings
from shared_models.contracts import (
    Contract,
    Count,
    Digest,
    Evaluation,
    Fingerprint,
    NonNegative,
    Positive,
    SiteName,
)
from shared_models.errors import DocumentError
from shared_models.plan import StudyPlan
from shared_models.weights import (
    Array,
    Flat,
    Schema,
    Stored,
    Weights,
    unpacked,
)

if TYPE_CHECKING:
    from shared_models.cohort import Prepare

log = logging.getLogger(__name__)

Step = Literal["judge", "prepare", "evaluate", "train", "alone", "measure", "fingerprint"]


class Job(Contract):
    """One thing to do for a study.

    ``judge``: say what is wrong with the plan, and its net's tensors; no image is read for that.
    ``prepare``: read the patients and count them; ``measure`` does so for a ``fingerprint``, which
    then tells what was measured. The rest as in an order, with weights beside it.
    ``round_`` and ``noise_multiplier`` are for what is trained or told; ``today`` is for judging,
    and ``min_cell`` for a fingerprint without noise. ``labels`` are what labels here are called in
    plans; with a ``cache`` prepared images are kept there.
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
    min_cell: Count = 0
    limit_s: Positive = 3600.0
    labels: mapping.Pairs = ()
    cache: CacheSettings | None = None


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
    fingerprint: Fingerprint | None = None


#: Does a job; the bytes of weights go in beside it, an update comes out.
Trainer = Callable[[Job, Flat | None], tuple[Outcome, Array | None]]


class Ready(NamedTuple):
    """A study made ready: its task, its patients by split, its net's schema, and their count."""

    task: Any
    patients: Any
    schema: Schema
    cohort: Cohort
    labels: mapping.Pairs


class Bench:
    """Does jobs in this process; a study's images are read once."""

    def __init__(self) -> None:
        self.studies: dict[str, Ready] = {}
        self.measured: dict[str, list[Any]] = {}

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
        if job.step in ("measure", "fingerprint"):
            if job.study not in self.measured:
                self.measured[job.study] = _measured(job)
            return _told(job, self.measured[job.study]), None
        study = self.studies.get(job.study)
        if study is None or study.labels != job.labels:
            study = self.studies[job.study] = _read(job)
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
    from client.patches import foreground_of
    from client.probe import mixes_images
    from client.train import shown
    from shared_models import cohort
    from shared_models.nets.base import schema_of

    task = mapping.applied(_task(job), job.plan, job.labels)
    with _kept(job) as prepare:
        patients = cohort.load(
            job.data.manifest,
            root=job.data.root,
            plan=job.plan,
            task=task,
            splits=("train", "test"),
            plugins=job.plugins,
            prepare=prepare,
            foreground=foreground_of,
        )
    train, test = patients["train"], patients["test"]
    net = _net(job, task)
    is_mixed = job.plan.privacy is not None and len(train) > 1
    if is_mixed:
        is_mixed = mixes_images(net, shown(train[:2], plan=job.plan, task=task))
    return Ready(
        task,
        patients,
        schema_of(net),
        Cohort(
            num_patients=len(train),
            num_test_patients=len(test),
            num_test_images=sum(len(patient.images) for patient in test),
            is_mixed=is_mixed,
        ),
        job.labels,
    )


def _measured(job: Job) -> list[Any]:
    """Measure the site's training patients for a fingerprint."""
    from client.fingerprint import measure

    return measure(
        job.data.manifest,
        root=job.data.root,
        plan=job.plan,
        task=mapping.applied(_task(job), job.plan, job.labels),
        plugins=job.plugins,
    )


def _told(job: Job, patients: list[Any]) -> Outcome:
    """Count the patients measured, and tell their fingerprint if that is the job."""
    from client.fingerprint import told

    cohort = Cohort(
        num_patients=len(patients), num_test_patients=0, num_test_images=0, is_mixed=False
    )
    if job.step == "measure":
        return Outcome(cohort=cohort)
    found = told(patients, job.plan, noise_multiplier=job.noise_multiplier, min_cell=job.min_cell)
    return Outcome(cohort=cohort, fingerprint=found)


@contextmanager
def _kept(job: Job) -> Iterator[Prepare | None]:
    """Yield what prepares images and keeps them, None if it cannot: that costs time only."""
    from client import cache as caches
    from shared_models.cohort import steps_of

    settings = job.cache
    if settings is None or not settings.most_gb:
        yield None
        return
    try:
        kept = caches.open_cache(settings.folder, most_gb=settings.most_gb)
    except DocumentError:
        log.warning("the cache cannot be used; images are prepared anew. See [cache] in site.toml")
        yield None
        return
    yield caches.preparer(kept, steps_of(job.plan), plugins=job.plugins)
    caches.trim(kept)


def _done(job: Job, weights: Flat, study: Ready) -> tuple[Outcome, Array | None]:
    """Evaluate, train, or train alone, from ``weights``."""
    from shared_models.evaluation import evaluate

    device = device_of(job.performance)
    given = unpacked(weights, study.schema)
    net = _net(job, study.task, given)
    test, window = study.patients["test"], job.plan.training.patch
    if job.step == "train":
        evaluation = evaluate(net, test, task=study.task, device=device, window=window)
        loss = _train(net, job, study, [job.round_])
        return Outcome(cohort=study.cohort, loss=loss, evaluation=evaluation), _moved(net, given)
    loss = None
    if job.step == "alone":
        loss = _train(net, job, study, range(job.plan.training.num_rounds))
    evaluation = evaluate(
        net, test, task=study.task, device=device, with_intervals=True, window=window
    )
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

"""Metrics over patients, with bootstrap intervals that resample patients and never images.

Used by sites on their test patients and by the coordinator on its own.

References:
    Efron and Tibshirani 1993, An introduction to the bootstrap, chapter 13 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor, nn

from shared_models.cohort import Patient, encoded
from shared_models.contracts import Evaluation
from shared_models.randomness import seeded
from shared_models.tasks import Task
from shared_models.tasks.base import Scores

NUM_RESAMPLES = 200
MOST_IMAGES = 64


def evaluate(
    net: nn.Module,
    patients: Sequence[Patient],
    *,
    task: Task,
    device: str = "cpu",
    with_intervals: bool = False,
    window: Sequence[int] = (),
) -> Evaluation:
    """Return the metrics of ``net`` on ``patients``; they are rounded to four decimals.

    With ``window``, ([z,] y, x), the net sees that much of an image at a time (``slide``).
    """
    scores = [
        score_patient(net, patient, task=task, number=number, device=device, window=window)
        for number, patient in enumerate(patients)
    ]
    return summarize(scores, task=task, with_intervals=with_intervals)


def evaluate_baselines(patients: Sequence[Patient], *, task: Task) -> dict[str, Evaluation]:
    """Return what each of the task's baselines, which need no training, reaches on ``patients``."""
    return {
        name: summarize(
            [_scores(seen(p, n, task=task), task, run) for n, p in enumerate(patients)],
            task=task,
            with_intervals=True,
        )
        for name, run in task.baselines.items()
    }


def summarize(scores: Sequence[Scores], *, task: Task, with_intervals: bool) -> Evaluation:
    """Turn the scores of each patient, (images, columns), into metrics."""
    if not scores:
        return Evaluation(metrics={}, num_patients=0, num_images=0)
    pooled = np.concatenate(scores)
    return Evaluation(
        metrics=_rounded(task.metrics(pooled)),
        intervals=_intervals(scores, task=task) if with_intervals else {},
        num_patients=len(scores),
        num_images=len(pooled),
    )


@torch.no_grad()
def score_patient(
    net: nn.Module,
    patient: Patient,
    *,
    task: Task,
    number: int = 0,
    device: str = "cpu",
    window: Sequence[int] = (),
) -> Scores:
    """Return the task's scores of the images of patient ``number``: float64 (images, columns)."""
    net.to(device).eval()

    def run(inputs: Tensor) -> Tensor:
        return task.run(net, inputs.to(device)).cpu()

    whole = partial(slide, run, window=window) if window else run
    return _scores(seen(patient, number, task=task), task, whole)


def slide(run: Callable[[Tensor], Tensor], inputs: Tensor, *, window: Sequence[int]) -> Tensor:
    """Return what ``run`` answers on images too large for it: the mean over overlapping windows.

    Each window counts most in its middle; neighbours share half of theirs.

    Args:
        run: (n, channel, *window) to (n, output, *window).
        inputs: (n, channel, [z,] y, x), at least as large as the window.
        window: its size, ([z,] y, x).
    """
    places = [_places(long, short) for long, short in zip(inputs.shape[2:], window, strict=True)]
    weight = torch.ones(tuple(window))
    for axis, short in enumerate(window):
        tent = 1 - (torch.linspace(-1, 1, short + 2)[1:-1]).abs()
        weight = weight * tent.reshape(-1, *(1 for _ in window[axis + 1 :]))
    total, weights = torch.zeros(0), torch.zeros(tuple(inputs.shape[2:]))
    for begin in product(*places):
        inside = (slice(b, b + short) for b, short in zip(begin, window, strict=True))
        where: tuple[EllipsisType | slice, ...] = (..., *inside)
        answer = run(inputs[where])
        if not total.numel():
            total = answer.new_zeros((*answer.shape[:2], *inputs.shape[2:]))
        total[where] += answer * weight
        weights[where] += weight
    return total / weights


def _places(long: int, short: int) -> list[int]:
    """Return where windows begin along an axis: at most half a window apart, the ends included."""
    steps = -(-(long - short) // max(1, short // 2))
    return [round(step * (long - short) / steps) for step in range(steps + 1)] if steps else [0]


def seen(patient: Patient, number: int, *, task: Task) -> Patient:
    """Return a patient as the task tests on them: the same each time, by the patient's number."""
    views = [
        task.view(image, encoded(target, task), seeded("evaluation", number, index), False)
        for index, (image, target) in enumerate(zip(patient.images, patient.targets, strict=True))
    ]
    inputs, targets = (torch.stack(part) for part in zip(*views, strict=True))
    return Patient(inputs, targets, patient.spacing_mm)


@torch.no_grad()
def _scores(patient: Patient, task: Task, run: Callable[[Tensor], Tensor]) -> Scores:
    return np.concatenate(
        [
            task.score(run(inputs).cpu(), targets, spacing)
            for inputs, targets, spacing in _parts(patient)
        ]
    )


def _parts(patient: Patient) -> Iterator[tuple[Tensor, Tensor, tuple[float, ...]]]:
    """Cut a patient into runs of images with one spacing, at most 64 images each."""
    start = 0
    for end in range(1, len(patient.images) + 1):
        is_last = end == len(patient.images)
        if (
            is_last
            or end - start == MOST_IMAGES
            or patient.spacing_mm[end] != patient.spacing_mm[start]
        ):
            yield patient.images[start:end], patient.targets[start:end], patient.spacing_mm[start]
            start = end


def _intervals(scores: Sequence[Scores], *, task: Task) -> dict[str, tuple[float, float]]:
    generator = np.random.Generator(np.random.PCG64(0))
    draws: dict[str, list[float]] = {}
    for _ in range(NUM_RESAMPLES):
        chosen = generator.integers(0, len(scores), len(scores))
        for name, value in task.metrics(np.concatenate([scores[i] for i in chosen])).items():
            draws.setdefault(name, []).append(value)
    bounds = {name: np.percentile(values, (2.5, 97.5)) for name, values in draws.items()}
    return {
        name: (round(float(low), 4), round(float(high), 4)) for name, (low, high) in bounds.items()
    }


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in metrics.items() if np.isfinite(value)}

"""Metrics over patients, and intervals that resample patients and never images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from torch import nn

from shared_models.cohort import Patient
from shared_models.evaluation import evaluate, score_patient, slide, summarize
from shared_models.tasks import Task
from shared_models.tasks.base import Scores
from shared_models.tasks.classification import make as make_classification
from shared_models.tasks.segmentation import make as make_segmentation

TASK = make_classification(classes=["clear", "opaque"])


class Sure(nn.Module):
    """Is as sure of the second class as the image's first pixel says."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = images.flatten(1)[:, 0]
        return torch.stack([-first, first], dim=1)


def patient(values: list[float], label: int, *, spacing: tuple[float, ...] = (1.0, 1.0)) -> Patient:
    images = torch.tensor(values).float()[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    return Patient(images, torch.full((len(values),), label), (spacing,) * len(values))


def mean_task(task: Task) -> Task:
    """Return the task with one metric that can be computed again: the mean of the first column."""
    return task._replace(metrics=lambda scores: {"share": float(scores[:, 0].mean())})


def scores_of(*values: list[float]) -> list[Scores]:
    return [np.array(each, float)[:, None] for each in values]


def test_metrics_pool_the_images_of_all_patients() -> None:
    found = evaluate(Sure(), [patient([2.0, -1.0], 1), patient([-2.0], 0)], task=TASK)
    assert found.metrics == {
        "auc": 1.0,
        "accuracy": 0.6667,
        "sensitivity": 0.5,
        "specificity": 1.0,
    }
    assert (found.num_patients, found.num_images) == (2, 3)
    assert found.intervals == {}


@pytest.mark.parametrize("task", [TASK, make_segmentation(classes=["a"])])
def test_no_patients_give_no_metrics(task: Task) -> None:
    found = evaluate(Sure(), [], task=task, with_intervals=True)
    assert (found.metrics, found.intervals) == ({}, {})
    assert (found.num_patients, found.num_images) == (0, 0)


def test_a_metric_that_cannot_be_computed_is_absent() -> None:
    task = TASK._replace(metrics=lambda _: {"auc": float("nan"), "accuracy": 0.123456})
    assert summarize(scores_of([1.0]), task=task, with_intervals=False).metrics == {
        "accuracy": 0.1235
    }


def test_evaluation_keeps_no_gradients_and_sets_the_net_to_evaluation() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    first = evaluate(net, [patient([1.0, 2.0], 1), patient([0.0], 0)], task=TASK)
    assert not net.training
    assert first == evaluate(net, [patient([1.0, 2.0], 1), patient([0.0], 0)], task=TASK)
    assert net[2].weight.grad is None


class Watched:
    """Counts what the task is asked to score."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[float, ...]]] = []

    def __call__(
        self, outputs: torch.Tensor, targets: torch.Tensor, spacing_mm: tuple[float, ...]
    ) -> Scores:
        self.seen.append((len(outputs), spacing_mm))
        return np.asarray(targets[:, None].double().numpy())


def test_images_are_scored_with_their_own_spacing() -> None:
    watched = Watched()
    spacings = ((1.0, 1.0), (1.0, 1.0), (2.0, 2.0), (1.0, 1.0))
    many = Patient(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 3]), spacings)
    scores = score_patient(Sure(), many, task=TASK._replace(score=watched))
    assert watched.seen == [(2, (1.0, 1.0)), (1, (2.0, 2.0)), (1, (1.0, 1.0))]
    assert scores[:, 0].tolist() == [0, 1, 2, 3]


def test_at_most_sixty_four_images_are_scored_at_once() -> None:
    watched = Watched()
    many = Patient(torch.zeros(150, 1, 2, 2), torch.arange(150), ((1.0, 1.0),) * 150)
    scores = score_patient(Sure(), many, task=TASK._replace(score=watched))
    assert [count for count, _ in watched.seen] == [64, 64, 22]
    assert scores[:, 0].tolist() == list(range(150))


def test_intervals_are_those_of_scipys_percentile_bootstrap() -> None:
    generator = np.random.default_rng(3)
    values = generator.normal(0.7, 0.1, 80)
    scores = scores_of(*[[v] for v in values])
    found = summarize(scores, task=mean_task(TASK), with_intervals=True)
    theirs = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = found.intervals["share"]
    assert low == pytest.approx(theirs.low, abs=0.006)
    assert high == pytest.approx(theirs.high, abs=0.006)
    assert low < found.metrics["share"] < high


def test_intervals_resample_patients_and_never_images() -> None:
    """A hundred images each of two patients are two observations, not two hundred."""
    two = scores_of([0.0] * 100, [1.0] * 100)
    found = summarize(two, task=mean_task(TASK), with_intervals=True)
    assert found.intervals["share"] == (0.0, 1.0)
    apart = scores_of(*[[0.0]] * 100, *[[1.0]] * 100)
    low, high = summarize(apart, task=mean_task(TASK), with_intervals=True).intervals["share"]
    assert 0.4 < low < high < 0.6


def test_one_patient_is_no_interval_but_a_point() -> None:
    found = summarize(scores_of([0.2, 0.4]), task=mean_task(TASK), with_intervals=True)
    assert found.intervals["share"] == (0.3, 0.3)


def test_the_same_scores_give_the_same_intervals() -> None:
    scores = scores_of(*[[v / 10] for v in range(10)])
    first, second = (summarize(scores, task=mean_task(TASK), with_intervals=True) for _ in range(2))
    assert first == second


def test_a_resample_without_a_metric_leaves_it_out_of_the_interval() -> None:
    """With one opaque patient of four, some resamples have none and no AUC."""
    patients = [patient([1.0], 1), *[patient([-1.0], 0)] * 3]
    found = evaluate(Sure(), patients, task=TASK, with_intervals=True)
    assert found.intervals["auc"] == (1.0, 1.0)


@pytest.mark.parametrize("window", [(4, 6, 5), (9, 7, 8), (3, 4, 8)])
def test_windows_together_answer_as_the_whole_does_where_neighbours_do_not_matter(
    window: tuple[int, ...],
) -> None:
    images, sizes = torch.randn(2, 1, 9, 7, 8), set[tuple[int, ...]]()

    def run(inputs: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(inputs.shape[2:]))
        return torch.cat([inputs, 2 * inputs], dim=1)

    found = slide(run, images, window=window)
    assert sizes == {window}
    assert torch.allclose(found, torch.cat([images, 2 * images], dim=1), atol=1e-5)


def test_windows_that_disagree_are_averaged_most_by_whoever_is_in_the_middle() -> None:
    answers = iter((0.0, 1.0))
    found = slide(lambda x: torch.full_like(x, next(answers)), torch.zeros(1, 1, 6), window=(4,))
    assert found[0, 0].tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1])

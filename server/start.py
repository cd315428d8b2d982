"""Where a study begins: weights drawn from its seed, or trained on the coordinator's own images.

A warm start is plain training, without privacy, on images the coordinator may use for it. It costs
no hospital's patient anything and covers none of the coordinator's; the report says so.

Design: a loop of a few lines here and not ``client.train``, for the coordinator's rooms import
nothing of the hospital's, and nothing here is private.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from shared_models import cohort, nets, tasks
from shared_models.cohort import Patient
from shared_models.contracts import Contract, Positive
from shared_models.errors import DocumentError
from shared_models.nets.base import load_weights, weights_of
from shared_models.plan import StudyPlan
from shared_models.randomness import seeded
from shared_models.registry import find
from shared_models.tasks import Task
from shared_models.weights import Array, Weights, digest, load, packed, save

FILE = "start.safetensors"


class StartTerms(Contract):
    """How a warm start is trained: AdamW, its rate falling to 0 along a cosine."""

    steps: Annotated[int, Field(ge=1)] = 200
    learning_rate: Positive = 0.003
    batch_size: Annotated[int, Field(ge=1)] = 48


def drawn(plan: StudyPlan, task: Task) -> dict[str, Array]:
    """Return the weights that the plan's seed alone gives."""
    net = nets.make(plan.net.name, plan.net.params, seed=plan.seed, num_outputs=task.num_outputs)
    return weights_of(net)


def warmed(
    plan: StudyPlan, manifest: Path, *, root: Path, run_dir: Path, terms: StartTerms
) -> tuple[StudyPlan, int]:
    """Train a start on the images of ``manifest``, keep it in ``run_dir`` and state it in the plan.

    Returns:
        The plan with the start's digest, and the number of patients it was trained on.

    Raises:
        DataError: if the images cannot be used, with every objection at once.
        DocumentError: if the plan trains on patches.
    """
    if plan.training.patch:
        raise DocumentError(
            "a warm start trains on whole images, and the plan on patches; start it from its seed"
        )
    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN)(**plan.task.params)
    cohorts = cohort.load(manifest, root=root, plan=plan, task=task)
    patients = [patient for split in cohorts.values() for patient in split]
    weights = trained(plan, task, patients, terms=terms)
    run_dir.mkdir(parents=True, exist_ok=True)
    save(run_dir / FILE, weights)
    return plan.model_copy(update={"start": digest(packed(weights))}), len(patients)


def trained(
    plan: StudyPlan, task: Task, patients: Sequence[Patient], *, terms: StartTerms
) -> dict[str, Array]:
    """Return the seed's weights trained further on ``patients``, the same for the same seed.

    A step takes one image of each of ``batch_size`` patients.

    Raises:
        ValueError: if there are no patients.
    """
    if not patients:
        raise ValueError("expected patients to train the start on, got none")
    net = nets.make(plan.net.name, plan.net.params, seed=plan.seed, num_outputs=task.num_outputs)
    load_weights(net, drawn(plan, task))
    optimizer = torch.optim.AdamW(net.parameters(), lr=terms.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, terms.steps)
    random, randomness = np.random.default_rng(plan.seed), seeded(plan.seed, "start")
    net.train()
    for _ in range(terms.steps):
        chosen = random.choice(len(patients), min(terms.batch_size, len(patients)), replace=False)
        pairs = [(patients[i], int(random.integers(len(patients[i].images)))) for i in chosen]
        views = [task.view(p.images[n], p.targets[n], randomness, True) for p, n in pairs]
        images, targets = (torch.stack(part) for part in zip(*views, strict=True))
        warm = task.warm or _own_loss(task)
        loss = warm(net, images, targets).mean()
        if task.free is not None:
            loss = loss + task.free.loss(net, randomness)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return weights_of(net)


def _own_loss(task: Task) -> Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda net, images, targets: task.loss(net(images), targets)


def initial_weights(plan: StudyPlan, task: Task, run_dir: Path) -> Weights:
    """Return the weights the study begins with.

    Raises:
        DocumentError: if the plan states a warm start and the run directory holds another, or none.
    """
    if plan.start is None:
        return drawn(plan, task)
    try:
        weights = load(run_dir / FILE)
    except (OSError, ValueError) as error:
        raise DocumentError(
            f"the plan begins with weights that {run_dir / FILE} should hold; put them there"
        ) from error
    if digest(packed(weights)) != plan.start:
        raise DocumentError(f"{run_dir / FILE} is not the start that the plan states by its digest")
    return weights

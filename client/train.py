"""Local training: patients in, trained weights out.

One optimizer step draws every patient independently with the plan's sample rate (Poisson) and a
capped number of images of each. With privacy terms, draws and noise come from the operating
system's entropy and nobody, the coordinator included, can replay them; without, both come from the
plan's seed and the same plan gives the same weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import cos, pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from client.bookkeeping import bookkeeping_engine
from client.dp import (
    Batch,
    Engine,
    GradientOf,
    Sums,
    add_noise,
    opacus_engine,
    plain_engine,
    trainable,
)
from client.noise import Randomness, secure, seeded
from shared_models.cohort import Patient
from shared_models.plan import PrivacyTerms, StudyPlan, Training
from shared_models.tasks import Task

#: Equal up to rounding: each is held to a plain loop over patients by its tests.
ENGINES: dict[str, Engine] = {"opacus": opacus_engine, "bookkeeping": bookkeeping_engine}


class Performance(NamedTuple):
    """How fast, never what: none of these may change the ledger or what is private.

    ``device`` is a torch device; ``autocast`` uses bfloat16 there; ``most_images`` bounds the
    images in one forward pass; ``engine`` is one of ``ENGINES``.
    """

    device: str = "cpu"
    autocast: bool = False
    most_images: int = 32
    engine: str = "opacus"


class Trained(NamedTuple):
    """The mean loss over the steps, and how many patients' gradients were not finite."""

    loss: float
    num_non_finite: int


def train(
    net: nn.Module,
    patients: Sequence[Patient],
    *,
    plan: StudyPlan,
    task: Task,
    round_: int,
    randomness: Randomness,
    performance: Performance,
) -> Trained:
    """Train ``net`` in place for one round of ``plan``, with an optimizer made anew.

    Guarantees:
        Under privacy terms a buffer that training changed stops the round: nothing noised it.

    Raises:
        ValueError: if a buffer changed under privacy terms, or the engine refuses the net.
    """
    net.to(performance.device).train()
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    optimizer = _optimizer(net, plan.training, learning_rate(plan.training, round_))
    anchor = [p.detach().clone() for p in trainable(net)]
    losses, num_non_finite = [], 0
    with _engine(net, task, plan.privacy, performance) as gradient_of:
        for _ in range(plan.training.steps_per_round):
            batch = draw(patients, terms=plan.training, randomness=randomness)
            sums = gradient_of(_moved(batch, performance.device))
            gradients = _mean(sums.gradients, batch, plan, len(patients), randomness)
            _step(net, optimizer, gradients, anchor, plan.training.proximal_mu)
            num_non_finite += sums.num_non_finite
            if batch.num_patients:
                losses.append(sums.loss)
    changed = [n for n, b in net.named_buffers() if n not in buffers or not b.equal(buffers[n])]
    if plan.privacy is not None and changed:
        raise ValueError(
            f"expected buffers that training leaves alone, not {', '.join(changed[:5])}"
        )
    return Trained(float(np.mean(losses)) if losses else 0.0, num_non_finite)


def randomness_of(plan: StudyPlan, *, site: str, round_: int, purpose: str) -> Randomness:
    """Return secure randomness under privacy terms, else that of the plan's seed and the round."""
    if plan.privacy is not None:
        return secure()
    return seeded(plan.seed, site, round_, purpose)


def learning_rate(terms: Training, round_: int) -> float:
    """Return the round's learning rate: a cosine from first to last round, or constant."""
    end = terms.learning_rate_end
    if end is None or terms.num_rounds == 1:
        return terms.learning_rate
    share = (1 + cos(pi * round_ / (terms.num_rounds - 1))) / 2
    return end + (terms.learning_rate - end) * share


def draw(patients: Sequence[Patient], *, terms: Training, randomness: Randomness) -> Batch:
    """Draw each patient with probability ``sample_rate``, and at most the cap of their images.

    Guarantees:
        Patients are drawn independently of each other.
        No patient gives more images than images_per_patient.
    """
    drawn = np.flatnonzero(randomness.uniform(len(patients)) < terms.sample_rate)
    images, targets, owner = [], [], []
    for position, index in enumerate(drawn.tolist()):
        patient = patients[index]
        order = np.argsort(randomness.uniform(len(patient.images)))[: terms.images_per_patient]
        images.append(patient.images[order])
        targets.append(patient.targets[order])
        owner.extend([position] * len(order))
    if not images:
        return Batch(patients[0].images[:0], patients[0].targets[:0], torch.zeros(0).long(), 0)
    stacked, truth = torch.cat(images), torch.cat(targets)
    if terms.flips and randomness.uniform(1)[0] < 0.5:
        stacked = stacked.flip(-1)
        truth = truth.flip(-1) if truth.ndim > 1 else truth
    return Batch(stacked, truth, torch.tensor(owner), len(drawn))


@contextmanager
def _engine(
    net: nn.Module, task: Task, privacy: PrivacyTerms | None, performance: Performance
) -> Iterator[GradientOf]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return task.loss(outputs.float(), targets)

    engine = plain_engine if privacy is None else ENGINES[performance.engine]
    norm = None if privacy is None else privacy.max_grad_norm
    kind = torch.device(performance.device).type
    with engine(net, loss, max_grad_norm=norm, most_images=performance.most_images) as gradient_of:

        def in_precision(batch: Batch) -> Sums:
            # Opened anew for each step: autocast keeps its copies of the weights until it closes.
            with torch.autocast(kind, torch.bfloat16, enabled=performance.autocast):
                return gradient_of(batch)

        yield in_precision


def _mean(
    sums: list[Tensor], batch: Batch, plan: StudyPlan, num_patients: int, randomness: Randomness
) -> list[Tensor]:
    """Return the gradient to step along: noisy and over the expected batch, if private."""
    if plan.privacy is None:
        return [total / max(batch.num_patients, 1) for total in sums]
    noisy = add_noise(
        sums,
        noise_multiplier=plan.privacy.noise_multiplier,
        max_grad_norm=plan.privacy.max_grad_norm,
        randomness=randomness,
    )
    expected = plan.training.sample_rate * num_patients
    return [total / expected for total in noisy]


def _step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: list[Tensor],
    anchor: list[Tensor],
    proximal_mu: float,
) -> None:
    for parameter, gradient, start in zip(trainable(net), gradients, anchor, strict=True):
        parameter.grad = gradient
        if proximal_mu:
            parameter.grad = gradient + proximal_mu * (parameter.detach() - start)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(net: nn.Module, terms: Training, rate: float) -> torch.optim.Optimizer:
    if terms.optimizer == "sgd":
        return torch.optim.SGD(
            trainable(net), lr=rate, momentum=terms.momentum, weight_decay=terms.weight_decay
        )
    return torch.optim.AdamW(trainable(net), lr=rate, weight_decay=terms.weight_decay)


def _moved(batch: Batch, device: str) -> Batch:
    return Batch(
        batch.images.to(device),
        batch.targets.to(device),
        batch.owner.to(device),
        batch.num_patients,
    )

"""Local training: patients in, trained weights out.

One optimizer step draws every patient independently with the plan's sample rate (Poisson) and a
capped number of images of each. With privacy terms, draws and noise come from the operating
system's entropy and nobody, the coordinator included, can replay them; without, both come from the
plan's seed and the same plan gives the same weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import cos, pi
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from client.adam import AdamCorrected
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
from client.noise import secure
from client.patches import corner, cut
from shared_models.cohort import Patient, encoded
from shared_models.plan import PrivacyTerms, StudyPlan, Training
from shared_models.randomness import Randomness, seeded
from shared_models.tasks import Free, Task, as_it_is, moved_map

View = Callable[[Tensor, Tensor, Randomness, bool], tuple[Tensor, Tensor]]
Moved = Callable[[Tensor, bool, tuple[int, ...], tuple[int, ...]], Tensor]
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
    engine: str = "bookkeeping"


class Trained(NamedTuple):
    """The mean loss over the last round's steps, and how many patients were not finite."""

    loss: float
    num_non_finite: int


class FreeStep:
    """A task's loss that sees no patient, and the parameters that it alone trains.

    While it is open an engine finds those parameters frozen, and asks for no patient's gradient.
    """

    def __init__(self, net: nn.Module, free: Free | None, randomness: Randomness) -> None:
        self.net, self.free, self.randomness = net, free, randomness
        names = () if free is None else free.only
        self.trained = trainable(net)
        self.alone = {p for n, p in net.named_parameters() if n.startswith(names)}
        self.alone &= set(self.trained)

    def __enter__(self) -> None:
        self._unfreeze(False)

    def __exit__(self, *_: object) -> None:
        self._unfreeze(True)

    def beside(self, gradients: list[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained parameter with the patients' gradient, if any, plus the free one."""
        patients = iter(gradients)
        for parameter, own in zip(self.trained, self._own(), strict=True):
            if parameter in self.alone:
                yield parameter, own
            else:
                yield parameter, next(patients) + own

    def _own(self) -> Sequence[Tensor]:
        if self.free is None:
            return [torch.zeros(()).to(p) for p in self.trained]
        self._unfreeze(True)
        value = self.free.loss(self.net, self.randomness)
        found = torch.autograd.grad(value, self.trained, allow_unused=True, materialize_grads=True)
        self._unfreeze(False)
        return found

    def _unfreeze(self, is_free: bool) -> None:
        for parameter in self.alone:
            parameter.requires_grad_(is_free)


def train(
    net: nn.Module,
    patients: Sequence[Patient],
    *,
    plan: StudyPlan,
    task: Task,
    rounds: Sequence[int],
    randomness: Randomness,
    performance: Performance,
    noise_multiplier: float = 0.0,
) -> Trained:
    """Train ``net`` in place for some rounds of ``plan`` on end, with one optimizer made anew.

    Args:
        net: as it was sent.
        patients: to train on.
        plan: its training and privacy terms are used.
        task: gives the loss.
        rounds: decide the learning rates; one round together, all of them when training alone.
        randomness: of draws, views and noise.
        performance: how fast.
        noise_multiplier: what this site adds by itself, the plan's or its share of it.

    Guarantees:
        Under privacy terms a buffer that training changed stops the round: nothing noised it.

    Raises:
        ValueError: if a buffer changed under privacy terms, the engine refuses the net, or a plan
            with privacy terms is given no noise.
    """
    if (plan.privacy is not None) != (noise_multiplier > 0):
        raise ValueError("expected noise under privacy terms, and only then")
    net.to(performance.device).train()
    freeze(net, plan.training.frozen)
    free = FreeStep(net, task.free, randomness)
    view = _view_of(task)
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    optimizer = _optimizer(free.trained, plan, noise_multiplier, len(patients))
    losses, num_non_finite = list[float](), 0
    with free, _engine(net, task, plan.privacy, performance) as gradient_of:
        for round_, step in product(rounds, range(plan.training.steps_per_round)):
            if step == 0:
                losses = []
                start = [p.detach() for p in free.trained]
                anchor = [p.clone() for p in start] if plan.training.proximal_mu else start
                optimizer.param_groups[0]["lr"] = learning_rate(plan.training, round_)
            batch = draw(
                patients,
                terms=plan.training,
                randomness=randomness,
                view=view,
                moved=task.moved,
            )
            sums = gradient_of(_moved(batch, performance.device))
            gradients = _mean(
                sums.gradients, batch, plan, len(patients), noise_multiplier, randomness
            )
            _step(free.beside(gradients), optimizer, anchor, plan.training.proximal_mu)
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


def draw(
    patients: Sequence[Patient],
    *,
    terms: Training,
    randomness: Randomness,
    view: View = as_it_is,
    moved: Moved = moved_map,
) -> Batch:
    """Draw each patient with probability ``sample_rate``, and at most the cap of their images.

    An image drawn enters as ``views`` of it, each made by the plan's changes and then by the task's
    own ``view``; the patient's gradient is the mean over them all. Where the plan trains on
    patches, each view is of a patch of its own, ``patches_per_image`` times as many.

    Guarantees:
        Patients are drawn independently of each other.
        No patient gives more images than images_per_patient.
    """
    drawn = np.flatnonzero(randomness.uniform(len(patients)) < terms.sample_rate)
    images, targets, owner = [], [], []
    for position, index in enumerate(drawn.tolist()):
        patient = patients[index]
        order = np.argsort(randomness.uniform(len(patient.images)))[: terms.images_per_patient]
        for number in np.repeat(order, terms.views * terms.patches_per_image).tolist():
            changed = _changed(patient, number, terms, randomness, moved)
            image, target = view(*changed, randomness, True)
            images.append(image)
            targets.append(target)
            owner.append(position)
    if not images:
        image, target = view(*_whole_or_patch(patients[0], 0, terms, randomness), randomness, True)
        return Batch(image[None][:0], target[None][:0], torch.zeros(0).long(), 0)
    return Batch(torch.stack(images), torch.stack(targets), torch.tensor(owner), len(drawn))


def shown(patients: Sequence[Patient], *, plan: StudyPlan, task: Task) -> Tensor:
    """Return an image of each patient as the net is shown it: (n, channel, [z,] y, x)."""
    once = {"sample_rate": 1.0, "images_per_patient": 1, "views": 1, "patches_per_image": 1}
    terms = plan.training.model_copy(update=once)
    return draw(
        patients, terms=terms, randomness=seeded("probe"), view=_view_of(task), moved=task.moved
    ).images


def freeze(net: nn.Module, frozen: Sequence[str]) -> None:
    """Train only the parameters whose names begin with none of ``frozen``."""
    for name, parameter in net.named_parameters():
        if name.startswith(tuple(frozen)):
            parameter.requires_grad_(False)


def _changed(
    patient: Patient, number: int, terms: Training, randomness: Randomness, moved: Moved
) -> tuple[Tensor, Tensor]:
    """Return an image (channel, [z,] y, x) and its target, changed at random as the plan says."""
    image, target = _whole_or_patch(patient, number, terms, randomness)
    size, steps = tuple(image.shape[1:]), (0,) * (image.ndim - 1)
    is_mirrored = terms.flips and randomness.uniform(1)[0] < 0.5
    if is_mirrored:
        image = image.flip(-1)
    if terms.shift:
        by = randomness.uniform(len(size)) * (2 * terms.shift + 1) // 1 - terms.shift
        steps = tuple(int(step) for step in by)
        image = image.roll(steps, tuple(range(-len(size), 0)))
    return image, moved(target, is_mirrored, steps, size)


def _view_of(task: Task) -> View:
    """Return the task's view, of label maps encoded first where that was put off."""
    return lambda image, target, randomness, is_training: task.view(
        image, encoded(target, task), randomness, is_training
    )


def _whole_or_patch(
    patient: Patient, number: int, terms: Training, randomness: Randomness
) -> tuple[Tensor, Tensor]:
    """Return an image and its target, or where the plan says so a random patch of both."""
    image, target = patient.images[number], patient.targets[number]
    if not terms.patch:
        return image, target
    begin = corner(
        image.shape[1:],
        terms.patch,
        randomness,
        foreground=patient.foreground[number] if patient.foreground else None,
        share=terms.patch_foreground or 0.0,
    )
    is_map = target.ndim > 0
    return cut(image, begin, terms.patch), cut(target, begin, terms.patch) if is_map else target


@contextmanager
def _engine(
    net: nn.Module, task: Task, privacy: PrivacyTerms | None, performance: Performance
) -> Iterator[GradientOf]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return task.loss(outputs.float(), targets)

    engine = plain_engine if privacy is None else ENGINES[performance.engine]
    terms: dict[str, Any] = (
        {}
        if privacy is None
        else {"max_grad_norm": privacy.max_grad_norm, "clipping": privacy.clipping}
    )
    kind = torch.device(performance.device).type
    with engine(net, loss, most_images=performance.most_images, **terms) as gradient_of:

        def in_precision(batch: Batch) -> Sums:
            # Opened anew for each step: autocast keeps its copies of the weights until it closes.
            with torch.autocast(kind, torch.bfloat16, enabled=performance.autocast):
                return gradient_of(batch)

        yield in_precision


def _mean(
    sums: list[Tensor],
    batch: Batch,
    plan: StudyPlan,
    num_patients: int,
    noise_multiplier: float,
    randomness: Randomness,
) -> list[Tensor]:
    """Return the gradient to step along: noisy and over the expected batch, if private."""
    if plan.privacy is None:
        return [total.div_(max(batch.num_patients, 1)) for total in sums]
    noisy = add_noise(
        sums,
        noise_multiplier=noise_multiplier,
        max_grad_norm=plan.privacy.max_grad_norm,
        randomness=randomness,
    )
    expected = plan.training.sample_rate * num_patients
    return [total / expected for total in noisy]


def _step(
    gradients: Iterable[tuple[nn.Parameter, Tensor]],
    optimizer: torch.optim.Optimizer,
    anchor: list[Tensor],
    proximal_mu: float,
) -> None:
    for (parameter, gradient), start in zip(gradients, anchor, strict=True):
        parameter.grad = gradient
        if proximal_mu:
            parameter.grad = gradient + proximal_mu * (parameter.detach() - start)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(
    parameters: list[nn.Parameter], plan: StudyPlan, noise_multiplier: float, num_patients: int
) -> torch.optim.Optimizer:
    terms = plan.training
    rate = terms.learning_rate
    if terms.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=rate, momentum=terms.momentum, weight_decay=terms.weight_decay
        )
    if terms.optimizer == "adam-bc" and plan.privacy is not None:
        deviation = noise_multiplier * plan.privacy.max_grad_norm
        return AdamCorrected(
            parameters, lr=rate, deviation=deviation / (terms.sample_rate * num_patients)
        )
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=terms.weight_decay)


def _moved(batch: Batch, device: str) -> Batch:
    return Batch(
        batch.images.to(device),
        batch.targets.to(device),
        batch.owner.to(device),
        batch.num_patients,
    )

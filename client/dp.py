"""Gradients whose unit is the patient.

A step draws patients, not images. Each drawn patient's images are averaged into one gradient; that
one gradient is clipped, the clipped gradients are summed, noise is added once, and the sum is
divided by the number of patients expected, never by the number drawn.

Guarantees:
    One patient changes the sum before noise by at most max_grad_norm.
    A patient with a non-finite gradient contributes nothing.
    An empty draw still takes a step of pure noise.
    Every trainable parameter has a per-patient gradient, or training stops with its name.
    A net in which patients meet, by batch normalization or running statistics, is refused.

Design: the seam is ``Engine``: a function from net, loss and clipping norm to a function that turns
a batch into the sum of clipped patient gradients. ``opacus_engine`` takes per-image gradients from
Opacus and groups them; a faster engine replaces it without touching ``train.py``.

References:
    Abadi et al. 2016, Deep learning with differential privacy, https://arxiv.org/abs/1607.00133,
    algorithm 1. Opacus, https://arxiv.org/abs/2109.12298.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from shared_models.randomness import Randomness

Loss = Callable[[Tensor, Tensor], Tensor]
Clipping = Literal["flat", "automatic"]
#: What automatic clipping adds to every norm (the paper's gamma).
STABILITY = 0.01


class Batch(NamedTuple):
    """The images of the drawn patients.

    Attributes:
        images: float32 (n, channel, [z,] y, x).
        targets: as the task's.
        owner: int64 (n,), which of the drawn patients each image belongs to, ascending.
        num_patients: how many were drawn, 0 included.
    """

    images: Tensor
    targets: Tensor
    owner: Tensor
    num_patients: int


class Sums(NamedTuple):
    """The sum over patients of their (clipped) gradients, one tensor per trainable parameter."""

    gradients: list[Tensor]
    loss: float
    num_non_finite: int


GradientOf = Callable[[Batch], Sums]
Engine = Callable[..., AbstractContextManager[GradientOf]]


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the net's own order."""
    return [p for p in net.parameters() if p.requires_grad]


def add_noise(
    sums: Sequence[Tensor], *, noise_multiplier: float, max_grad_norm: float, randomness: Randomness
) -> list[Tensor]:
    """Return the sums plus independent Gaussian noise of deviation multiplier times norm.

    Added in float64, then rounded to float32 and to a grid of about a millionth of the deviation,
    so that no digit released is finer than the noise hides (``client.noise``).
    """
    deviation = noise_multiplier * max_grad_norm
    grid = 2.0 ** (math.frexp(deviation)[1] - 20)
    # In float32 a number this large has no digits below the grid: adding and taking it rounds.
    large = 1.5 * 2.0**23 * grid
    noisy = []
    for total in sums:
        noise = torch.from_numpy(randomness.normal(total.numel())).view_as(total)
        exact = torch.add(total.cpu(), noise, alpha=deviation, out=noise)
        noisy.append(exact.float().add_(large).sub_(large).to(total))
    return noisy


def clip_factors(norms: Tensor, *, max_grad_norm: float, clipping: Clipping = "flat") -> Tensor:
    """Return what each patient's gradient is multiplied by, given its norm; 0 where not finite.

    ``automatic`` divides by a little more than the norm (Bu et al. 2023, Automatic clipping,
    https://arxiv.org/abs/2206.07136), so that small gradients stay small. Either way no product is
    over ``max_grad_norm``.
    """
    below = 1 - 2e-6  # so that rounding in float32 never lifts a scaled norm over the bound
    if clipping == "automatic":
        factors = below * max_grad_norm / (norms + STABILITY)
    else:
        factors = (below * max_grad_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    # a factor below the smallest normal number has lost digits, and might be rounded up
    is_exact = norms.isfinite() & (factors >= torch.finfo(factors.dtype).tiny)
    return torch.where(is_exact, factors, torch.zeros_like(factors))


@contextmanager
def plain_engine(
    net: nn.Module,
    loss: Loss,
    *,
    max_grad_norm: float | None = None,
    most_images: int = 32,
    clipping: Clipping = "flat",
) -> Iterator[GradientOf]:
    """Yield gradients without clipping: training without privacy, by the same code path."""
    parameters = trainable(net)

    def gradient_of(batch: Batch) -> Sums:
        total, value = _zeros(parameters), 0.0
        for chunk, weight in _chunks(batch, most_images):
            weighted = (loss(net(chunk.images), chunk.targets) * weight).sum()
            for kept, new in zip(total, torch.autograd.grad(weighted, parameters), strict=True):
                kept += new
            value += float(weighted.detach())
        return Sums(total, value / max(batch.num_patients, 1), 0)

    yield gradient_of


@contextmanager
def opacus_engine(
    net: nn.Module,
    loss: Loss,
    *,
    max_grad_norm: float | None,
    most_images: int = 32,
    clipping: Clipping = "flat",
) -> Iterator[GradientOf]:
    """Yield sums of clipped patient gradients, from Opacus's per-image gradients.

    Raises:
        ValueError: if the net has layers Opacus cannot protect, or there is no clipping norm.
    """
    if max_grad_norm is None:
        raise ValueError("expected a max_grad_norm to clip to")
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    mixing = _mixing(net)
    if mixing:
        raise ValueError(
            "expected layers that keep no statistics over images, got them in "
            f"{', '.join(mixing[:5])}; use group normalization"
        )
    objections = ModuleValidator.validate(net, strict=False)
    if objections:
        raise ValueError("; ".join(str(e) for e in objections[:5]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            wrapped = GradSampleModule(net, loss_reduction="sum")
        except NotImplementedError as error:
            raise ValueError(f"expected layers without buffers: {error}") from error
        try:
            yield lambda batch: _clipped_sums(
                wrapped,
                net,
                loss,
                batch,
                factors_of=partial(clip_factors, max_grad_norm=max_grad_norm, clipping=clipping),
                most_images=most_images,
            )
        finally:
            wrapped.to_standard_module()
            for parameter in net.parameters():
                parameter.grad = None


def _mixing(net: nn.Module) -> list[str]:
    """Return the layers in which patients meet; Opacus looks only at those with parameters."""
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        or getattr(module, "track_running_stats", False)
    ]


def _clipped_sums(
    wrapped: nn.Module,
    net: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    factors_of: Callable[[Tensor], Tensor],
    most_images: int,
) -> Sums:
    parameters = trainable(net)
    total, value, num_non_finite = _zeros(parameters), 0.0, 0
    for chunk, weight in _chunks(batch, most_images):
        wrapped.zero_grad(set_to_none=True)
        weighted = (loss(wrapped(chunk.images), chunk.targets) * weight).sum()
        weighted.backward()  # type: ignore[no-untyped-call]
        per_patient = [
            _by_patient(_grad_sample(net, p), chunk.owner, chunk.num_patients) for p in parameters
        ]
        norms = torch.stack([g.flatten(1).double().norm(dim=1) for g in per_patient]).norm(dim=0)
        factors = factors_of(norms).to(per_patient[0])
        num_non_finite += int((factors == 0).sum())
        for kept, grads in zip(total, per_patient, strict=True):
            finite = torch.nan_to_num(grads, nan=0.0, posinf=0.0, neginf=0.0)
            kept += torch.einsum("p,p...->...", factors, finite)
        value += float(torch.nan_to_num(weighted.detach()))
    wrapped.zero_grad(set_to_none=True)
    return Sums(total, value / max(batch.num_patients, 1), num_non_finite)


def _grad_sample(net: nn.Module, parameter: nn.Parameter) -> Tensor:
    """Return the per-image gradients of ``parameter``: (n, ...)."""
    found = getattr(parameter, "grad_sample", None)
    if found is None:
        name = next(n for n, p in net.named_parameters() if p is parameter)
        raise ValueError(
            f"the parameter '{name}' received no per-image gradient; its layer cannot be "
            "protected: freeze it or choose another net"
        )
    # A layer used more than once keeps one gradient for each use; they add up.
    return torch.stack(list(found)).sum(dim=0) if isinstance(found, list) else found


def _by_patient(per_image: Tensor, owner: Tensor, num_patients: int) -> Tensor:
    """Add up the images of each patient: (n, ...) to (patients, ...)."""
    sums = per_image.new_zeros((num_patients, *per_image.shape[1:]))
    return sums.index_add_(0, owner, per_image)


def _chunks(batch: Batch, most_images: int) -> Iterator[tuple[Batch, Tensor]]:
    """Cut a batch into chunks of whole patients, each with its images' weights (n,).

    A patient's weights add up to one. A patient of more than ``most_images`` is a chunk alone.
    """
    if batch.num_patients == 0:
        return
    counts = torch.bincount(batch.owner, minlength=batch.num_patients)
    ends = counts.cumsum(0).tolist()
    first, start = 0, 0
    for patient, end in enumerate(ends):
        following = ends[patient + 1] if patient + 1 < len(ends) else None
        if following is not None and following - start <= most_images:
            continue
        owner = batch.owner[start:end]
        weight = 1.0 / counts[owner].to(batch.images.dtype)
        chunk = Batch(
            batch.images[start:end], batch.targets[start:end], owner - first, patient + 1 - first
        )
        yield chunk, weight
        first, start = patient + 1, end


def _zeros(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [torch.zeros_like(p) for p in parameters]

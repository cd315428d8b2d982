"""What is written down while a chunk passes through the net: whose rows, which gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Padding patients to the same number of images may at most double the work.
MOST_PADDING = 2

# What rounding may take from a ghost norm is added to it: a norm too large is private, one too
# small is not. In units of the machine epsilon times the size of what was summed; see the tests.
ROUNDING = 16


class OutOfOrder(Exception):
    """A layer was given something whose first axis is not the images."""


class Layout(NamedTuple):
    """Which rows of a chunk belong to which patient.

    Attributes:
        owner: int64 (n,), ascending.
        num_patients: patients in the chunk.
        width: images per unit; a unit is a patient, or one image where padding would be wasteful.
        place: int64 (n,), where each image lies among units times width; None if in order.
    """

    owner: Tensor
    num_patients: int
    width: int
    place: Tensor | None

    @classmethod
    def of(cls, owner: Tensor, num_patients: int) -> Layout:
        """Return the layout of the images of ``owner``."""
        counts = torch.bincount(owner, minlength=num_patients)
        widest = int(counts.max())
        if widest * num_patients == len(owner):
            return cls(owner, num_patients, widest, None)
        if widest * num_patients > MOST_PADDING * len(owner):
            return cls(owner, num_patients, 1, None)
        first = counts.cumsum(0) - counts
        inside = torch.arange(len(owner), device=owner.device) - first[owner]
        return cls(owner, num_patients, widest, owner * widest + inside)

    @property
    def is_by_patient(self) -> bool:
        """Whether a unit is a patient, not an image."""
        return self.place is not None or self.width * self.num_patients == len(self.owner)

    def units(self, rows: Tensor) -> Tensor:
        """Arrange (n, ...) as (units, width, ...), with zeros where a patient has fewer images."""
        if self.place is not None:
            padded = rows.new_zeros((self.num_patients * self.width, *rows.shape[1:]))
            rows = padded.index_copy_(0, self.place, rows)
        return rows.reshape(-1, self.width, *rows.shape[1:])

    def from_units(self, gradients: Tensor) -> Tensor:
        """Add up units to patients: (units, ...) to (patients, ...)."""
        return gradients if self.is_by_patient else self.from_images(gradients)

    def from_images(self, gradients: Tensor) -> Tensor:
        """Add up images to patients: (n, ...) to (patients, ...)."""
        if len(self.owner) == self.num_patients:
            return gradients
        sums = gradients.new_zeros((self.num_patients, *gradients.shape[1:]))
        return sums.index_add_(0, self.owner, gradients)


class Ghost(NamedTuple):
    """A gradient known by its norms: ``squared`` (patients,) and how to make the weighted sum.

    ``weighted`` takes one factor per image (n,).
    """

    squared: Tensor
    weighted: Callable[[Tensor], Tensor]


class Book:
    """The gradients of one chunk, as they come in."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.uses: Counter[Tensor] = Counter()
        self.calls: Counter[Tensor] = Counter()
        self.answered: Counter[Tensor] = Counter()
        self.firsts: list[torch.autograd.graph.GradientEdge] = []
        self._whole: dict[Tensor, Tensor] = {}
        self._ghosts: dict[Tensor, Ghost] = {}

    def __enter__(self) -> Book:
        """Return the book."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the graph, whose hooks hold this book: nothing else would free either."""
        self.firsts.clear()

    def may_be_ghost(self, parameter: Tensor) -> bool:
        """Return whether norms suffice: cross terms of several uses would be lost."""
        return self.uses[parameter] == 1 and self.layout.is_by_patient

    def write(self, parameter: Tensor, gradient: Tensor | Ghost) -> None:
        """Write down one use: per-patient gradients (patients, *shape), or their ghost."""
        self.answered[parameter] += 1
        if isinstance(gradient, Ghost):
            self._ghosts[parameter] = gradient
        elif parameter in self._whole:
            self._whole[parameter] = self._whole[parameter] + gradient
        else:
            self._whole[parameter] = gradient

    def norms(self) -> Tensor:
        """Return the patients' norms over all parameters: float64 (patients,)."""
        squared = [
            torch.linalg.vector_norm(g.flatten(1), dim=1).double().square()
            for g in self._whole.values()
        ]
        squared += [ghost.squared.double() for ghost in self._ghosts.values()]
        return torch.stack(squared).sum(dim=0).sqrt()

    def weighted(self, parameter: Tensor, factors: Tensor) -> Tensor:
        """Return the sum over patients of factor times gradient; factor 0 also drops NaN."""
        kept = factors.to(parameter.dtype)
        ghost = self._ghosts.get(parameter)
        if ghost is not None:
            return ghost.weighted(kept[self.layout.owner])
        gradient = self._whole[parameter].flatten(1)
        if bool((factors == 0).any()):
            gradient = torch.where(kept[:, None] == 0, 0, gradient)
        return (kept @ gradient).view(parameter.shape)

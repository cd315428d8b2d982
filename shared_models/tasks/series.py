"""Series classification: one class for a whole stack of slices, read in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from shared_models.randomness import Randomness
from shared_models.tasks import classification
from shared_models.tasks.base import Pixels, Task, grey

ORDERS = ("in order", "reversed")


def make(*, classes: Sequence[str] = ORDERS, labels: Literal["class", "order"] = "class") -> Task:
    """Return the task of telling ``classes`` of volumes apart; metrics are classification's.

    With ``labels = "order"`` no labels are needed: half of the volumes are shown with their slices
    reversed, at random, and the question is which.

    Raises:
        ValueError: as for classification; if ``labels`` is neither; if classes are named for order.
    """
    if labels not in ("class", "order"):
        raise ValueError("expected labels as 'class' or 'order'")
    if labels == "order" and tuple(classes) != ORDERS:
        raise ValueError("expected no classes with labels = 'order'; leave them out")
    plain = classification.make(classes=classes)

    def view(
        image: Tensor, target: Tensor, randomness: Randomness, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        is_reversed = randomness.uniform(1)[0] < 0.5
        return image.flip(1) if is_reversed else image, torch.tensor(int(is_reversed))

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        """Draw five slices evenly spread, side by side."""
        shown = torch.linspace(0, image.shape[1] - 1, 5).round().long()
        row = torch.cat([image[0, z] for z in shown.tolist()], dim=1)
        return grey(row), plain.picture(image[:, 0], target, output)[1]

    def made_up(generator: torch.Generator, spatial_dims: int) -> tuple[Tensor, Tensor]:
        if spatial_dims != 3:
            raise ValueError("expected a net of spatial_dims = 3, which sees a series as a whole")
        return torch.randn((4, plain.num_outputs), generator=generator), torch.arange(4) % 2

    task = plain._replace(name="series-classification", picture=picture, made_up=made_up)
    return task if labels == "class" else task._replace(label_kind="none", view=view)

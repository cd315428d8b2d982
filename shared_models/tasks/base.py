"""The abstraction: a task is a value of functions.

No task knows about Flower, differential privacy or files. Arrays are (batch, channel, [z,] y, x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Scores = NDArray[np.float64]
Pixels = NDArray[np.uint8]


class Task(NamedTuple):
    """A task's parts.

    Attributes:
        name: as in the plan.
        headline: the metric that stands for the task in tables; larger is better.
        label_kind: ``class`` if a label is a word in the manifest, ``map`` if it is an image.
        num_outputs: channels the net must give.
        encode_class: word to class number; ``encode_map``: (z, y, x) numbers to int64 of the same
            shape. Each raises ``ValueError`` for what the task does not know.
        loss: (outputs, targets) to (batch,): one number per image, never mixing images.
        score: (outputs, targets, spacing_mm) to float64 (batch, columns): what metrics need to know
            of each image. ``spacing_mm`` is that of the images, ([z,] y, x).
        metrics: scores (n, columns) to metrics; one that cannot be computed is absent.
        picture: (image (channel, [z,] y, x), target, output) to uint8 (y, x, 3) and a caption.
    """

    name: str
    headline: str
    label_kind: Literal["class", "map"]
    num_outputs: int
    encode_class: Callable[[str], int]
    encode_map: Callable[[NDArray[np.float32]], NDArray[np.int64]]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor, tuple[float, ...]], Scores]
    metrics: Callable[[Scores], dict[str, float]]
    picture: Callable[[Tensor, Tensor, Tensor], tuple[Pixels, str]]


def objection_to_loss(task: Task, *, spatial_dims: int) -> str | None:
    """Say how the task's loss breaks its contract over four made-up images, if it does.

    A patient's gradient must be that patient's own. A loss that compares images with each other
    (contrastive, ranking) or with their mean has none, and clipping does not bound what one patient
    changes. A probe, no proof: what differs by less than rounding is not seen.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    size = (8,) * spatial_dims if task.label_kind == "map" else ()
    outputs = torch.randn((4, task.num_outputs, *size), generator=generator)
    targets = (torch.arange(4) % 2).view(4, *(1 for _ in size)).expand(4, *size)  # two of a kind
    together = task.loss(outputs, targets)
    if together.shape != (4,):
        return (
            f"expected a loss of one number per image, (4,), got {tuple(together.shape)}; average "
            "over each image's own voxels and over nothing else"
        )
    alone = torch.cat([task.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(4)])
    if torch.allclose(together, alone, rtol=1e-4, atol=1e-5, equal_nan=True):
        return None
    return (
        "expected a loss in which no image changes another's, got one that mixes them, as "
        "contrastive and ranking losses do; score every image by itself"
    )


def grey(image: Tensor) -> Pixels:
    """Return a 2-D image (y, x), or the middle slice of a 3-D one, as uint8 RGB (y, x, 3)."""
    plane = image[image.shape[0] // 2] if image.ndim == 3 else image
    low, high = float(plane.min()), float(plane.max())
    scaled = (plane - low) / max(high - low, 1e-6) * 255
    pixels: Pixels = scaled.round().clamp(0, 255).byte().cpu().numpy()
    return np.repeat(pixels[..., None], 3, axis=-1)

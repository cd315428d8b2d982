"""The abstraction: a task is a value of functions.

No task knows about Flower, differential privacy or files. Arrays are (batch, channel, [z,] y, x).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, Never

import numpy as np
from numpy.typing import NDArray

from shared_models.randomness import Randomness

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Module

Scores = NDArray[np.float64]
Pixels = NDArray[np.uint8]


class Box(NamedTuple):
    """What a box label names: a class, and the corners (x, y) in pixels of the prepared image."""

    name: str
    low: tuple[float, float]
    high: tuple[float, float]


class Free(NamedTuple):
    """A loss that sees no patient, taken beside that of each step: a generator's, say.

    Attributes:
        loss: (net, randomness) to one number. It is given no image, so what it trains costs no
            privacy beyond that of the parameters it reads, which were noised.
        only: how the names of the parameters begin which it alone trains; no image reaches them.
    """

    loss: Callable[[Module, Randomness], Tensor]
    only: tuple[str, ...] = ()


def _no_label(label: object, *_: object) -> Never:
    raise ValueError("expected another kind of label for this task")


def as_it_is(
    image: Tensor, target: Tensor, randomness: Randomness, is_training: bool
) -> tuple[Tensor, Tensor]:
    """Return an image and its target, which is what most tasks are trained on."""
    return image, target


def moved_map(
    target: Tensor, is_mirrored: bool, steps: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    """Return a label map moved as its image was; a number stays as it is."""
    if not target.ndim:
        return target
    target = target.flip(-1) if is_mirrored else target
    return target.roll(steps, tuple(range(-len(steps), 0))) if any(steps) else target


def _run(net: Module, inputs: Tensor) -> Tensor:
    outputs: Tensor = net(inputs)
    return outputs


class Task(NamedTuple):
    """A task's parts. What stands last has a default that suits most.

    Attributes:
        name: as in the plan.
        headline: the metric that stands for the task in tables; larger is better.
        label_kind: ``class`` if a label is a word in the manifest, ``map`` if it is an image,
            ``boxes`` if it lists boxes, ``none`` if images are all there is.
        num_outputs: channels the net must give.
        loss: (outputs, targets) to (batch,): one number per image, never mixing images.
        score: (outputs, targets, spacing_mm) to float64 (batch, columns): what metrics need to know
            of each image. ``spacing_mm`` is that of the images, ([z,] y, x).
        metrics: scores (n, columns) to metrics; one that cannot be computed is absent.
        picture: (input (channel, [z,] y, x), target, output) to uint8 (y, x, 3) and a caption.
        encode_class: word to class number; ``encode_map``: (z, y, x) numbers to int64 of the same
            shape; ``encode_boxes``: boxes and the image's (y, x) to a target. Each raises
            ``ValueError`` for what the task does not know.
        view: (image, target, randomness, is_training) to the net's input and what it is held to:
            a noisy image and the clean one, say. Images of one shape give inputs of one shape.
            When not training, ``randomness`` is the same for the same image.
        moved: (target, is_mirrored, steps, size) to the target of an image of ``size`` ([z,] y, x)
            that was mirrored left to right, if so, then rolled by ``steps`` voxels along its axes.
        run: (net, inputs) to what is scored, where that is more than the net's own answer.
        free: a loss that sees no patient.
        warm: (net, images, targets) to (batch,): what a warm start is trained by, if not ``loss``.
        released: how the names of the parameters begin which are released; empty means all.
        baselines: by name, (inputs) to outputs as ``run`` gives them: what needs no training.
        answer: what kind of thing ``run`` gives, where it is not of ``label_kind``: a path, say.
        made_up: (generator, spatial_dims) to four outputs and targets, for ``objection_to_loss``.
        covers: what differential privacy covers of it, in a sentence for people.
        not_private: why it cannot be private; a plan that asks for it is refused.
    """

    name: str
    headline: str
    label_kind: Literal["class", "map", "boxes", "none"]
    num_outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor, tuple[float, ...]], Scores]
    metrics: Callable[[Scores], dict[str, float]]
    picture: Callable[[Tensor, Tensor, Tensor], tuple[Pixels, str]]
    encode_class: Callable[[str], int] = _no_label
    encode_map: Callable[[NDArray[np.float32]], NDArray[np.int64]] = _no_label
    encode_boxes: Callable[[Sequence[Box], tuple[int, int]], Tensor] = _no_label
    view: Callable[[Tensor, Tensor, Randomness, bool], tuple[Tensor, Tensor]] = as_it_is
    moved: Callable[[Tensor, bool, tuple[int, ...], tuple[int, ...]], Tensor] = moved_map
    run: Callable[[Module, Tensor], Tensor] = _run
    free: Free | None = None
    warm: Callable[[Module, Tensor, Tensor], Tensor] | None = None
    released: tuple[str, ...] = ()
    baselines: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({})
    answer: str = ""
    made_up: Callable[[Generator, int], tuple[Tensor, Tensor]] | None = None
    covers: str = "All that is trained: each patient's gradient is clipped, and their sum noised."
    not_private: str = ""


def objection_to_loss(task: Task, *, spatial_dims: int) -> str | None:
    """Say how the task's loss breaks its contract over four made-up images, if it does.

    A patient's gradient must be that patient's own. A loss that compares images with each other
    (contrastive, ranking) or with their mean has none, and clipping does not bound what one patient
    changes. A probe, no proof: what differs by less than rounding is not seen.
    """
    import torch

    outputs, targets = _made_up(task, torch.Generator().manual_seed(0), spatial_dims)
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


def _made_up(task: Task, generator: Generator, spatial_dims: int) -> tuple[Tensor, Tensor]:
    """Return four outputs and targets: the task's own, or classes, two images of a kind."""
    import torch

    if task.made_up is not None:
        return task.made_up(generator, spatial_dims)
    size = (8,) * spatial_dims if task.label_kind == "map" else ()
    outputs = torch.randn((4, task.num_outputs, *size), generator=generator)
    return outputs, (torch.arange(4) % 2).view(4, *(1 for _ in size)).expand(4, *size)


def grey(image: Tensor) -> Pixels:
    """Return a 2-D image (y, x), or the middle slice of a 3-D one, as uint8 RGB (y, x, 3)."""
    plane = image[image.shape[0] // 2] if image.ndim == 3 else image
    low, high = float(plane.min()), float(plane.max())
    scaled = (plane - low) / max(high - low, 1e-6) * 255
    pixels: Pixels = scaled.round().clamp(0, 255).byte().cpu().numpy()
    return np.repeat(pixels[..., None], 3, axis=-1)

"""Localization: an agent walks through a volume to a landmark, by Q-learning.

The agent sees two small cubes around itself, one of near voxels and one of far ones, and moves one
voxel along an axis. It is rewarded by how much nearer it came. It learns from single moves from
places drawn at random, so that training needs no episodes and a patient's gradient is that of their
own moves alone.

References:
    Watkins and Dayan 1992, Q-learning. Alansary et al. 2019, Evaluating reinforcement learning
    agents for anatomical landmark detection, Medical Image Analysis 53, 156-164.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from shared_models.randomness import Randomness
from shared_models.tasks.base import Pixels, Scores, Task, grey

#: One voxel down, up, forward, back, right, left along (z, y, x).
MOVES = torch.tensor([[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]])
#: An agent that found its place steps to and fro; where it is said to be is the mean of these.
NUM_LAST = 4
PATH, TRUTH = (255, 200, 0), (0, 220, 120)


def make(
    *,
    classes: Sequence[str],
    landmark: str | None = None,
    learner: Literal["agent", "regressor"] = "agent",
    size: int = 11,
    stride: int = 3,
    shift: int = 8,
    num_moves: int = 60,
    discount: float = 0.8,
    tolerance_mm: float = 3.0,
) -> Task:
    """Return the task of finding the centre of one of ``classes`` in three dimensions.

    Labels are maps; the landmark is the centre of mass of the class called ``landmark``, by default
    the first. Every image is moved by up to ``shift`` voxels along each axis, in training and in
    testing: without that the mean position alone would solve the task. Metrics: ``found``, the
    share of images in which it ends within ``tolerance_mm``; ``distance_mm``, the mean distance.

    Args:
        classes: without the background, which is 0.
        landmark: one of them.
        learner: an ``agent`` that walks, or a supervised ``regressor`` that looks once, at the
            whole image, for comparison.
        size: voxels along an edge of the cubes it sees; odd.
        stride: voxels between two that it sees in the cube of far ones.
        shift: at most as many voxels.
        num_moves: length of a walk, which begins at the centre.
        discount: what the next reward counts, of this one.
        tolerance_mm: how near is near enough.

    Raises:
        ValueError: if the landmark is none of the classes, or a number is out of range.
    """
    names = [str(name) for name in classes]
    wanted = str(landmark) if landmark is not None else (names or [""])[0]
    if wanted not in names or len(set(names)) != len(names):
        raise ValueError("expected a landmark that is one of the classes, which all differ")
    if learner not in ("agent", "regressor"):
        raise ValueError("expected learner as 'agent' or 'regressor'")
    if size < 3 or size % 2 == 0 or stride < 1 or shift < 0 or num_moves < NUM_LAST:
        raise ValueError(
            "expected an odd size of 3 or more, a stride of 1 or more, a shift of 0 or more and "
            f"{NUM_LAST} moves or more"
        )
    if not (0 <= discount < 1 and tolerance_mm > 0):
        raise ValueError("expected a discount in [0, 1) and a tolerance_mm over 0")
    number = names.index(wanted) + 1
    walks = learner == "agent"

    def encode_map(label: NDArray[np.float32]) -> NDArray[np.int64]:
        low, high = np.rint(label.min()), np.rint(label.max())
        if not (low >= 0 and high <= len(names)):  # so that NaN is refused too
            raise ValueError(
                f"expected label values from 0 to {len(names)}, one for each class of the plan"
            )
        encoded: NDArray[np.int64] = np.rint(label).astype(np.int64)
        if not (encoded == number).any():
            raise ValueError(f"expected a label map with voxels of {wanted}, got none")
        return encoded

    def view(
        image: Tensor, target: Tensor, randomness: Randomness, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        offset = torch.from_numpy(randomness.uniform(3) * (2 * shift + 1) // 1 - shift).long()
        place = (target == number).nonzero().double().mean(dim=0) + offset
        moved = _moved(image, offset)
        if not (walks and is_training):
            return moved, place.float()
        here = torch.from_numpy(randomness.uniform(3)) * torch.tensor(moved.shape[1:]) // 1
        move = int(randomness.uniform(1)[0] * len(MOVES))
        there = _within(here.long() + MOVES[move], moved.shape[1:])
        reward = (here - place).norm() - (there - place).norm()
        is_there = bool((there - place).abs().max() <= 1)
        states = _states(moved.expand(2, *moved.shape), torch.stack([here.long(), there]))
        return states.flatten(0, 1), torch.tensor([move, float(reward), float(is_there)])

    def _states(images: Tensor, places: Tensor) -> Tensor:
        """Return what is seen from ``places`` (n, 3): (n, 2, size, size, size)."""
        reach = torch.arange(size) - size // 2
        return torch.stack([_cubes(images, places, reach * each) for each in (1, stride)], dim=1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if not walks:
            return smooth_l1_loss(outputs, targets, reduction="none").mean(dim=1)
        now, after = outputs.chunk(2, dim=1)
        reward, is_there = targets[:, 1].clamp(-1, 1), targets[:, 2]
        wanted_value = reward + discount * (1 - is_there) * after.amax(dim=1)
        value = now.gather(1, targets[:, :1].long())[:, 0]
        return smooth_l1_loss(value, wanted_value.detach(), reduction="none")

    def run(net: nn.Module, images: Tensor) -> Tensor:
        """Return the walk in each image, (batch, num_moves + 1, 3) voxels; the end is the last."""
        if not walks:
            guess: Tensor = net(images)
            return guess[:, None]
        places = [_centres(images)]
        for _ in range(num_moves):
            values = net(_states(images, places[-1].cpu()).to(images))
            moved = places[-1] + MOVES.to(images.device)[values.argmax(dim=1)]
            places.append(_within(moved, images.shape[2:]))
        end = torch.stack(places[-NUM_LAST:]).double().mean(dim=0)
        return torch.stack([*places[:-1], end], dim=1).float()

    def score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
        """Return (batch, 1): the distance in mm."""
        apart = (outputs[:, -1] - targets).double() * torch.tensor(spacing_mm, dtype=torch.float64)
        return np.asarray(apart.norm(dim=1, keepdim=True).numpy())

    def metrics(scores: Scores) -> dict[str, float]:
        if not len(scores):
            return {}
        near = scores[:, 0] <= tolerance_mm
        return {"found": float(near.mean()), "distance_mm": float(scores[:, 0].mean())}

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        z = int(target[0].round().clamp(0, image.shape[1] - 1))
        pixels = grey(image[0, z])
        for place in output:
            _dot(pixels, place, PATH)
        _dot(pixels, target, TRUTH)
        return pixels, f"the way to the {wanted} in yellow, the truth in green (its slice)"

    def made_up(generator: torch.Generator, spatial_dims: int) -> tuple[Tensor, Tensor]:
        if spatial_dims != 3:
            raise ValueError("expected a net of spatial_dims = 3: landmarks are found in volumes")
        if not walks:
            return torch.randn((4, 3), generator=generator), torch.zeros((4, 3))
        outputs = torch.randn((4, 2 * len(MOVES)), generator=generator)
        return outputs, torch.tensor([[0, 1.0, 0.0], [1, -1.0, 0.0], [2, 0.5, 1.0], [3, 0.1, 0.0]])

    return Task(
        name="localization",
        headline="found",
        label_kind="map",
        num_outputs=len(MOVES) if walks else 3,
        encode_map=encode_map,
        loss=loss,
        score=score,
        metrics=metrics,
        picture=picture,
        view=view,
        run=run,
        baselines={"mean position": lambda images: _centres(images)[:, None].float()},
        answer="path",
        made_up=made_up,
        covers=(
            "All moves that are played in one patient's images are one unit: their mean gradient "
            "is clipped, and the patients' sum noised."
        ),
    )


def _moved(image: Tensor, offset: Tensor) -> Tensor:
    """Return an image (channel, z, y, x) moved by ``offset`` voxels; its edges are drawn out."""
    at = [
        (torch.arange(length) - by).clamp(0, length - 1)
        for length, by in zip(image.shape[1:], offset.tolist(), strict=True)
    ]
    return image[:, at[0]][:, :, at[1]][:, :, :, at[2]]


def _cubes(images: Tensor, places: Tensor, reach: Tensor) -> Tensor:
    """Return the voxels at ``places`` (n, 3) plus ``reach`` along each axis, edges drawn out."""
    z, y, x = (
        (places[:, axis, None] + reach).clamp(0, images.shape[2 + axis] - 1) for axis in range(3)
    )
    each = torch.arange(len(images))[:, None, None, None]
    return images[each, 0, z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]


def _within(places: Tensor, shape: Sequence[int]) -> Tensor:
    return places.clamp(min=torch.zeros(3).to(places), max=torch.tensor(shape).to(places) - 1)


def _centres(images: Tensor) -> Tensor:
    """Return the middle voxel of each image: (n, 3)."""
    return torch.tensor(images.shape[2:]).div(2, rounding_mode="floor").expand(len(images), 3)


def _dot(pixels: Pixels, place: Tensor, colour: tuple[int, int, int]) -> None:
    y, x = (round(float(c)) for c in place[1:])
    pixels[max(y, 0) : y + 1, max(x, 0) : x + 1] = colour

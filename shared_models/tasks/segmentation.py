"""Segmentation: a class for every voxel, in two or three dimensions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from shared_models.tasks.base import Pixels, Scores, Task, grey

#: Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = {
    "orange": (230, 159, 0),
    "blue": (86, 180, 233),
    "green": (0, 158, 115),
    "pink": (204, 121, 167),
    "yellow": (240, 228, 66),
}
#: More objects than this are none that were numbered one by one.
MOST_INSTANCES = 65_535
#: What a class is called in the name of its metric.
SLUG = re.compile(r"[a-z0-9_]{1,40}")


def make(
    *,
    classes: Sequence[str],
    dice_weight: float = 1.0,
    foreground_weight: float = 1.0,
    instances: bool = False,
) -> Task:
    """Return the task of outlining ``classes`` (without the background, which is 0).

    The loss of an image is its mean cross-entropy, in which a voxel of a class counts
    ``foreground_weight`` times one of the background, plus ``dice_weight`` times its own soft Dice
    loss over the classes. Metrics (MONAI): ``dice`` and ``hd95`` (95th percentile Hausdorff
    distance, mm), each averaged over classes and also per class (``dice_<class>``). An image
    without a class says nothing about that class. With ``instances`` a label map numbers the
    objects of the one class, and every value over 0 is that class: objects are not told apart.

    Raises:
        ValueError: if there is no class, two of one name, or one that no metric can be named after,
            or instances are of several classes.
    """
    classes = [str(name) for name in classes]
    names = [_slug(name) for name in classes]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected one or more different classes, got {len(names)}")
    if not all(SLUG.fullmatch(name) for name in names):
        raise ValueError(
            "expected class names of at most 40 letters from a to z, digits and spaces"
        )

    if instances and len(names) != 1:
        raise ValueError(f"expected one class, whose instances maps number, got {len(names)}")

    largest = MOST_INSTANCES if instances else len(names)
    meaning = "one for each object" if instances else "one for each class of the plan"

    def encode_map(label: NDArray[np.float32]) -> NDArray[np.int64]:
        low, high = np.rint(label.min()), np.rint(label.max())
        if not (low >= 0 and high <= largest):  # so that NaN is refused too
            raise ValueError(f"expected label values from 0 to {largest}, {meaning}")
        return np.minimum(np.rint(label), len(names)).astype(np.int64)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        importance = outputs.new_full((outputs.shape[1],), foreground_weight)
        importance[0] = 1.0
        entropy = cross_entropy(outputs, targets, weight=importance, reduction="none")
        return entropy.flatten(1).mean(dim=1) + dice_weight * _soft_dice_loss(outputs, targets)

    def metrics(scores: Scores) -> dict[str, float]:
        found: dict[str, float] = {}
        for offset, measure in ((0, "dice"), (len(names), "hd95")):
            columns = scores[:, offset : offset + len(names)]
            means = {
                f"{measure}_{name}": float(np.nanmean(column))
                for name, column in zip(names, columns.T, strict=True)
                if np.isfinite(column).any()
            }
            if means:
                found[measure] = float(np.mean(list(means.values())))
                found |= means
        return found

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        guess = output.argmax(dim=0)
        if target.ndim == 3:
            middle = int((target > 0).flatten(1).sum(dim=1).argmax())
            image, target, guess = image[:, middle], target[middle], guess[middle]
        pixels = grey(image[0])
        left, right = _outlined(pixels, target), _outlined(pixels, guess)
        key = ", ".join(f"{c} {n}" for c, n in zip(cycle(COLOURS), classes, strict=False))
        return np.concatenate([left, right], axis=1), f"truth left, prediction right; {key}"

    return Task(
        name="segmentation",
        headline="dice",
        label_kind="map",
        num_outputs=len(names) + 1,
        encode_map=encode_map,
        loss=loss,
        score=_score,
        metrics=metrics,
        picture=picture,
    )


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def _soft_dice_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - soft Dice per image, averaged over the foreground classes: (batch,)."""
    shares = torch.softmax(outputs, dim=1)[:, 1:].flatten(2)
    truth = one_hot(targets, outputs.shape[1]).movedim(-1, 1)[:, 1:].flatten(2).to(shares.dtype)
    overlap = (shares * truth).sum(dim=2)
    total = shares.sum(dim=2) + truth.sum(dim=2)
    return 1 - ((2 * overlap + 1) / (total + 1)).mean(dim=1)


def _score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
    """Return (batch, 2 x classes): Dice, then 95 % Hausdorff distance in mm; NaN says nothing."""
    from monai.metrics import compute_dice, compute_hausdorff_distance

    num_classes = outputs.shape[1]
    guess = one_hot(outputs.argmax(dim=1), num_classes).movedim(-1, 1).float().cpu()
    truth = one_hot(targets, num_classes).movedim(-1, 1).float().cpu()
    dice = compute_dice(guess, truth, include_background=False).double().numpy()
    both = (guess.flatten(2).any(dim=2) & truth.flatten(2).any(dim=2))[:, 1:].numpy()
    distance = np.full_like(dice, np.nan)
    if both.any():
        rows = torch.from_numpy(both.any(axis=1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI deprecates an argument it passes itself
            distance[rows.numpy()] = compute_hausdorff_distance(
                guess[rows], truth[rows], percentile=95, spacing=list(spacing_mm)
            ).numpy()
    distance[~both | ~np.isfinite(distance)] = np.nan
    return np.concatenate([dice, distance], axis=1)


def _outlined(pixels: Pixels, label: Tensor) -> Pixels:
    """Tint each class over a copy of ``pixels`` (y, x, 3)."""
    numbers, tinted = label.cpu().numpy(), pixels.astype(np.float32)
    for number in range(1, int(numbers.max()) + 1):
        colour = np.array(list(COLOURS.values())[(number - 1) % len(COLOURS)], dtype=np.float32)
        tinted[numbers == number] = 0.45 * tinted[numbers == number] + 0.55 * colour
    return tinted.round().astype(np.uint8)

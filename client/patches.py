"""Random patches of prepared volumes, cut without reading the rest of them.

A volume of the cache is mapped into memory, so that a patch costs what it holds and not what the
volume does. Where the foreground is stands in a file beside the volume, found once.

Guarantees:
    Patches follow the law of MONAI's RandCropByPosNegLabeld, or of its RandSpatialCropd.
    Every patch lies inside its volume, and is a view of it.
    All chance comes from the randomness given: under privacy terms nobody can replay the draws.

References:
    MONAI 1.6, monai.transforms.utils: generate_pos_neg_label_crop_centers, correct_crop_centers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared_models.files import replace
from shared_models.randomness import Randomness

FOREGROUND = "foreground.npy"
Indices = NDArray[np.int64]


def corner(
    shape: Sequence[int],
    size: Sequence[int],
    randomness: Randomness,
    *,
    foreground: Indices | None = None,
    share: float = 0.5,
) -> tuple[int, ...]:
    """Draw where a patch begins in a volume.

    Args:
        shape: of the volume, ([z,] y, x).
        size: of the patch, along the same axes.
        randomness: two numbers are drawn, or one along each axis.
        foreground: flat indices of the voxels whose label is not 0, in order. Without it every
            place is as likely as any other.
        share: how likely the patch's middle is a voxel of the foreground, else of the background;
            where there is no foreground, or nothing else, it is one of what there is. A patch that
            would reach over an edge is moved inside.

    Raises:
        ValueError: if the volume is smaller than the patch.
    """
    room = [long - short for long, short in zip(shape, size, strict=True)]
    if min(room) < 0:
        raise ValueError(f"expected an image of at least {tuple(size)} voxels, got {tuple(shape)}")
    if foreground is None:
        drawn = randomness.uniform(len(room))
        return tuple(int(u * (r + 1)) for u, r in zip(drawn, room, strict=True))
    which, where = randomness.uniform(2)
    middle = np.unravel_index(_index(foreground, prod(shape), share, which, where), shape)
    begin = (int(m) - s // 2 for m, s in zip(middle, size, strict=True))
    return tuple(min(max(b, 0), r) for b, r in zip(begin, room, strict=True))


def _index(foreground: Indices, num_voxels: int, share: float, which: float, where: float) -> int:
    """Return the flat index of a voxel of the foreground, or of the rest, each as likely."""
    num_others = num_voxels - len(foreground)
    if len(foreground) and (not num_others or which < share):
        return int(foreground[int(where * len(foreground))])
    rank = int(where * num_others)
    low, high = 0, len(foreground)
    while low < high:  # how many voxels of the foreground come before the rank-th of the others
        middle = (low + high) // 2
        low, high = (middle + 1, high) if foreground[middle] - middle <= rank else (low, middle)
    return rank + low


def cut(volume: Tensor, begin: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return the patch of ``volume``, (..., [z,] y, x), that begins there: a view, not a copy."""
    for axis, (start, length) in enumerate(zip(begin, size, strict=True), start=-len(size)):
        volume = volume.narrow(axis, start, length)
    return volume


def foreground_of(label: NDArray[np.float32]) -> Indices:
    """Return the flat indices of the voxels whose label is not 0, in order.

    Of a map from the cache they are kept in a file beside it, and mapped into memory from there.
    """
    file = _beside(label)
    if file is None:
        return np.flatnonzero(label)
    with suppress(OSError, ValueError, EOFError):
        found: Indices = np.load(file, mmap_mode="r", allow_pickle=False)
        is_whole = found.dtype == np.int64 and found.ndim == 1
        if is_whole and (not len(found) or found[-1] < label.size):
            return np.asarray(found)
    found = np.flatnonzero(label)
    stream = io.BytesIO()
    np.save(stream, found)
    with suppress(OSError):  # a full disk, or a cache that may only be read: found again next time
        replace(file, stream.getvalue(), mode=0o600)
    return found


def _beside(label: NDArray[np.float32]) -> Path | None:
    """Return the file for the foreground of a whole mapped array, None if it is none."""
    if not isinstance(label, np.memmap) or label.filename is None or label.base is None:
        return None
    file = Path(label.filename)
    return file.with_name(FOREGROUND) if file.name == "label.npy" else None

"""Steps that change the grid: image and label go through the same ones.

Sizes are voxels and spacings millimetres, both in the order (z, y, x); two numbers mean (y, x) and
leave z alone. Images are interpolated linearly, labels by the nearest voxel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

from shared_models.imaging import Step
from shared_models.volume import Volume


def resample(*, spacing_mm: Sequence[float]) -> Step:
    """Resample to ``spacing_mm``; the field of view is kept to within half a voxel."""
    _check("spacing_mm", spacing_mm)

    def step(volume: Volume, *, is_label: bool) -> Volume:
        wanted = _whole(spacing_mm, volume.spacing_mm)
        size = tuple(
            max(1, round(n * have / want))
            for n, have, want in zip(volume.data.shape, volume.spacing_mm, wanted, strict=True)
        )
        return _interpolate(volume, size, is_label=is_label)

    return step


def resize(*, size: Sequence[int]) -> Step:
    """Stretch to ``size`` voxels, whatever the aspect ratio."""
    _check("size", size)

    def step(volume: Volume, *, is_label: bool) -> Volume:
        return _interpolate(volume, _whole(size, volume.data.shape), is_label=is_label)

    return step


def crop_or_pad(*, size: Sequence[int]) -> Step:
    """Cut or extend around the centre to ``size`` voxels, with the image's minimum as border."""
    _check("size", size)

    def step(volume: Volume, *, is_label: bool) -> Volume:
        wanted = _whole(size, volume.data.shape)
        fill = 0.0 if is_label else float(volume.data.min())
        data = np.full(wanted, fill, dtype=np.float32)
        inside, outside, origin = [], [], []
        for have, want in zip(volume.data.shape, wanted, strict=True):
            cut, pad, length = (
                max(0, (have - want) // 2),
                max(0, (want - have) // 2),
                min(have, want),
            )
            inside.append(slice(cut, cut + length))
            outside.append(slice(pad, pad + length))
            origin.append(cut - pad)
        data[tuple(outside)] = volume.data[tuple(inside)]
        return Volume(data, _moved(volume.affine, origin), volume.modality)

    return step


def _interpolate(volume: Volume, size: tuple[int, ...], *, is_label: bool) -> Volume:
    if size == volume.data.shape:
        return volume
    tensor = torch.from_numpy(np.ascontiguousarray(volume.data))[None, None]
    if is_label:
        data = interpolate(tensor, size, mode="nearest-exact")
    else:
        data = interpolate(_smoothed(tensor, size), size, mode="trilinear", align_corners=False)
    scale = np.array([have / want for have, want in zip(volume.data.shape, size, strict=True)])
    affine = volume.affine.copy()
    affine[:3, :3] *= scale[::-1]
    affine[:3, 3] = (volume.affine @ np.append((scale[::-1] - 1) / 2, 1.0))[:3]
    return Volume(data[0, 0].numpy(), affine, volume.modality)


def _smoothed(tensor: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Average over whole blocks first where an axis shrinks by two or more, against aliasing."""
    blocks = [max(1, int(n // m)) for n, m in zip(tensor.shape[2:], size, strict=True)]
    if max(blocks) == 1:
        return tensor
    shrunk = [-(-n // b) for n, b in zip(tensor.shape[2:], blocks, strict=True)]
    exact = [n == s * b for n, s, b in zip(tensor.shape[2:], shrunk, blocks, strict=True)]
    return (
        torch.nn.functional.avg_pool3d(tensor, blocks)
        if all(exact)
        else (torch.nn.functional.adaptive_avg_pool3d(tensor, (shrunk[0], shrunk[1], shrunk[2])))
    )


def _moved(affine: np.ndarray, origin_zyx: Sequence[int]) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 3] = (affine @ np.array([*origin_zyx[::-1], 1.0]))[:3]
    return moved


def _whole(given: Sequence[float], have: Sequence[float]) -> tuple:  # type: ignore[type-arg]
    return (have[0], *given) if len(given) == 2 else tuple(given)


def _check(name: str, values: Sequence[float]) -> None:
    if len(values) not in (2, 3) or min(values) <= 0:
        raise ValueError(f"expected {name} as two or three positive numbers, got {list(values)}")

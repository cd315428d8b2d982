"""A model's outputs for one study, and their way back onto the study's own voxels.

The plan's imaging steps cut, turn and resample; what they did stands in the affine of the volume
they return. So an answer is carried back by position in millimetres, whatever the steps were.

Guarantees:
    What lies at a place in the patient in the outputs lies there in the answer, to rounding.
    Where the model saw nothing, the answer says nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from client.display.release import Released
from shared_models.cohort import steps_of
from shared_models.errors import DataError
from shared_models.imaging import pipeline
from shared_models.volume import Volume

#: Slices that a two-dimensional net is given at a time.
BATCH = 16
#: Affines are products of a few float64; their differences from whole numbers below this are none.
ROUNDING = 9


def prepare(volume: Volume, released: Released, *, plugins: Collection[str] = ()) -> Volume:
    """Take the plan's imaging steps.

    Raises:
        DataError: if the image does not suit them.
    """
    prepared, _ = pipeline(steps_of(released.plan), plugins=plugins)(volume)
    if not prepared.data.size:
        raise DataError("nothing is left of the image after the plan's imaging steps")
    if not np.isfinite(prepared.data).all():
        raise DataError("the image holds values that are no numbers; export it again")
    return prepared


@torch.no_grad()
def outputs(prepared: Volume, released: Released) -> Tensor:
    """Return what the net gives: (1, channel, z, y, x), or (z, channel, ...) slice by slice.

    Raises:
        DataError: if the image's size does not suit the net.
    """
    image = torch.from_numpy(np.ascontiguousarray(prepared.data))
    batch = image[None, None] if released.spatial_dims == 3 else image[:, None]
    parts = [batch[start : start + BATCH] for start in range(0, len(batch), BATCH)]
    try:
        found = torch.cat([released.net(part).float() for part in parts])
    except RuntimeError:
        raise misfit(prepared) from None
    if not torch.isfinite(found).all():
        raise DataError("the model's answer holds values that are no numbers; it cannot be used")
    return found


def misfit(prepared: Volume) -> DataError:
    """Return the error that says that the image's size does not suit the net."""
    size = " x ".join(str(n) for n in prepared.data.shape)
    return DataError(
        f"an image of {size} voxels after the plan's imaging steps does not fit the model; "
        "it was made for images of another size"
    )


def onto(
    values: NDArray[np.float32], affine: NDArray[np.float64], grid: Volume
) -> NDArray[np.float32]:
    """Return ``values`` (z, y, x) with ``affine``, interpolated linearly at the voxels of ``grid``.

    Voxels of ``grid`` outside the field of view of ``values`` are 0.
    """
    matrix, offset = _mapping(affine, grid.affine)
    is_straight = not (matrix - np.diag(np.diag(matrix))).any()
    found = ndimage.affine_transform(
        values,
        np.diag(matrix) if is_straight else matrix,  # for a diagonal there is a faster way
        offset,
        output_shape=grid.data.shape,
        order=1,
        mode="nearest",
    )
    for inside in _inside(values.shape, affine, grid):
        found *= inside
    return np.asarray(found, np.float32)


def seen(shape: tuple[int, ...], affine: NDArray[np.float64], grid: Volume) -> NDArray[np.bool_]:
    """Return which voxels of ``grid`` lie in the field of view of an image, edges included."""
    found = np.ones(grid.data.shape, bool)
    for inside in _inside(shape, affine, grid):
        found &= inside
    return found


def _inside(
    shape: tuple[int, ...], affine: NDArray[np.float64], grid: Volume
) -> Iterator[NDArray[np.bool_]]:
    """Yield for each axis of an image which voxels of ``grid`` lie between its ends.

    What does not depend on an axis of ``grid`` has the size 1 along it.
    """
    matrix, offset = _mapping(affine, grid.affine)
    axes = np.ogrid[tuple(slice(n) for n in grid.data.shape)]
    for row, start, size in zip(matrix, offset, shape, strict=True):
        parts = [step * axis for step, axis in zip(row, axes, strict=True) if step]
        place = sum(parts, start=np.full((1, 1, 1), start))
        yield (place > -0.5 - 1e-6) & (place < size - 0.5 + 1e-6)


def are_same_slices(one: Volume, other: Volume) -> bool:
    """Tell whether slice by slice both are of the same places, whatever was done within them."""
    matrix, offset = _mapping(one.affine, other.affine)
    is_kept = np.allclose(matrix[0], (1, 0, 0)) and np.isclose(offset[0], 0, atol=1e-6)
    return one.data.shape[0] == other.data.shape[0] and bool(is_kept)


def _mapping(
    inner: NDArray[np.float64], outer: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what takes (z, y, x) indices of ``outer`` to those of ``inner``: matrix and offset."""
    both = np.linalg.inv(inner) @ outer
    matrix = np.round(both[:3, :3][::-1, ::-1], ROUNDING)
    return matrix, np.round(both[:3, 3][::-1], ROUNDING)

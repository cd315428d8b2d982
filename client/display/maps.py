"""Answers that are maps: a class for every voxel, outlined, measured, and told as DICOM SEG and SR.

The shares of the classes, not the classes, are carried back to the study's own voxels, linearly;
each voxel then belongs to the class with the greatest share.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from client.display import infer
from client.display.base import Asked, Kind, Result
from client.display.prediction import Legend, Outlined, Region
from client.display.study import Study

if TYPE_CHECKING:
    from torch import Tensor

    from client.display.objects import Origin

#: Okabe and Ito's colours, told apart by the colour-blind, as in the study report's pictures.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442")
MOST_KEY_SLICES = 3
Labels = NDArray[np.uint8]


def read(outputs: Tensor, asked: Asked) -> Result:
    """Return the regions of all classes on the voxels of the volume that is shown.

    Raises:
        DataError: if the outputs are not of the voxels the net was given.
    """
    names, shares = asked.released.classes, _shares(outputs)
    if shares.shape[1:] != asked.prepared.data.shape:
        raise infer.misfit(asked.prepared)
    labels, best = labelled(shares, asked)
    legend = tuple(
        Legend(name=name, colour=colour)
        for name, colour in zip(names, cycle(COLOURS), strict=False)
    )
    regions = tuple(
        _region(labels, best, number, one, asked.study) for number, one in enumerate(legend, 1)
    )
    return Result(Outlined(regions=regions), labels, legend, _key_slices(labels))


def labelled(shares: NDArray[np.float32], asked: Asked) -> tuple[Labels, NDArray[np.float32]]:
    """Return each shown voxel's class, uint8 (z, y, x), and that class's share of certainty.

    Args:
        shares: (class, z, y, x) on the prepared voxels, the background first.
        asked: where the prepared and the shown voxels lie.
    """
    grid = asked.study.shown
    best = infer.onto(shares[0], asked.prepared.affine, grid)
    labels = np.zeros(grid.data.shape, np.uint8)
    for number, share in enumerate(shares[1:], 1):
        found = infer.onto(share, asked.prepared.affine, grid)
        is_more = found > best
        labels[is_more] = number
        np.maximum(best, found, out=best)
    return labels, best


def report(result: Result, headers: Sequence[Any], origin: Origin) -> list[tuple[str, Any]]:
    """Return the segmentation and the measurements; neither if nothing was found."""
    from client.display import objects

    assert isinstance(result.answer, Outlined) and result.labels is not None
    found = [region for region in result.answer.regions if region.num_voxels]
    if not found:
        return []
    segmentation = objects.segmentation(result.labels, result.answer.regions, headers, origin)
    measured = objects.measured_regions(result.answer.regions, segmentation, headers, origin)
    return [("segmentation.dcm", segmentation), ("measurements.dcm", measured)]


def _shares(outputs: Tensor) -> NDArray[np.float32]:
    """Return (class, z, y, x): of one volume, or of slices one after the other."""
    import torch

    shares = torch.softmax(outputs, dim=1)
    whole = shares[0] if shares.ndim == 5 else shares.movedim(0, 1)
    return np.asarray(whole.numpy(), np.float32)


def _region(
    labels: Labels, best: NDArray[np.float32], number: int, legend: Legend, study: Study
) -> Region:
    mask = labels == number
    count = int(mask.sum())
    base = {"name": legend.name, "colour": legend.colour, "num_voxels": count}
    share = count / mask.size
    if not count:
        return Region.model_validate({**base, "share_of_image": 0.0})
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    by_slice = mask.sum(axis=(1, 2))
    return Region.model_validate(
        {
            **base,
            **_size(mask, box, study),
            "share_of_image": share,
            "first_slice": box[0].start + 1,
            "last_slice": box[0].stop,
            "largest_slice": int(by_slice.argmax()) + 1,
            "voxels_by_slice": [int(count) for count in by_slice],
            "mean_value": round(float(study.shown.data[mask].mean()), 2),
            "confidence": round(min(float(best[mask].mean()), 1.0), 4),
            "is_at_edge": any(
                side.start == 0 or side.stop == size
                for side, size in zip(box, mask.shape, strict=True)
                if size > 1
            ),
        }
    )


def _size(mask: NDArray[np.bool_], box: tuple[slice, ...], study: Study) -> dict[str, Any]:
    """Return what is known of a region's size: nothing where a pixel has no size."""
    if study.kind == "picture":
        return {}
    spacing = study.shown.spacing_mm
    count = float(mask.sum())
    extents = tuple(
        round((side.stop - side.start) * step, 2) for side, step in zip(box, spacing, strict=True)
    )
    if mask.shape[0] == 1:
        return {"area_cm2": round(count * spacing[1] * spacing[2] / 100, 4), "extent_mm": extents}
    voxel_ml = abs(float(np.linalg.det(study.shown.affine[:3, :3]))) / 1000
    return {"volume_ml": round(count * voxel_ml, 4), "extent_mm": extents}


def _key_slices(labels: Labels) -> tuple[int, ...]:
    """Return the slices where each class is largest, the rarest class first; else the middle."""
    numbers, counts = np.unique(labels[labels > 0], return_counts=True)
    best = [
        int((labels == number).sum(axis=(1, 2)).argmax()) for number in numbers[counts.argsort()]
    ]
    return tuple(dict.fromkeys(best))[:MOST_KEY_SLICES] or (labels.shape[0] // 2,)


KIND = Kind(read, report)

"""Steps that change the grid: image and label go through the same ones.

Sizes are voxels and spacings millimetres, both in the order (z, y, x); two numbers mean (y, x) and
leave z alone. Images are interpolated linearly, labels by the nearest voxel. What a crop is guided
by is found in the image, never in the label map, which there is none of at the bedside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn.functional import interpolate

from shared_models.errors import DataError
from shared_models.imaging import Pair, Step
from shared_models.volume import Volume

Mask = NDArray[np.bool_]
Box = tuple[slice, ...]
#: Air, and with it the lungs, is below this in CT; the body above.
AIR_HU = -400.0
#: Less air than this inside the body is no lung.
LEAST_LUNG_ML = 50.0


def resample(*, spacing_mm: Sequence[float]) -> Step:
    """Resample to ``spacing_mm``; the field of view is kept to within half a voxel."""
    _check("spacing_mm", spacing_mm)

    def move(volume: Volume, is_label: bool) -> Volume:
        wanted = _whole(spacing_mm, volume.spacing_mm)
        size = tuple(
            max(1, round(n * have / want))
            for n, have, want in zip(volume.data.shape, volume.spacing_mm, wanted, strict=True)
        )
        return _interpolate(volume, size, is_label=is_label)

    return _on_both(move)


def resize(*, size: Sequence[int]) -> Step:
    """Stretch to ``size`` voxels, whatever the aspect ratio."""
    _check("size", size)

    def move(volume: Volume, is_label: bool) -> Volume:
        return _interpolate(volume, _whole(size, volume.data.shape), is_label=is_label)

    return _on_both(move)


def crop_or_pad(*, size: Sequence[int]) -> Step:
    """Cut or extend around the centre to ``size`` voxels, with the image's minimum as border."""
    _check("size", size)

    def move(volume: Volume, is_label: bool) -> Volume:
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

    return _on_both(move)


def crop_box(*, low: Sequence[float], high: Sequence[float]) -> Step:
    """Cut out a fixed box, its corners given as parts of the field of view from 0 to 1.

    Voxels that are cut through stay.
    """
    sides = list(zip(low, high, strict=True))
    if len(sides) not in (2, 3) or not all(0 <= a < b <= 1 for a, b in sides):
        raise ValueError("expected low and high as two or three numbers, 0 <= low < high <= 1")
    if len(sides) == 2:
        sides = [(0.0, 1.0), *sides]

    def move(volume: Volume, is_label: bool) -> Volume:
        extents = zip(volume.data.shape, sides, strict=True)
        box = tuple(slice(floor(n * a), ceil(n * b)) for n, (a, b) in extents)
        return _cut(volume, box)

    return _on_both(move)


def crop_foreground(*, margin_mm: float = 5.0) -> Step:
    """Cut to what is brighter than Otsu's threshold: its largest connected part and a margin."""

    def find(image: Volume) -> Mask:
        from skimage.filters import threshold_otsu

        if image.data.max() == image.data.min():
            raise DataError("crop-foreground: the image is of one value; leave it out")
        return _largest(image.data > threshold_otsu(image.data))

    return _around(find, margin_mm)


def crop_lungs(*, margin_mm: float = 10.0) -> Step:
    """Cut a chest CT in HU to the air inside the body and a margin.

    Air outside the body touches an edge of its slice. Other images are refused: in a film without
    units there is no telling lung from air.
    """

    def find(image: Volume) -> Mask:
        if image.modality != "CT":
            raise DataError("crop-lungs: expected a CT in HU, got another modality")
        air = image.data < AIR_HU
        inside = np.stack([plane & ~_touching_the_edge(plane) for plane in air])
        lungs = _largest(inside, number=2)
        if lungs.sum() * float(np.prod(image.spacing_mm)) < LEAST_LUNG_ML * 1000:
            raise DataError("crop-lungs: no lung was found; leave the image out")
        return lungs

    return _around(find, margin_mm)


def orient(*, axes: str = "LPS") -> Step:
    """Turn and flip the axes, without interpolation, so that x, y and z point as ``axes`` says.

    One letter for each: L or R, P or A, S or I. LPS is DICOM's patient system, and the one the nets
    see most often.
    """
    pairs = [{"L", "R"}, {"P", "A"}, {"S", "I"}]
    if len(axes) != 3 or any(sum(letter in pair for letter in axes) != 1 for pair in pairs):
        raise ValueError(f"expected three letters such as LPS, got '{axes}'")

    def move(volume: Volume, is_label: bool) -> Volume:
        from nibabel import orientations

        ras = np.diag([-1.0, -1.0, 1.0, 1.0])
        turn = orientations.ornt_transform(
            orientations.io_orientation(ras @ volume.affine), orientations.axcodes2ornt(axes)
        )
        data = volume.data.transpose(2, 1, 0)
        affine = volume.affine @ orientations.inv_ornt_aff(turn, data.shape)
        turned = orientations.apply_orientation(data, turn).transpose(2, 1, 0)
        return Volume(np.ascontiguousarray(turned), affine, volume.modality)

    return _on_both(move)


def _on_both(move: Callable[[Volume, bool], Volume]) -> Step:
    """Return the step that moves image and label map alike: ``move(volume, is_label)``."""

    def step(image: Volume, label: Volume | None = None) -> Pair:
        return move(image, False), None if label is None else move(label, True)

    return step


def _around(find: Callable[[Volume], Mask], margin_mm: float) -> Step:
    """Return the step that cuts image and label map to what ``find`` finds in the image."""
    if not margin_mm >= 0:
        raise ValueError(f"expected a margin_mm of at least 0, got {margin_mm}")

    def step(image: Volume, label: Volume | None = None) -> Pair:
        (found,) = ndimage.find_objects(find(image).astype(np.uint8))
        margins = [round(margin_mm / spacing) for spacing in image.spacing_mm]
        box = tuple(
            slice(max(0, side.start - margin), min(n, side.stop + margin))
            for side, margin, n in zip(found, margins, image.data.shape, strict=True)
        )
        return _cut(image, box), None if label is None else _cut(label, box)

    return step


def _cut(volume: Volume, box: Box) -> Volume:
    affine = _moved(volume.affine, [side.start for side in box])
    return Volume(np.ascontiguousarray(volume.data[box]), affine, volume.modality)


def _largest(mask: Mask, *, number: int = 1) -> Mask:
    """Keep the ``number`` largest connected parts."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = np.argsort(sizes)[::-1][:number]
    return np.isin(parts, kept[sizes[kept] > 0])


def _touching_the_edge(plane: Mask) -> Mask:
    parts, _ = ndimage.label(plane)
    edge = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    return np.isin(parts, np.setdiff1d(edge, 0))


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

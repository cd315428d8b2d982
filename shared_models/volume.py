"""Volume: the one image type between rooms, and how to read one.

A volume is float32 (z, y, x) with a 4x4 affine from (x, y, z) voxel indices to millimetres in LPS
(x to the patient's left, y to the back, z up; PS3.3 C.7.6.2.1.1). A plain picture is one slice of
1 mm pixels. Which reader opens a file is decided by its name; a folder is read as one DICOM series.

References:
    DICOM PS3.3 C.7.6.2 (Image Plane), C.11.1 (Modality LUT). NIfTI-1 is RAS: x and y change sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI = (".nii", ".nii.gz")
#: Modalities whose images have no place in the patient (PS3.3 C.7.3.1.1.1).
PROJECTIONS = ("CR", "DX", "IO", "MG", "PX", "RG")
#: Spacing between slices may differ by this much before the series is refused, in mm.
POSITION_TOLERANCE_MM = 0.05


class Volume(NamedTuple):
    """``data``: float32 (z, y, x); ``affine``: float64 (4, 4), (x, y, z) index to mm, LPS."""

    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    modality: str = "OT"

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along (z, y, x), in mm."""
        x, y, z = (float(np.linalg.norm(self.affine[:3, axis])) for axis in range(3))
        return z, y, x


def read_volume(path: Path) -> Volume:
    """Read a picture, a NIfTI file, a DICOM file or a folder that holds one DICOM series.

    Raises:
        DataError: what was wrong and the cure; never the file's name, which may name a patient.
    """
    if not path.exists():
        raise DataError("missing file: the manifest names it, the folder lacks it; restore it")
    try:
        if path.is_dir():
            return _read_series(sorted(p for p in path.iterdir() if p.is_file()))
        if path.name.lower().endswith(NIFTI):
            return _read_nifti(path)
        if path.suffix.lower() in PICTURES:
            return _read_picture(path)
        return _read_series([path])
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot read the image ({type(error).__name__}): expected a whole PNG, JPEG, TIFF, "
            "NIfTI or DICOM file; replace it or take its line out of the manifest"
        ) from None


def _read_picture(path: Path) -> Volume:
    from PIL import Image

    with Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise DataError("expected one picture, got several pages; store each in its own file")
        mode = picture.mode[0] if picture.mode[0] in "IF" else "L"
        data = np.asarray(picture.convert(mode), dtype=np.float32)[None]
    return Volume(data, np.eye(4))


def _read_nifti(path: Path) -> Volume:
    import nibabel

    image: Any = nibabel.load(path)
    data = np.asarray(image.dataobj, dtype=np.float32)
    if data.ndim != 3:
        raise DataError(f"expected three dimensions, got {data.ndim}")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
    return Volume(np.ascontiguousarray(data.transpose(2, 1, 0)), lps, "MR")


def _read_series(files: Sequence[Path]) -> Volume:
    """Stack the slices of one series by position along their common normal."""
    import pydicom

    slices = [pydicom.dcmread(file) for file in files]
    if not slices:
        raise DataError("the folder holds no images")
    if len({s.SeriesInstanceUID for s in slices}) > 1:
        raise DataError("expected one series in the folder, got several; give each its own folder")
    first = slices[0]
    if len(slices) == 1 and first.Modality in PROJECTIONS:
        return _film(first)
    directions = np.asarray(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(directions[0], directions[1])
    heights = [float(np.dot(normal, np.asarray(s.ImagePositionPatient, float))) for s in slices]
    order = np.argsort(heights)
    step = _slice_step(np.asarray(heights)[order], first)
    row_mm, column_mm = (float(v) for v in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = directions[0] * column_mm
    affine[:3, 1] = directions[1] * row_mm
    affine[:3, 2] = normal * step
    affine[:3, 3] = np.asarray(slices[order[0]].ImagePositionPatient, dtype=np.float64)
    data = np.stack([_pixels(slices[i]) for i in order])
    return Volume(data, affine, str(first.Modality))


def _film(dataset: Any) -> Volume:
    """Read a projection, which has no place in the patient: one slice, in the detector's plane."""
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or (1.0, 1.0)
    row_mm, column_mm = (float(v) for v in spacing)
    affine = np.diag([column_mm, row_mm, 1.0, 1.0])
    return Volume(_pixels(dataset)[None], affine, str(dataset.Modality))


def _slice_step(heights: NDArray[np.float64], first: Any) -> float:
    if len(heights) == 1:
        return float(first.get("SliceThickness") or 1.0)
    steps = np.diff(heights)
    if steps.min() < POSITION_TOLERANCE_MM:
        raise DataError("two slices lie at the same position; remove the duplicates")
    if steps.max() - steps.min() > 2 * POSITION_TOLERANCE_MM:
        raise DataError("the slices are not evenly spaced; a slice is missing or does not belong")
    return float(steps.mean())


def _pixels(dataset: Any) -> NDArray[np.float32]:
    """Return one slice in the modality's own unit (HU for CT), MONOCHROME1 turned upright."""
    pixels = dataset.pixel_array.astype(np.float32)
    if pixels.ndim != 2:
        raise DataError(
            f"expected one grey slice per file, got an array of {pixels.ndim} dimensions"
        )
    pixels *= float(dataset.get("RescaleSlope", 1) or 1)
    pixels += float(dataset.get("RescaleIntercept", 0) or 0)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = pixels.max() + pixels.min() - pixels
    return np.asarray(pixels, dtype=np.float32)

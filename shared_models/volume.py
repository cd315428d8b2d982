"""Volume: the one image type between rooms, and how to read one.

A volume is float32 (z, y, x) with a 4x4 affine from (x, y, z) voxel indices to millimetres in LPS
(x to the patient's left, y to the back, z up; PS3.3 C.7.6.2.1.1). A plain picture is one slice of
1 mm pixels. Which reader opens a file is decided by its name; a folder is read as one DICOM series
(``series.py``).

References:
    DICOM PS3.3 C.7.6.2 (Image Plane). NIfTI-1 is RAS: x and y change sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI = (".nii", ".nii.gz")


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


class Header(NamedTuple):
    """A volume's ``shape`` (z, y, x), affine and modality, without its voxels."""

    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    modality: str = "OT"


class _Reader(NamedTuple):
    picture: Callable[[Path], Any]
    nifti: Callable[[Path], Any]
    dicom: Callable[[Sequence[Path]], Any]


def read_volume(path: Path) -> Volume:
    """Read a picture, a NIfTI file, a DICOM file or a folder that holds one DICOM series.

    Raises:
        DataError: what was wrong and the cure; never the file's name, which may name a patient.
    """
    found: Volume = _read(path, _Reader(_read_picture, _read_nifti, _read_dicom))
    return found


def read_header(path: Path) -> Header:
    """Read of such a file or folder what its headers say; no voxel is looked at.

    Raises:
        DataError: as ``read_volume``, but for damage that only the voxels show.
    """
    found: Header = _read(path, _Reader(_picture_header, _nifti_header, _dicom_header))
    return found


def _read(path: Path, reader: _Reader) -> Any:
    if not path.exists():
        raise DataError("missing file: the manifest names it, the folder lacks it; restore it")
    try:
        if path.is_dir():
            return reader.dicom(sorted(p for p in path.iterdir() if p.is_file()))
        if path.name.lower().endswith(NIFTI):
            return reader.nifti(path)
        if path.suffix.lower() in PICTURES:
            return reader.picture(path)
        return reader.dicom([path])
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


def _picture_header(path: Path) -> Header:
    from PIL import Image

    with Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise DataError("expected one picture, got several pages; store each in its own file")
        columns, rows = picture.size
    return Header((1, rows, columns), np.eye(4))


def _read_nifti(path: Path) -> Volume:
    import nibabel

    image: Any = nibabel.load(path)
    header = _header_of(image)
    data = np.asarray(image.dataobj, dtype=np.float32)
    return Volume(np.ascontiguousarray(data.transpose(2, 1, 0)), header.affine, header.modality)


def _nifti_header(path: Path) -> Header:
    import nibabel

    return _header_of(nibabel.load(path))


def _header_of(image: Any) -> Header:
    """Return the header of a NIfTI image, turned to (z, y, x) and LPS."""
    if len(image.shape) != 3:
        raise DataError(f"expected three dimensions, got {len(image.shape)}")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
    return Header(tuple(int(n) for n in image.shape[::-1]), lps, "MR")


def _read_dicom(files: Sequence[Path]) -> Volume:
    from shared_models.series import read_files

    return read_files(files)


def _dicom_header(files: Sequence[Path]) -> Header:
    from shared_models.series import header, the_one_in

    return header(the_one_in(files))

"""Label maps beside the images: from DICOM segmentations and NIfTI files onto a series' own grid.

Guarantees:
    A label map lies on its image's grid to a twentieth of a voxel, or is refused.
    What is kept holds numbers and the grid: no name, comment or extension of the file it came from.

References:
    DICOM PS3.3 A.51, C.8.20 (Segmentation). NIfTI-1 is RAS: x and y change sign.
"""

from __future__ import annotations

import gzip
import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

from client.config import IngestSettings
from client.ingest import catalogue, shelves
from client.ingest.catalogue import Map
from shared_models.errors import DataError
from shared_models.files import replace
from shared_models.volume import Volume, read_volume

#: How far a voxel of a map may lie from one of the image, in voxels.
TOLERANCE = 0.05
MOST_LABELS = 2**16 - 1
OTHER_GRID = "the label map's grid is not the image's; export both on the same grid"


def referenced(dataset: Dataset) -> str:
    """Return the series that a segmentation says it is of, empty if it does not say."""
    try:
        return str(dataset.ReferencedSeriesSequence[0].SeriesInstanceUID)
    except Exception:  # whatever a broken sequence makes pydicom raise
        return ""


def make_all(settings: IngestSettings, connection: sqlite3.Connection) -> None:
    """Make label maps of the segmentations whose series are volumes by now.

    Raises:
        OSError: if one cannot be written.
    """
    for uid, series_uid, digest, _ in catalogue.segmentations(connection):
        for series in catalogue.series_of(connection, series_uid):
            volume = catalogue.find_volume(connection, series.uid)
            known = catalogue.find_map(connection, series.uid)
            if volume is None or (known is not None and known.volume == volume.digest):
                continue
            file = shelves.pending_file(settings, series=shelves.MAPS, uid=uid, digest=digest)
            reason = None
            try:
                map_, names = read_segmentation(file)
                keep(settings, connection, volume, map_, kind="segmentation", names=names)
            except DataError as error:
                reason = str(error)
            catalogue.judge_segmentation(connection, uid, reason)


def keep(
    settings: IngestSettings,
    connection: sqlite3.Connection,
    volume: catalogue.Volume,
    map_: Volume,
    *,
    kind: Any,
    names: dict[int, str],
) -> None:
    """Keep ``map_`` as the label map of a series, on its image's grid; an older one is swept.

    Raises:
        DataError: if it lies on another grid, or holds what are no labels.
        OSError: if it cannot be written.
    """
    image = read_volume(settings.store / volume.folder)
    labels = onto(map_, image)
    content = encoded(labels, image.affine)
    digest = hashlib.sha256(content).hexdigest()
    patient = volume.folder.partition("/")[0]
    file = f"{patient}/{hashlib.sha256((volume.series + digest).encode()).hexdigest()[:32]}.nii.gz"
    if not (settings.store / file).exists():
        replace(settings.store / file, content, mode=0o600)
    catalogue.put_map(connection, Map(volume.series, file, volume.digest, digest, kind, names))


def read_segmentation(file: Path) -> tuple[Volume, dict[int, str]]:
    """Return a DICOM segmentation as one map of its segments' numbers, and what they mean.

    Raises:
        DataError: if it cannot be read as one, or its segments overlap.
    """
    import highdicom

    try:
        dataset = dcmread(file)
        for segment in dataset.SegmentSequence:  # both are words of people's, and were removed
            for keyword in ("SegmentLabel", "SegmentAlgorithmName"):
                if not segment.get(keyword):
                    setattr(segment, keyword, "removed")
        found = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
        volume = found.get_volume(combine_segments=True)
        names = {
            int(number): _name(found.get_segment_description(number))
            for number in found.segment_numbers
        }
    except Exception as error:  # whatever a broken object makes a reader raise
        raise DataError(
            f"a segmentation cannot be read as one label map ({type(error).__name__}): expected "
            "segments that do not overlap, on the grid of one series"
        ) from None
    affine = np.asarray(volume.affine, np.float64)[:, [2, 1, 0, 3]]
    return Volume(np.asarray(volume.array, np.float32), affine, "SEG"), names


def onto(map_: Volume, image: Volume) -> NDArray[np.uint16]:
    """Return ``map_`` on the grid of ``image``: uint16 (z, y, x), 0 where it has nothing.

    Raises:
        DataError: if it is turned, shifted or scaled by anything but whole voxels, or juts out.
    """
    values = map_.data
    whole = np.rint(values)
    if not values.size or not (np.abs(values - whole).max() < 1e-3 and whole.min() >= 0):
        raise DataError("expected whole numbers from 0 as labels")
    if whole.max() > MOST_LABELS:
        raise DataError(f"expected labels of at most {MOST_LABELS}")
    between = np.linalg.inv(image.affine) @ map_.affine  # a map's (x, y, z) index to the image's
    turn, shift = np.rint(between[:3, :3]), np.rint(between[:3, 3])
    corner = np.array([*reversed(values.shape), 1.0]) - [1, 1, 1, 0]
    exact, rounded = between[:3] @ corner, turn @ corner[:3] + shift
    is_turn = np.array_equal(np.abs(turn) @ np.abs(turn).T, np.eye(3))
    if not is_turn or max(np.abs(exact - rounded).max(), _far(between, shift)) > TOLERANCE:
        raise DataError(OTHER_GRID)
    axes = np.abs(turn).argmax(axis=1)  # the map's axis along each of the image's
    turned = whole.astype(np.uint16).transpose(2, 1, 0).transpose(axes)
    turned = turned[tuple(slice(None, None, int(turn[i, axes[i]])) for i in range(3))]
    low = np.minimum(shift, rounded).astype(int)
    found = np.zeros(tuple(reversed(image.data.shape)), np.uint16)
    if (low < 0).any() or (low + turned.shape > found.shape).any():
        raise DataError(OTHER_GRID)
    found[tuple(slice(a, a + n) for a, n in zip(low, turned.shape, strict=True))] = turned
    return np.ascontiguousarray(found.transpose(2, 1, 0))


def encoded(labels: NDArray[np.uint16], affine: NDArray[np.float64]) -> bytes:
    """Return a NIfTI file that says nothing but labels (z, y, x) and where they lie (LPS)."""
    import nibabel

    narrow = labels.astype(np.uint8 if labels.max(initial=0) < 2**8 else np.uint16)
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    image = nibabel.Nifti1Image(narrow.transpose(2, 1, 0), ras)
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def _far(between: NDArray[np.float64], shift: NDArray[np.float64]) -> float:
    return float(np.abs(between[:3, 3] - shift).max())


def _name(description: Any) -> str:
    """Return what a segment shows, by its code's meaning, which is the standard's."""
    return str(description.segmented_property_type.meaning)[:64].lower()

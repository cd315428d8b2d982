"""Writes long series fast: bodies drawn for every few slices, one tile of noise, one template.

A slice is the body nearest to it plus the tile of noise, shifted and turned by chance. All files of
a series are the bytes of one, with what differs between slices patched in at fixed width.

Guarantees:
    The same seed writes the same bytes.
    A file is what pydicom would write of the same dataset, byte for byte.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import Dataset, dcmwrite

from shared_models.phantoms.anatomy import ANYWHERE, Grid, Labels, Scan, draw_body, draw_noise
from shared_models.phantoms.profiles import HospitalProfile
from shared_models.phantoms.seeds import digest, make_generator

Stored = npt.NDArray[np.int16]
SLICES_PER_BODY = 10
LENGTH_WIDTH = 10
UID_LOW, UID_ROOM = 10**38, 2 * 10**38  # 39 digits, below 2**128: UIDs of one width (PS3.5 B.2)
#: HU of the drawn body, and the signal it gives in the two kinds of MR series.
TISSUES_HU = (-1000.0, -850.0, -95.0, -80.0, 30.0, 60.0, 105.0, 200.0, 300.0)
SIGNALS = {
    "T1": (8.0, 30.0, 880.0, 860.0, 330.0, 420.0, 560.0, 240.0, 200.0),
    "T2": (8.0, 40.0, 620.0, 600.0, 900.0, 260.0, 330.0, 700.0, 760.0),
}


class Template(NamedTuple):
    """A file's bytes up to its pixels, and where in them lies what differs between slices."""

    head: bytearray
    at: dict[str, tuple[int, ...]]


def draw_long(
    profile: HospitalProfile,
    grid: Grid,
    *,
    person: tuple[str | int, ...],
    has_lesion: bool,
    lesion_growth: float = 1.0,
) -> Scan:
    """Return a body for every few slices of ``grid``; ``person`` decides who it is."""
    coarse = grid._replace(num_slices=-(-grid.num_slices // SLICES_PER_BODY))
    return draw_body(
        profile,
        coarse,
        has_lesion=has_lesion,
        rng=make_generator(*person, "anatomy"),
        lesion_rng=make_generator(*person, "lesion"),
        build=ANYWHERE,
        lesion_growth=lesion_growth,
    )


def labels_of(scan: Scan, grid: Grid) -> Labels:
    """Return the label map of every slice, uint8 (z, y, x)."""
    return scan.labels.repeat(SLICES_PER_BODY, axis=0)[: grid.num_slices]


def make_slices(
    scan: Scan, profile: HospitalProfile, *, num_slices: int, rng: np.random.Generator
) -> Iterator[Stored]:
    """Yield the stored values of each slice, from the feet up; each is overwritten by the next."""
    size = scan.hu.shape[1]
    bodies = _encode(scan.hu, profile)
    drawn = draw_noise((1, 2 * size, 2 * size), profile, rng)[0]
    tile = np.rint(drawn / np.float32(profile.RescaleSlope)).astype(np.int16)
    turned = [
        np.ascontiguousarray(tile[::down, ::across]) for down in (1, -1) for across in (1, -1)
    ]
    lowest = -(2 ** (profile.BitsStored - 1)) if profile.is_signed else 0
    highest = min(lowest + 2**profile.BitsStored - 1, 2**15 - 1)
    stored = np.empty((size, size), np.int16)
    for z in range(num_slices):
        y, x, turn = (int(v) for v in rng.integers(0, (size, size, 4)))
        noise = turned[turn][y : y + size, x : x + size]
        np.add(bodies[z // SLICES_PER_BODY], noise, out=stored)
        yield np.clip(stored, lowest, highest, out=stored)


def write_long(
    folder: Path,
    dataset: Dataset,
    slices: Iterator[Stored],
    *,
    grid: Grid,
    names: tuple[str | int, ...],
    is_top_first: bool = False,
) -> None:
    """Write a file per slice into ``folder``, which is made; ``names`` decide their UIDs."""
    folder.mkdir(parents=True)
    template = make_template(dataset, grid)
    for z, stored in enumerate(slices):
        number = grid.num_slices - z if is_top_first else z + 1
        fill(
            template,
            number=number,
            height_mm=grid.origin_mm[2] + z * grid.thickness_mm,
            names=names,
        )
        descriptor = os.open(folder / f"{number}.dcm", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            size = os.writev(descriptor, [template.head, stored.data])
        finally:
            os.close(descriptor)
        if size != len(template.head) + stored.nbytes:
            raise OSError("the disk is full")


def make_template(dataset: Dataset, grid: Grid) -> Template:
    """Return a template of ``dataset``, which gets placeholders for what differs."""
    set_slice(dataset, uid=_uid("template"), number=0, place=grid.origin_mm)
    dataset.PixelData = bytes(2 * grid.size**2)
    stream = io.BytesIO()
    dcmwrite(stream, dataset, enforce_file_format=True)
    read: Any = pydicom.dcmread(io.BytesIO(stream.getvalue()))
    begin = {
        keyword: read.get_item(keyword).value_tell
        for keyword in ("SOPInstanceUID", "InstanceNumber", "SliceLocation", "PixelData")
    }
    position = read.get_item("ImagePositionPatient")
    content = stream.getvalue()
    own_uid = dataset.SOPInstanceUID.encode()
    at = {
        "uid": (content.index(own_uid), begin["SOPInstanceUID"]),
        "number": (begin["InstanceNumber"],),
        "height": (begin["SliceLocation"], position.value_tell + position.length - LENGTH_WIDTH),
    }
    return Template(bytearray(content[: begin["PixelData"]]), at)


def set_slice(
    dataset: Dataset, *, uid: str, number: int, place: tuple[float, float, float]
) -> None:
    """Set what differs between slices, at fixed width."""
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID(uid)
    dataset.InstanceNumber = _number(number)
    dataset.ImagePositionPatient = [_length(v) for v in place]
    dataset.SliceLocation = _length(place[2])


def fill(
    template: Template, *, number: int, height_mm: float, names: tuple[str | int, ...]
) -> None:
    """Patch a slice's own values into the template."""
    values = {
        "uid": slice_uid(*names, number),
        "number": _number(number),
        "height": _length(height_mm),
    }
    for name, value in values.items():
        for place in template.at[name]:
            template.head[place : place + len(value)] = value.encode()


def slice_uid(*names: str | int) -> str:
    """Return a UID of 44 characters for a slice."""
    return _uid(*names, "slice")


def _uid(*names: str | int) -> str:
    return f"2.25.{UID_LOW + digest(*names) % UID_ROOM}"


def _number(number: int) -> str:
    return f"{number:06d}"


def _length(mm: float) -> str:
    return f"{mm:+010.3f}"


def _encode(hu: npt.NDArray[np.float32], profile: HospitalProfile) -> Stored:
    """Return the bodies as stored values, as MR signal with its bias field where it is MR."""
    values: npt.NDArray[Any]
    if profile.Modality == "MR":
        along = np.linspace(-1, 1, hu.shape[1])
        field = 1 + profile.bias_field * (0.6 * along[:, None] + 0.3 * along * along - 0.1)
        values = np.interp(hu, TISSUES_HU, SIGNALS[profile.ConvolutionKernel]) * field
    else:
        values = (hu - np.float32(profile.RescaleIntercept)) / np.float32(profile.RescaleSlope)
    return np.rint(values).astype(np.int16)

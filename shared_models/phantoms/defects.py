"""What goes wrong with series in hospitals, each as a change to a sound one.

A change takes the slices of a sound series, from the feet up, with the volume they are, and returns
what a hospital's export would hold instead. Lengths are mm, LPS.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite, uid

from shared_models.phantoms.seeds import make_uid
from shared_models.volume import Volume


class Export(NamedTuple):
    """``parts``: what is written, a file each; ``truth``: the volume a reader must return."""

    parts: list[Dataset | bytes]
    truth: Volume


Change = Callable[[Export], Export]
Stored = NDArray[Any]
STEP_MM = 2.5


def slices(export: Export) -> list[Dataset]:
    """Return the parts that are still datasets."""
    return [part for part in export.parts if isinstance(part, Dataset)]


def keep(export: Export) -> Export:
    """Change nothing."""
    return export


def put(*, at: Sequence[int] | None = None, **attributes: Any) -> Change:
    """Set attributes in all slices, or in some; None takes them out."""

    def change(export: Export) -> Export:
        for index in range(len(export.parts)) if at is None else at:
            part = slices(export)[index]
            for keyword, value in attributes.items():
                if value is not None:
                    setattr(part, keyword, deepcopy(value))
                elif keyword in part:
                    delattr(part, keyword)
        return export

    return change


def together(*changes: Change) -> Change:
    """Make several changes, one after the other."""

    def change(export: Export) -> Export:
        for one in changes:
            export = one(export)
        return export

    return change


def drop(*indices: int) -> Change:
    """Lose slices."""
    return lambda export: export._replace(
        parts=[part for z, part in enumerate(export.parts) if z not in indices]
    )


def every(step: int) -> Change:
    """Keep every second (third, ...) slice."""
    return lambda export: export._replace(parts=export.parts[::step])


def move(shift: Callable[[int], Sequence[float]], *, digits: int = 4) -> Change:
    """Add ``shift(z)``, in mm, to each slice's position."""

    def change(export: Export) -> Export:
        for z, part in enumerate(slices(export)):
            place = np.asarray(part.ImagePositionPatient, float) + np.asarray(shift(z), float)
            part.ImagePositionPatient = [round(float(v), digits) for v in place]
        return export

    return change


def add(*attributes: dict[str, Any], source: int = 0) -> Change:
    """Add copies of a slice, each with attributes of its own."""

    def change(export: Export) -> Export:
        made = []
        for index, own in enumerate(attributes):
            part = _copy(slices(export)[source], "added", index)
            for keyword, value in own.items():
                setattr(part, keyword, value)
                if keyword == "SOPClassUID":
                    part.file_meta.MediaStorageSOPClassUID = value
            made.append(part)
        return export._replace(parts=[*export.parts, *made])

    return change


def again(shift_mm: float = 0.0, **attributes: Any) -> Change:
    """Add the whole series once more, moved up by ``shift_mm`` and with other attributes."""

    def change(export: Export) -> Export:
        copies: list[Dataset] = []
        for z, part in enumerate(slices(export)):
            copy = _copy(part, "again", z)
            x, y, height = copy.ImagePositionPatient
            copy.ImagePositionPatient = [x, y, round(float(height) + shift_mm, 4)]
            copy.InstanceNumber = len(export.parts) + z + 1
            for keyword, value in attributes.items():
                setattr(copy, keyword, value)
            copies.append(copy)
        return export._replace(parts=[*export.parts, *copies])

    return change


def turn(orientation: Sequence[float]) -> Change:
    """Lay the whole stack along other directions."""

    def change(export: Export) -> Export:
        cosines = np.reshape(orientation, (2, 3)).astype(float)
        normal = np.cross(cosines[0], cosines[1])
        origin = export.truth.affine[:3, 3]
        for z, part in enumerate(slices(export)):
            part.ImageOrientationPatient = [float(v) for v in orientation]
            part.ImagePositionPatient = [round(float(v), 6) for v in origin + normal * STEP_MM * z]
        affine = export.truth.affine.copy()
        axes = np.stack([cosines[0], cosines[1], normal], axis=1)
        affine[:3, :3] = axes * export.truth.spacing_mm[::-1]
        return export._replace(truth=export.truth._replace(affine=affine))

    return change


def store(values: Callable[[Stored], Stored], truth: Callable[[Stored], Any], **how: Any) -> Change:
    """Store ``values(v)`` of the 12-bit numbers v; a reader must return ``truth(values(v))``."""

    def change(export: Export) -> Export:
        data = []
        for part in slices(export):
            twelve = np.frombuffer(part.PixelData, "<u2").reshape(part.Rows, part.Columns)
            stored = values(twelve)
            part.PixelData = stored.tobytes()
            data.append(np.asarray(truth(stored), np.float64))
            for keyword, value in how.items():
                if value is None:
                    delattr(part, keyword)
                else:
                    setattr(part, keyword, deepcopy(value))
        exact = np.stack(data).astype(np.float32)
        modality = str(slices(export)[0].Modality)
        return export._replace(truth=Volume(exact, export.truth.affine, modality))

    return change


def scale_each(slope_of: Callable[[int], float]) -> Change:
    """Give each slice a slope of its own, as PET has."""

    def change(export: Export) -> Export:
        data = []
        for z, part in enumerate(slices(export)):
            part.RescaleSlope, part.RescaleIntercept = slope_of(z), 0
            twelve = np.frombuffer(part.PixelData, "<u2").reshape(part.Rows, part.Columns)
            data.append(twelve * float(part.RescaleSlope))
        return export._replace(truth=export.truth._replace(data=np.stack(data).astype(np.float32)))

    return change


def transfer(syntax: str) -> Change:
    """Write all slices in another transfer syntax."""

    def change(export: Export) -> Export:
        for part in slices(export):
            if syntax == uid.RLELossless:
                part.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
            elif syntax == uid.ExplicitVRBigEndian:
                part.PixelData = np.frombuffer(part.PixelData, "<u2").byteswap().tobytes()
            part.file_meta.TransferSyntaxUID = uid.UID(syntax)
        return export

    return change


def declare(syntax: str, *, at: int = 3) -> Change:
    """Say that a slice is in a transfer syntax it is not in."""

    def change(export: Export) -> Export:
        content = encode(slices(export)[at])
        old = slices(export)[at].file_meta.TransferSyntaxUID.encode()
        new = syntax.encode().ljust(len(old) + len(old) % 2, b"\0")
        parts = list(export.parts)
        parts[at] = content.replace(old.ljust(len(new), b"\0"), new, 1)
        return export._replace(parts=parts)

    return change


def bare(*, with_meta: bool) -> Change:
    """Write files without preamble, or without file meta information too."""

    def change(export: Export) -> Export:
        parts: list[Dataset | bytes] = []
        for part in slices(export):
            content = encode(part)
            length = int.from_bytes(content[140:144], "little")
            parts.append(content[132:] if with_meta else content[144 + length :])
        return export._replace(parts=parts)

    return change


def cut(num_bytes: int, *, at: int) -> Change:
    """Cut bytes off the end of a file; a positive number keeps so many from its start."""

    def change(export: Export) -> Export:
        parts = list(export.parts)
        part = parts[at]
        content = encode(part) if isinstance(part, Dataset) else part
        parts[at] = content[:num_bytes]
        return export._replace(parts=parts)

    return change


def beside(content: bytes) -> Change:
    """Put a file beside the slices."""
    return lambda export: export._replace(parts=[*export.parts, content])


def enhance(
    sop_class: str,
    *,
    order: Callable[[int], list[int]] = lambda count: list(range(count)),
    each: Callable[[Dataset, int], None] | None = None,
    **attributes: Any,
) -> Change:
    """Make one multi-frame image of the slices; ``each`` may change a frame's functional groups."""

    def change(export: Export) -> Export:
        parts = slices(export)
        whole = _copy(parts[0], "enhanced", 0)
        whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = uid.UID(sop_class)
        for keyword in MOVED:
            delattr(whole, keyword)
        frames = [parts[z] for z in order(len(parts))]
        whole.NumberOfFrames = len(frames)
        whole.SharedFunctionalGroupsSequence = [_shared(parts[0])]
        whole.PerFrameFunctionalGroupsSequence = [_frame(frame) for frame in frames]
        whole.PixelData = b"".join(frame.PixelData for frame in frames)
        for z, groups in enumerate(whole.PerFrameFunctionalGroupsSequence):
            if each is not None:
                each(groups, z)
        for keyword, value in attributes.items():
            setattr(whole, keyword, value)
        return export._replace(parts=[whole])

    return change


#: What an enhanced image says in functional groups.
MOVED = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "SliceLocation",
)


def _shared(part: Dataset) -> Dataset:
    groups = Dataset()
    groups.PixelMeasuresSequence = [_item(part, "PixelSpacing", "SliceThickness")]
    groups.PlaneOrientationSequence = [_item(part, "ImageOrientationPatient")]
    names = ("RescaleSlope", "RescaleIntercept", "RescaleType")
    groups.PixelValueTransformationSequence = [_item(part, *names)]
    return groups


def _frame(part: Dataset) -> Dataset:
    groups, content = Dataset(), Dataset()
    content.StackID, content.TemporalPositionIndex = "1", 1
    groups.FrameContentSequence = [content]
    groups.PlanePositionSequence = [_item(part, "ImagePositionPatient")]
    return groups


def _item(part: Dataset, *keywords: str) -> Dataset:
    item = Dataset()
    for keyword in keywords:
        setattr(item, keyword, part[keyword].value)
    return item


def _copy(part: Dataset, *names: str | int) -> Dataset:
    copy = deepcopy(part)
    copy.SOPInstanceUID = make_uid(part.SOPInstanceUID, *names)
    copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID
    return copy


def encode(part: Dataset) -> bytes:
    """Return the file's bytes."""
    stream = io.BytesIO()
    dcmwrite(stream, part, enforce_file_format=True)
    return stream.getvalue()

"""What one DICOM file says of its slices, before a single pixel is decoded.

``inspect`` parses a header once and returns the slices in the file, each with its place in the
patient, how its values are stored and where they begin, or the reason why the file holds none.

Design: element values are taken from the bytes pydicom read; turning each into a DataElement would
cost twice as much as the parse itself. Sequences, which few files have, go through pydicom.

References:
    DICOM PS3.3 C.7.6.2 (Image Plane), C.7.6.3 (Image Pixel), C.7.6.16 (Multi-frame Functional
    Groups), C.8.1 (Localizer in C.8.2.1.1.1.3); PS3.5 7.1 (Data Elements), 8.1 (Pixel Data).
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from struct import unpack_from
from typing import Any, BinaryIO, NamedTuple

import pydicom
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from shared_models import frames
from shared_models.reasons import Fault, Reason

# pydicom's warnings quote what a header says, which may be a patient's.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

#: Modalities whose images have no place in the patient (PS3.3 C.7.3.1.1.1).
PROJECTIONS = ("CR", "DX", "IO", "MG", "PX", "RG")
#: Modalities whose stored values stand for a physical quantity.
QUANTITATIVE = ("CT", "PT")
SINGLE = {
    uid.CTImageStorage,
    uid.MRImageStorage,
    uid.PositronEmissionTomographyImageStorage,
    uid.ComputedRadiographyImageStorage,
    uid.DigitalXRayImageStorageForPresentation,
    uid.DigitalXRayImageStorageForProcessing,
    uid.DigitalMammographyXRayImageStorageForPresentation,
    uid.DigitalMammographyXRayImageStorageForProcessing,
    uid.DigitalIntraOralXRayImageStorageForPresentation,
    uid.DigitalIntraOralXRayImageStorageForProcessing,
}
MULTIFRAME = {
    uid.EnhancedCTImageStorage,
    uid.EnhancedMRImageStorage,
    uid.EnhancedPETImageStorage,
    uid.LegacyConvertedEnhancedCTImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedPETImageStorage,
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and .1 to .4, multi-frame
IMAGES = "1.2.840.10008.5.1.4.1.1."
#: Storage classes under IMAGES that are no images: reports, presentations, plans, segmentations...
NOT_IMAGES = ("11.", "88.", "66", "481.", "9.", "104.", "67", "30", "78.", "79.", "80.")
NATIVE = {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}
UNDEFINED_LENGTH = 0xFFFFFFFF
SCREENS = {"SCREEN SAVE", "DOSE_INFO", "PROTOCOL"}

#: Attributes whose bytes must be the same in every slice, by what it means when they are not.
SAME: dict[Reason, tuple[str, ...]] = {
    "mixed-patients": (
        "PatientID",
        "StudyInstanceUID",
        "FrameOfReferenceUID",
        "Modality",
        "SOPClassUID",
        "Manufacturer",
    ),
    "mixed-contrasts": (
        "ImageType",
        "ConvolutionKernel",
        "KVP",
        "RescaleType",
        "Units",
        "EchoNumbers",
        "InversionTime",
        "FlipAngle",
        "DiffusionBValue",
        "DiffusionGradientOrientation",
        "TemporalPositionIdentifier",
    ),
}
OTHERS = (
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PhotometricInterpretation",
    "SamplesPerPixel",
    "NumberOfFrames",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "SliceThickness",
    "SpacingBetweenSlices",
    "GantryDetectorTilt",
    "EchoTime",
    "AcquisitionNumber",
    "InstanceNumber",
    "ConcatenationUID",
    "InConcatenationTotalNumber",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
TAGS = {k: int(Tag(k)) for k in (*OTHERS, *(name for names in SAME.values() for name in names))}
READ = list(TAGS.values())


class Layout(NamedTuple):
    """How stored values are written (PS3.3 C.7.6.3.1); ``offset`` leads to a native file's."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    is_inverted: bool
    is_big_endian: bool

    @property
    def frame_bytes(self) -> int:
        """Bytes of one native frame."""
        return self.rows * self.columns * self.bits_allocated // 8


class Slice(NamedTuple):
    """One slice of one file; lengths in mm, LPS.

    ``offset`` is where its pixels begin, None if they need a decoder. ``same`` holds, for each
    reason of SAME, what must not differ between slices. ``fault`` spoils the series it is in.
    """

    file: Path
    series: str
    instance: str
    modality: str
    layout: Layout | None = None
    fault: Reason | None = None
    frame: int = 0
    num_frames: int = 1
    is_multiframe: bool = False
    offset: int | None = None
    position: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    thickness_mm: float | None = None
    between_mm: float | None = None
    tilt_degrees: float | None = None
    echo_ms: float | None = None
    slope: float = 1.0
    intercept: float = 0.0
    lut: Any = None
    acquisition: Any = None
    number: int | None = None
    same: tuple[tuple[Any, ...], ...] = ()

    @property
    def is_film(self) -> bool:
        """Whether it is a projection, which has no place in the patient."""
        return self.modality in PROJECTIONS


def inspect(file: Path) -> list[Slice] | Reason:
    """Return the slices in ``file`` from its header alone, or why the file holds no slices.

    A slice that belongs to a series but is broken comes with its ``fault``. Warnings that pydicom
    raises are the caller's to silence.
    """
    try:
        with file.open("rb") as stream:
            return inspect_stream(stream, file)
    except OSError:
        return "not-dicom"


def inspect_stream(stream: BinaryIO, file: Path) -> list[Slice] | Reason:
    """Return the same of a file's bytes; ``file`` is what the slices call it."""
    try:
        header = _Header(stream)
        kind = _kind(header)
        return kind or _slices(file, header)
    except Fault as fault:
        return fault.reason
    except Exception:  # whatever a broken header makes a parser raise
        return "not-dicom"


class _Header:
    """The elements of a header by keyword, and what follows the header."""

    def __init__(self, stream: BinaryIO) -> None:
        self.dataset = pydicom.dcmread(
            stream, specific_tags=READ, stop_before_pixels=True, force=True
        )
        self._elements = {int(e.tag): e for e in self.dataset.values()}
        self.is_implicit, self.is_little = self._encoding()
        self.syntax = self.dataset.file_meta.get("TransferSyntaxUID")
        self.stream = stream

    def _encoding(self) -> tuple[bool, bool]:
        """Return (implicit VR, little endian) as found, which may differ from what is declared."""
        element = self._elements.get(TAGS["SOPClassUID"])
        if not isinstance(element, RawDataElement):
            return True, True
        return element.is_implicit_VR, element.is_little_endian

    def raw(self, keyword: str) -> Any:
        """Return the bytes of an element, None if it is absent or empty."""
        element = self._elements.get(TAGS[keyword])
        if element is None:
            return None
        value = element.value
        if not isinstance(element, RawDataElement):  # a sequence, or UN of undefined length
            value = str(value).encode()
        return value or None

    def text(self, keyword: str) -> str:
        return (self.raw(keyword) or b"").decode("latin-1").strip(" \0")

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """Return a decimal string's numbers, () if it is absent or empty (PS3.5 6.2, DS)."""
        raw = self.raw(keyword)
        if raw is None or not raw.strip(b" \0"):
            return ()
        numbers = tuple(map(float, raw.rstrip(b"\0").split(b"\\")))
        if not all(map(math.isfinite, numbers)):
            raise Fault("bad-geometry")
        return numbers

    def number(self, keyword: str) -> float | None:
        return (self.numbers(keyword) or (None,))[0]

    def whole(self, keyword: str) -> int:
        """Return an unsigned short; a Fault if it is absent."""
        raw = self.raw(keyword)
        if raw is None or len(raw) != 2:
            raise Fault("bad-header")
        return int.from_bytes(raw, "little" if self.is_little else "big")


def _kind(header: _Header) -> Reason | None:
    """Return why the object is none of the images read here, None if it is one."""
    if header.dataset.file_meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
        return "not-image"
    sop_class = header.text("SOPClassUID")
    if not uid.UID(sop_class).is_valid:
        return "not-dicom"
    if sop_class.startswith(SECONDARY_CAPTURE) and sop_class[len(SECONDARY_CAPTURE) :][:1] in ".":
        return "secondary-capture"
    if sop_class not in SINGLE and sop_class not in MULTIFRAME:
        tail = sop_class.removeprefix(IMAGES)
        is_image = tail != sop_class and not tail.startswith(NOT_IMAGES)
        return "unsupported-class" if is_image else "not-image"
    image_type = header.text("ImageType").upper().split("\\")
    if "LOCALIZER" in image_type:
        return "localizer"
    return "secondary-capture" if SCREENS.intersection(image_type) else None


def _slices(file: Path, header: _Header) -> list[Slice]:
    found = Slice(
        file=file,
        series=header.text("SeriesInstanceUID"),
        instance=header.text("SOPInstanceUID"),
        modality=header.text("Modality"),
        is_multiframe=header.text("SOPClassUID") in MULTIFRAME,
    )
    try:
        if not found.series or not found.instance:
            raise Fault("bad-header")
        if "MOSAIC" in header.text("ImageType").upper().split("\\"):
            raise Fault("mosaic")
        num_frames = int(header.number("NumberOfFrames") or 1)
        if num_frames < 1:
            raise Fault("bad-frames")
        layout = _layout(header)
        found = found._replace(
            layout=layout,
            num_frames=num_frames,
            offset=_pixels(header, layout, num_frames=num_frames),
            same=tuple(tuple(map(header.raw, names)) for names in SAME.values()),
            acquisition=header.raw("AcquisitionNumber"),
        )
        if found.is_multiframe:
            return _frames(found, header, layout)
        if num_frames != 1:
            raise Fault("bad-frames")
        return [_place(found, header)]
    except Fault as fault:
        return [found._replace(fault=fault.reason)]
    except Exception:  # a number that is none, a sequence that cannot be parsed
        return [found._replace(fault="bad-header")]


def _layout(header: _Header) -> Layout:
    photometric = header.text("PhotometricInterpretation")
    if header.whole("SamplesPerPixel") != 1 or not photometric.startswith("MONOCHROME"):
        raise Fault("not-grey")
    layout = Layout(
        rows=header.whole("Rows"),
        columns=header.whole("Columns"),
        bits_allocated=header.whole("BitsAllocated"),
        bits_stored=header.whole("BitsStored"),
        high_bit=header.whole("HighBit"),
        is_signed=header.whole("PixelRepresentation") == 1,
        is_inverted=photometric == "MONOCHROME1",
        is_big_endian=not header.is_little,
    )
    if not layout.rows * layout.columns:
        raise Fault("bad-header")
    is_within = 0 < layout.bits_stored <= layout.high_bit + 1 <= layout.bits_allocated
    if layout.bits_allocated not in (8, 16, 32) or not is_within:
        raise Fault("pixel-format")
    if layout.is_inverted and header.text("Modality") in QUANTITATIVE:
        raise Fault("inverted-units")
    return layout


def _pixels(header: _Header, layout: Layout, *, num_frames: int) -> int | None:
    """Return where native pixels begin, None if they need a decoder."""
    if header.syntax == uid.DeflatedExplicitVRLittleEndian:
        return None
    stream, order = header.stream, "<" if header.is_little else ">"
    start = stream.read(12)
    if len(start) < 12:
        raise Fault("no-pixels")
    group, element = unpack_from(order + "HH", start)
    if (group, element) != (0x7FE0, 0x0010):
        raise Fault("pixel-format" if group == 0x7FE0 else "no-pixels")  # floating point: 8 or 9
    begin = stream.tell() - (4 if header.is_implicit else 0)
    length = unpack_from(order + "L", start, 4 if header.is_implicit else 8)[0]
    if length == UNDEFINED_LENGTH:
        if header.syntax is None or header.syntax in NATIVE:
            raise Fault("transfer-syntax")
        return None
    if header.syntax is not None and header.syntax not in NATIVE:
        raise Fault("transfer-syntax")
    expected = layout.frame_bytes * num_frames
    if length - expected not in (0, expected % 2):
        raise Fault("pixel-length")
    if stream.seek(0, 2) < begin + expected:
        raise Fault("truncated")
    # PS3.5 8.1.2: 8-bit values in big-endian words are swapped in pairs; a decoder knows.
    return None if layout.is_big_endian and layout.bits_allocated == 8 else begin


def _place(found: Slice, header: _Header) -> Slice:
    """Return a single-frame slice with its place and its rescaling."""
    spacing = header.numbers("PixelSpacing")
    if found.is_film:
        spacing = spacing or header.numbers("ImagerPixelSpacing") or (1.0, 1.0)
    number = header.number("InstanceNumber")
    return found._replace(
        position=header.numbers("ImagePositionPatient"),
        orientation=header.numbers("ImageOrientationPatient"),
        spacing_mm=spacing,
        thickness_mm=header.number("SliceThickness"),
        between_mm=header.number("SpacingBetweenSlices"),
        tilt_degrees=header.number("GantryDetectorTilt"),
        echo_ms=header.number("EchoTime"),
        number=None if number is None else int(number),
        **_rescale(header, found),
    )


def _rescale(header: _Header, found: Slice) -> dict[str, Any]:
    if header.raw("ModalityLUTSequence") is not None:
        if found.layout is None or found.layout.is_inverted:
            raise Fault("bad-rescale")
        return {"lut": _lut(header.dataset.ModalityLUTSequence[0], found.layout)}
    slope, intercept = header.number("RescaleSlope"), header.number("RescaleIntercept")
    if slope == 0:
        raise Fault("bad-rescale")
    return {"slope": 1.0 if slope is None else slope, "intercept": intercept or 0.0}


def _lut(item: Any, layout: Layout) -> tuple[int, tuple[int, ...]]:
    """Return the first value mapped and the outputs (PS3.3 C.11.1.1)."""
    order = ">" if layout.is_big_endian else "<"
    count, first, bits = _words(item["LUTDescriptor"].value, order)
    if layout.is_signed and first >= 1 << 15:
        first -= 1 << 16
    data = _words(item["LUTData"].value, order)
    if len(data) != (count or 1 << 16) or bits > 16 or max(data) >= 1 << bits:
        raise Fault("bad-rescale")
    return first, data


def _words(value: Any, order: str) -> tuple[int, ...]:
    """Return 16-bit words, whose VR (US, SS, OW, unknown) varies between writers."""
    if isinstance(value, bytes):
        value = unpack_from(f"{order}{len(value) // 2}H", value)
    return tuple(int(word) & 0xFFFF for word in value)


def _frames(found: Slice, header: _Header, layout: Layout) -> list[Slice]:
    """Return the frames of an enhanced image, each as a slice."""
    slices = []
    described = frames.describe(header.dataset, num_frames=found.num_frames)
    for index, fields in enumerate(described):
        offset = None if found.offset is None else found.offset + index * layout.frame_bytes
        same = (*found.same, fields.pop("contrast"))
        slices.append(found._replace(frame=index, offset=offset, same=same, **fields))
    return slices

"""Series as hospitals export them on a bad day, each with the verdict a reader must reach.

A hospital, or a developer of another reader, can run any reader over them: it must return exactly
``expected``, or refuse. ``reason`` is the code of ``shared_models.reasons`` that ours gives.

Guarantees:
    The same seed writes the same bytes.
    Every case has either an expected volume or a reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom import Dataset, uid

from shared_models.phantoms import defects as d
from shared_models.phantoms.anatomy import Grid
from shared_models.phantoms.defects import Change, Export
from shared_models.phantoms.files import describe_series
from shared_models.phantoms.profiles import HOSPITALS
from shared_models.phantoms.seeds import digest, make_generator, make_uid
from shared_models.reasons import Reason
from shared_models.volume import Volume

NUM_SLICES, ROWS, COLUMNS, PIXEL_MM = 12, 36, 40, (0.8, 0.6)
ORIGIN_MM = (-100.0, -80.0, 30.0)
OBLIQUE = (0.8, 0.6, 0.0, -0.6, 0.8, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
UNKNOWN_SYNTAX = "1.2.840.10008.1.2.77"
MIDDLE = (5,)


class Case(NamedTuple):
    """One export: its files, and the volume they are or the reason why they are none."""

    name: str
    files: tuple[Path, ...]
    expected: Volume | None
    reason: Reason | None


def write_hard_cases(folder: Path, seed: int, *, names: Iterable[str] | None = None) -> list[Case]:
    """Write every case, or those named, into a folder of its name; names of files say nothing.

    Raises:
        FileExistsError: a case's folder is already there.
    """
    cases = []
    for name in CASES if names is None else names:
        reason, change = CASES[name]
        export = change(_sound(seed, name))
        (folder / name).mkdir(parents=True)
        files = []
        for index, part in enumerate(export.parts):
            file = folder / name / f"{digest(seed, name, index) % 10**12:012d}.dcm"
            file.write_bytes(d.encode(part) if isinstance(part, Dataset) else part)
            files.append(file)
        expected = None if reason else export.truth
        cases.append(Case(name, tuple(sorted(files)), expected, reason))
    return cases


def _sound(seed: int, name: str) -> Export:
    """Return a sound CT series: 12 bits, unsigned, intercept -1024."""
    patient = f"hard-{name}"
    grid = Grid(NUM_SLICES, COLUMNS, PIXEL_MM[1], d.STEP_MM, ORIGIN_MM)
    described = describe_series(grid, HOSPITALS[0], patient=patient, seed=seed)
    described.Rows, described.PixelSpacing = ROWS, list(PIXEL_MM)
    shape = (NUM_SLICES, ROWS, COLUMNS)
    stored = make_generator(seed, name).integers(0, 2**12, shape).astype("<u2")
    parts: list[Dataset | bytes] = []
    for z, plane in enumerate(stored):
        part = deepcopy(described)
        part.SOPInstanceUID = make_uid(seed, patient, "instance", z)
        part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID
        part.InstanceNumber = z + 1
        height = ORIGIN_MM[2] + z * d.STEP_MM
        part.ImagePositionPatient, part.SliceLocation = [*ORIGIN_MM[:2], height], height
        part.PixelData = plane.tobytes()
        parts.append(part)
    affine = np.diag([PIXEL_MM[1], PIXEL_MM[0], d.STEP_MM, 1.0])
    affine[:3, 3] = ORIGIN_MM
    return Export(parts, Volume(stored.astype(np.float32) - 1024, affine, "CT"))


def _one_film(export: Export) -> Export:
    affine = np.diag([PIXEL_MM[1], PIXEL_MM[0], 1.0, 1.0])
    return Export(export.parts[:1], Volume(export.truth.data[:1], affine, "DX"))


def _lut_item() -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("LUTData", "OW", (np.arange(4096) * 3 + 7).astype("<u2").tobytes())
    item.ModalityLUTType = "US"
    return item


def _two_stacks(groups: Dataset, z: int) -> None:
    groups.FrameContentSequence[0].StackID = str(1 + z // 6)


def _two_times(groups: Dataset, z: int) -> None:
    groups.FrameContentSequence[0].TemporalPositionIndex = 1 + z % 2


def _two_b_values(groups: Dataset, z: int) -> None:
    item = Dataset()
    item.DiffusionBValue = float(1000 * (z % 2))
    groups.MRDiffusionSequence = [item]


def _twisted(groups: Dataset, z: int) -> None:
    item = Dataset()
    item.ImageOrientationPatient = list(SAGITTAL if z > 8 else (1, 0, 0, 0, 1, 0))
    groups.PlaneOrientationSequence = [item]


def _as_signed(values: Any) -> Any:
    return values.astype("<i2") - 2048


def _rgb(export: Export) -> Export:
    part = d.slices(export)[5]
    part.SamplesPerPixel, part.PhotometricInterpretation = 3, "RGB"
    part.PlanarConfiguration = 0
    part.BitsAllocated = part.BitsStored = 8
    part.HighBit = 7
    part.PixelData = bytes(ROWS * COLUMNS * 3)
    return export


def _resized(export: Export) -> Export:
    part = d.slices(export)[-1]
    part.Rows = ROWS - 2
    part.PixelData = part.PixelData[: 2 * COLUMNS * (ROWS - 2)]
    return export


def _longer(num_bytes: int) -> Change:
    def change(export: Export) -> Export:
        part = d.slices(export)[5]
        content = part.PixelData
        part.PixelData = content[:num_bytes] if num_bytes < 0 else content + bytes(num_bytes)
        return export

    return change


def _floats(export: Export) -> Export:
    for part in d.slices(export):
        del part.PixelData
        part.FloatPixelData = np.zeros((ROWS, COLUMNS), "<f4").tobytes()
        part.BitsAllocated = 32
    return export


def _broken_run(export: Export) -> Export:
    """Damage a compressed slice so that its last bytes are missing but its file is whole."""
    from pydicom.encaps import encapsulate, generate_frames

    part = d.slices(export)[5]
    (stream,) = generate_frames(part.PixelData, number_of_frames=1)
    part.PixelData = encapsulate([stream[: len(stream) // 2 & ~1]])
    return export


def _index(export: Export) -> Export:
    part = d.slices(d.add({})(export))[-1]
    part.SOPClassUID = part.file_meta.MediaStorageSOPClassUID = uid.MediaStorageDirectoryStorage
    del part.PixelData
    return export._replace(parts=[*export.parts, part])


def _padded(values: Any) -> Any:
    padded = values.astype("<i2")
    padded[:, :2] = -2000
    return padded


def _doubled(export: Export) -> Export:
    for part in d.slices(export):
        part.PixelData *= 2
    return export


def _undescribed(export: Export) -> Export:
    del d.slices(export)[0].PerFrameFunctionalGroupsSequence[3]
    return export


def _comma(export: Export) -> Export:
    """Write a decimal comma, as a program in another language's locale would."""
    part = d.encode(d.slices(export)[5])
    parts = list(export.parts)
    parts[5] = part.replace(b"0.8\\0.6", b"0,8\\0,6", 1)
    return export._replace(parts=parts)


CT, MR = uid.EnhancedCTImageStorage, uid.EnhancedMRImageStorage
FILM = {"Modality": "DX", "SOPClassUID": uid.DigitalXRayImageStorageForPresentation}
LOCALIZER: dict[str, Any] = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
TEN_BITS = {"BitsStored": 11, "HighBit": 10}
SIGNED = {"PixelRepresentation": 1}
FULL = {"BitsStored": 16, "HighBit": 15}
WIDE = {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}
NARROW = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
SCALED = {"RescaleSlope": "0.3", "RescaleIntercept": "-1024.7"}
RAW_MR = {"Modality": "MR", "SOPClassUID": uid.MRImageStorage, "RescaleSlope": None}
RAW_MR |= {"RescaleIntercept": None, "RescaleType": None}
LUT = {"RescaleSlope": None, "RescaleIntercept": None, "ModalityLUTSequence": [_lut_item()]}
INVERTED: dict[str, Any] = {"PhotometricInterpretation": "MONOCHROME1"}
SCREEN: dict[str, Any] = {"SOPClassUID": uid.SecondaryCaptureImageStorage}
RLE = d.transfer(uid.RLELossless)

#: What a reader must say of each change to a sound series: a reason, or None if it can be read.
CASES: dict[str, tuple[Reason | None, Change]] = {
    "plain": (None, d.keep),
    "numbers-reversed": (
        None,
        d.together(*(d.put(at=[z], InstanceNumber=NUM_SLICES - z) for z in range(NUM_SLICES))),
    ),
    "no-numbers": (None, d.put(InstanceNumber=None, SliceLocation=None)),
    "one-slice": (None, lambda e: Export(e.parts[:1], e.truth._replace(data=e.truth.data[:1]))),
    "oblique": (None, d.turn(OBLIQUE)),
    "sagittal": (None, d.turn(SAGITTAL)),
    "implicit": (None, d.transfer(uid.ImplicitVRLittleEndian)),
    "big-endian": (None, d.transfer(uid.ExplicitVRBigEndian)),
    "deflated": (None, d.transfer(uid.DeflatedExplicitVRLittleEndian)),
    "run-length": (None, RLE),
    "no-preamble": (None, d.bare(with_meta=True)),
    "no-meta": (None, d.together(d.transfer(uid.ImplicitVRLittleEndian), d.bare(with_meta=False))),
    "signed": (None, d.store(_as_signed, lambda v: v + 0.0, RescaleIntercept=0, **SIGNED, **FULL)),
    "signed-twelve": (
        None,
        d.store(_as_signed, lambda v: v.astype(float) + 10, RescaleIntercept=10, **SIGNED),
    ),
    "signed-not-extended": (
        None,
        d.store(
            lambda v: v & np.uint16(0xFFF),
            lambda v: v.astype(float) - 4096.0 * (v > 2047) - 1024,
            **SIGNED,
        ),
    ),
    "high-bit-15": (
        None,
        d.store(lambda v: v << np.uint16(4), lambda v: v // 16 - 1024.0, HighBit=15),
    ),
    "eleven-bits": (None, d.store(lambda v: v >> np.uint16(1), lambda v: v - 1024.0, **TEN_BITS)),
    "eight-bits": (
        None,
        d.store(lambda v: (v // 16).astype("u1"), lambda v: v - 1024.0, **NARROW),
    ),
    "thirty-two-bits": (
        None,
        d.store(lambda v: v.astype("<u4") * 9, lambda v: v - 1024.0, **WIDE),
    ),
    "fractions": (None, d.store(lambda v: v, lambda v: v * 0.3 - 1024.7, **SCALED)),
    "slope-per-slice": (None, d.scale_each(lambda z: 0.25 + z / 128)),
    "no-rescale": (None, d.store(lambda v: v, lambda v: v, **RAW_MR)),
    "modality-lut": (None, d.store(lambda v: v, lambda v: v * 3.0 + 7, **LUT)),
    "padding": (
        None,
        d.store(_padded, lambda v: v - 1024.0, PixelPaddingValue=-2000, **SIGNED, **FULL),
    ),
    "rounded-positions": (None, d.move(lambda z: (0, 0, 0.004 * (-1) ** z))),
    "blocks-of-acquisitions": (
        None,
        d.together(
            d.put(at=range(6), AcquisitionNumber=1), d.put(at=range(6, 12), AcquisitionNumber=2)
        ),
    ),
    "localizer-inside": (None, d.add({**LOCALIZER, "ImageOrientationPatient": list(SAGITTAL)})),
    "capture-inside": (None, d.add(SCREEN)),
    "report-beside": (
        None,
        d.add({"SOPClassUID": uid.ComprehensiveSRStorage, "SeriesInstanceUID": "2.25.7"}),
    ),
    "index-beside": (None, _index),
    "trailing-padding": (None, d.put(DataSetTrailingPadding=bytes(64))),
    "multi-frame-ct": (None, d.enhance(CT, order=lambda n: [*range(1, n, 2), *range(0, n, 2)])),
    "multi-frame-compressed": (None, d.together(d.enhance(CT), RLE)),
    "film": (
        None,
        d.together(d.store(lambda v: v, lambda v: v - 1024.0, **FILM), _one_film),
    ),
    "film-inverted": (
        None,
        d.together(
            d.store(lambda v: v, lambda v: 4095.0 - v - 1024, **FILM, **INVERTED), _one_film
        ),
    ),
    "mr-inverted": (None, d.store(lambda v: v, lambda v: 4095.0 - v, **RAW_MR, **INVERTED)),
    # what must be refused
    "missing": ("missing-slice", d.drop(4)),
    "missing-three": ("missing-slice", d.drop(2, 3, 8)),
    "every-second": ("missing-slice", d.every(2)),
    "copied-file": ("same-position", lambda e: e._replace(parts=[*e.parts, e.parts[5]])),
    "duplicate": ("same-position", d.add({}, source=5)),
    "tilted": ("tilted", d.move(lambda z: (0, z * d.STEP_MM * 0.27, 0))),
    "tilted-a-little": ("tilted", d.move(lambda z: (0, z * d.STEP_MM * 0.01, 0))),
    "tilt-told-only": ("tilted", d.put(GantryDetectorTilt=15)),
    "jittered": ("uneven", d.move(lambda z: (0, 0, 0.4 * (z % 3 == 1)))),
    "drifting": ("off-line", d.move(lambda z: (0.3 * (z % 4 == 2), 0, 0))),
    "half-moved": ("off-line", d.move(lambda z: (5.0 * (z > 6), 0, 0))),
    "wider-at-the-end": ("uneven", d.move(lambda z: (0, 0, 1.1 * max(0, z - 8)))),
    "localizer-unmarked": (
        "mixed-orientations",
        d.add({"ImageOrientationPatient": list(SAGITTAL)}),
    ),
    "two-series": ("several-series", d.again(30.0, SeriesInstanceUID="2.25.11")),
    "two-patients": ("mixed-patients", d.again(30.0, PatientID="hard-other")),
    "two-frames-of-reference": ("mixed-patients", d.again(30.0, FrameOfReferenceUID="2.25.12")),
    "two-times": ("same-position", d.again(AcquisitionNumber=2)),
    "two-times-between": ("mixed-times", d.again(d.STEP_MM / 2, AcquisitionNumber=2)),
    "two-times-told": ("mixed-contrasts", d.again(30.0, TemporalPositionIdentifier=2)),
    "two-echoes": (
        "mixed-contrasts",
        d.together(d.put(EchoTime=10), d.again(30.0, EchoTime=80)),
    ),
    "two-kernels": ("mixed-contrasts", d.again(30.0, ConvolutionKernel="B70f")),
    "two-b-values": ("mixed-contrasts", d.again(30.0, DiffusionBValue=1000.0)),
    "odd-size": ("mixed-sizes", _resized),
    "odd-spacing": ("mixed-sizes", d.put(at=MIDDLE, PixelSpacing=[0.8, 0.7])),
    "odd-bits": ("mixed-sizes", d.put(at=MIDDLE, BitsStored=16, HighBit=15)),
    "no-position": ("no-position", d.put(at=MIDDLE, ImagePositionPatient=None)),
    "no-orientation": ("no-position", d.put(ImageOrientationPatient=None)),
    "no-spacing": ("no-position", d.put(PixelSpacing=None)),
    "zero-spacing": ("bad-geometry", d.put(PixelSpacing=[0, 0])),
    "decimal-comma": ("bad-header", _comma),
    "skewed-axes": ("bad-geometry", d.put(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0])),
    "zero-slope": ("bad-rescale", d.put(RescaleSlope=0)),
    "truncated": ("truncated", d.cut(-100, at=11)),
    "truncated-in-pixels": ("truncated", d.cut(-ROWS * COLUMNS, at=3)),
    "truncated-in-header": ("not-dicom", d.cut(200, at=11)),
    "truncated-run-length": ("damaged", d.together(RLE, d.cut(-300, at=4))),
    "damaged-run-length": ("damaged", d.together(RLE, _broken_run)),
    "empty-file": ("not-dicom", d.beside(b"")),
    "foreign-file": ("not-dicom", d.beside(b"not an image\n" * 99)),
    "pixels-too-long": ("pixel-length", _longer(48)),
    "pixels-too-short": ("pixel-length", _longer(-48)),
    "no-pixels": ("no-pixels", d.put(at=MIDDLE, PixelData=None)),
    "float-pixels": ("pixel-format", _floats),
    "stray-bits": ("stray-bits", d.put(BitsStored=10, HighBit=9)),
    "unknown-syntax": ("transfer-syntax", d.declare(UNKNOWN_SYNTAX)),
    "wrong-syntax": ("transfer-syntax", d.declare(uid.RLELossless)),
    "one-in-colour": ("not-grey", _rgb),
    "palette": ("not-grey", d.put(PhotometricInterpretation="PALETTE COLOR")),
    "captures-only": ("secondary-capture", d.put(**SCREEN)),
    "localizers-only": ("localizer", d.put(**LOCALIZER)),
    "mosaic": ("mosaic", d.put(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])),
    "ultrasound": ("unsupported-class", d.put(SOPClassUID=uid.UltrasoundImageStorage)),
    "ct-inverted": ("inverted-units", d.put(**INVERTED)),
    "frames-in-a-ct": ("bad-frames", lambda e: d.put(NumberOfFrames=2)(_doubled(e))),
    "multi-frame-two-stacks": ("mixed-contrasts", d.enhance(CT, each=_two_stacks)),
    "multi-frame-two-times": ("mixed-contrasts", d.enhance(MR, each=_two_times, Modality="MR")),
    "multi-frame-b-values": ("mixed-contrasts", d.enhance(MR, each=_two_b_values, Modality="MR")),
    "multi-frame-twisted": ("mixed-orientations", d.enhance(CT, each=_twisted)),
    "multi-frame-repeated": ("same-position", d.enhance(CT, order=lambda n: [*range(n), 5])),
    "multi-frame-missing": (
        "missing-slice",
        d.enhance(CT, order=lambda n: [*range(5), *range(6, n)]),
    ),
    "multi-frame-undescribed": ("bad-frames", lambda e: _undescribed(d.enhance(CT)(e))),
    "multi-frame-part": (
        "concatenation",
        d.enhance(CT, ConcatenationUID="2.25.13", InConcatenationTotalNumber=2),
    ),
    "multi-frame-truncated": ("truncated", d.together(d.enhance(CT), d.cut(-200, at=0))),
}

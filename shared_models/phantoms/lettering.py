"""Text drawn into pixels as devices and workstations draw it, and the list of what stands where.

For measuring how much burned-in text a check finds, and how often it sees text where there is none:
each picture is written with text and without. Fonts are the two that come with Pillow: its dot
matrix, enlarged as devices do, and its outlines, in two levels or with soft edges. Text is white,
grey, transparent, with a dark rim, in a dark box or dark in a white one, at the borders or over the
body, in pictures of every kind.

Guarantees:
    The same seed writes the same bytes, with the same version of Pillow.
    A picture and its twin differ where the text is, and in their names.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset, dcmwrite
from pydicom.uid import (
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from shared_models.phantoms import bulk
from shared_models.phantoms.anatomy import Grid
from shared_models.phantoms.files import describe_series
from shared_models.phantoms.profiles import VENDORS, HospitalProfile
from shared_models.phantoms.seeds import digest, make_generator, make_uid

Pixels = npt.NDArray[np.integer[Any]]
Cover = npt.NDArray[np.float32]

#: Font and height of a line in pixels; the dot matrix is 11 high and enlarged whole.
FONTS = (
    *(("dots", height) for height in (11, 22, 33)),
    *(("sharp", height) for height in (12, 16, 24, 36)),
    *(("smooth", height) for height in (12, 16, 24, 36)),
)
STYLES = ("white", "grey", "rim", "box", "negative", "transparent")
PLACES = ("top left", "top right", "bottom left", "bottom right", "body")
KINDS = ("picture", "inverted", "one frame of several", "screen")
#: How dark, between the least (0) and the most (1) of the picture's values, and how opaque.
SHADES = {
    "white": (1.0, 1.0),
    "grey": (0.6, 1.0),
    "rim": (1.0, 1.0),
    "box": (1.0, 1.0),
    "negative": (0.0, 1.0),
    "transparent": (1.0, 0.7),
}
NUM_FRAMES = 4
MARGIN = 6


class Lettering(NamedTuple):
    """How a text is drawn."""

    font: str
    height: int
    style: str
    place: str


class Lettered(NamedTuple):
    """One picture with text, ``file``, and the same without, ``twin``."""

    file: Path
    twin: Path
    kind: str
    modality: str
    lettering: Lettering
    text: str


def write_lettered(
    folder: Path, *, seed: int, size: int = 256, fonts: tuple[tuple[str, int], ...] = FONTS
) -> tuple[Lettered, ...]:
    """Write each of the fonts in every style, in pictures of every kind, and ``answers.csv``.

    Headers say that nothing is burned in, as many do.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    drawn = [_draw(profile, seed, size) for profile in VENDORS]
    for number, (kind, lettering) in enumerate(_letterings(seed, fonts)):
        found.append(_write(folder, seed, number, kind, lettering, drawn[number % len(drawn)]))
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "twin", "kind", "modality", *Lettering._fields, "text"))
        for one in found:
            names = one.file.name, one.twin.name
            writer.writerow((*names, one.kind, one.modality, *one.lettering, one.text))
    return tuple(found)


def _letterings(seed: int, fonts: tuple[tuple[str, int], ...]) -> Iterator[tuple[str, Lettering]]:
    """Yield every font in every style; places and kinds of pictures take turns."""
    number = seed
    for font, height in fonts:
        for style in STYLES:
            kind = KINDS[number // 2 % len(KINDS)] if number % 2 else KINDS[0]
            yield kind, Lettering(font, height, style, PLACES[number % len(PLACES)])
            number += 1


def invent_line(rng: np.random.Generator) -> str:
    """Return a line such as devices write: a name, a day of birth, a number."""
    letters = np.array(list("ABCDEFGHIJKLMNOPRSTUVWZ"))
    name, given = ("".join(rng.choice(letters, n)) for n in (8, 5))
    year, month, day = rng.integers((1930, 1, 1), (2005, 13, 29))
    return f"{name} {given} {year}-{month:02d}-{day:02d} {rng.integers(10**5, 10**6)}"


def cover(text: str, lettering: Lettering, shape: tuple[int, int]) -> tuple[Cover, Cover]:
    """Return how much of each pixel the letters cover, 0 to 1, and what lies around them."""
    line = _line(text, lettering)
    rows, columns = shape
    line = line[: rows - 2 * MARGIN, : columns - 2 * MARGIN]
    top, left = _corner(lettering.place, shape, (line.shape[0], line.shape[1]))
    letters, around = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    letters[top : top + line.shape[0], left : left + line.shape[1]] = line
    if lettering.style in ("box", "negative"):
        around[top - 2 : top + line.shape[0] + 2, left - 2 : left + line.shape[1] + 2] = 1
    elif lettering.style == "rim":
        for y, x in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            np.maximum(around, np.roll(letters, (y, x), (0, 1)), out=around)
    return letters, around


def letter(frame: Pixels, text: str, lettering: Lettering) -> Pixels:
    """Return a frame (row, column) with a line of text drawn into it."""
    shade, opacity = SHADES[lettering.style]
    low, high = int(frame.min()), int(frame.max())
    letters, around = cover(text, lettering, (frame.shape[0], frame.shape[1]))
    beside = high if lettering.style == "negative" else low
    found = frame + around * (beside - frame.astype(np.float32))
    found += opacity * letters * (low + shade * (high - low) - found)
    return np.rint(found).astype(frame.dtype)


def _line(text: str, lettering: Lettering) -> Cover:
    """Return one line of text, as much as each pixel is covered."""
    font: Any
    if lettering.font == "dots":
        font, times = ImageFont.load_default_imagefont(), lettering.height // 11
    else:
        font, times = ImageFont.load_default(lettering.height), 1
    left, top, right, bottom = (int(v) for v in font.getbbox(text))
    picture = Image.new("L", (right - left, bottom - top))
    draw = ImageDraw.Draw(picture)
    draw.fontmode = "L" if lettering.font == "smooth" else "1"
    draw.text((-left, -top), text, fill=255, font=font)
    drawn = np.asarray(picture, np.float32) / 255
    return drawn.repeat(times, axis=0).repeat(times, axis=1).astype(np.float32, copy=False)


def _corner(place: str, shape: tuple[int, int], line: tuple[int, int]) -> tuple[int, int]:
    room = shape[0] - line[0] - MARGIN, shape[1] - line[1] - MARGIN
    if place == "body":
        return shape[0] // 2, max(MARGIN, room[1] // 2)
    return (
        MARGIN if place.startswith("top") else room[0],
        MARGIN if place.endswith("left") else room[1],
    )


class _Drawn(NamedTuple):
    profile: HospitalProfile
    grid: Grid
    frames: Pixels  # (frame, row, column)


def _draw(profile: HospitalProfile, seed: int, size: int) -> _Drawn:
    names = (seed, "lettering", profile.name)
    spacing_mm = round(profile.field_of_view_mm / size, 3)
    grid = Grid(NUM_FRAMES, size, spacing_mm, 5.0, (-150.0, -150.0, -100.0))
    body = bulk.draw_long(profile, grid, person=names, has_lesion=False)
    drawn = bulk.make_slices(body, profile, num_slices=NUM_FRAMES, rng=make_generator(*names))
    return _Drawn(profile, grid, np.stack([frame.copy() for frame in drawn]))


def _write(
    folder: Path, seed: int, number: int, kind: str, lettering: Lettering, drawn: _Drawn
) -> Lettered:
    profile, grid, frames = drawn
    names = (seed, "lettering", number)
    text = invent_line(make_generator(*names, "text"))
    lettered = np.stack([*frames[:-1], letter(frames[-1], text, lettering)])
    files = []
    for role, pixels in (("file", lettered), ("twin", frames)):
        dataset = describe_series(grid, profile, patient=f"lettered-{number:04d}", seed=seed)
        dataset.SOPInstanceUID = make_uid(*names, role)
        _store(dataset, kind, pixels)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        files.append(folder / f"{digest(*names, role) % 10**12:012d}.dcm")
        dcmwrite(files[-1], dataset, enforce_file_format=True)
    return Lettered(files[0], files[1], kind, profile.Modality, lettering, text)


def _store(dataset: Dataset, kind: str, frames: Pixels) -> None:
    """Put the frames (number, row, column) into the dataset as this kind of picture has them."""
    dataset.InstanceNumber = 1
    dataset.ImagePositionPatient, dataset.SliceLocation = [0, 0, 0], 0
    low, high = int(frames.min()), int(frames.max())
    stored = frames[-1]
    if kind == "inverted":
        dataset.PhotometricInterpretation = "MONOCHROME1"
        stored = (low + high - stored).astype(frames.dtype)
    elif kind == "one frame of several":
        _make_capture(dataset, MultiFrameGrayscaleWordSecondaryCaptureImageStorage)
        dataset.NumberOfFrames, dataset.FrameIncrementPointer = len(frames), 0x00181065
        dataset.FrameTimeVector = [0] + [40] * (len(frames) - 1)
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, 0, "US"
        dataset.PresentationLUTShape = "IDENTITY"
        stored = (frames - low).astype("<u2")
    elif kind == "screen":
        _make_capture(dataset, SecondaryCaptureImageStorage)
        dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
        dataset.PhotometricInterpretation = "RGB"
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        grey = (255.0 * (stored - low) / max(1, high - low)).astype(np.uint8)
        stored = grey[..., None].repeat(3, axis=-1)
    dataset.PixelData = stored.tobytes()


def _make_capture(dataset: Dataset, sop_class: str) -> None:
    """Make the description one of a picture of a screen (PS3.3 A.8)."""
    for keyword in SCANNED:
        if keyword in dataset:
            delattr(dataset, keyword)
    dataset.SOPClassUID = sop_class
    dataset.ConversionType, dataset.Modality = "WSD", "OT"
    dataset.ImageType, dataset.PatientOrientation = ["DERIVED", "SECONDARY"], ""


#: What an image of a scanner says, and a picture of a screen does not.
SCANNED = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "SliceLocation", "FrameOfReferenceUID", "KVP", "ConvolutionKernel"),
    *("PositionReferenceIndicator", "AcquisitionNumber", "RescaleSlope", "RescaleIntercept"),
    *("RescaleType", "ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType"),
    *("RepetitionTime", "EchoTime", "EchoTrainLength", "FlipAngle", "MagneticFieldStrength"),
    *("WindowCenter", "WindowWidth"),
)

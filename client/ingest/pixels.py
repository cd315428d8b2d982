"""Whether pixels hold text, and codestreams without their comments.

Two things decide whether an image may pass: what its header says of it (class, ``ImageType``,
``BurnedInAnnotation``), then whether its pixels look lettered. A header that says "NO" is not
believed. What is found is refused unless the site has cleared such images (``Terms.cleared``).

Guarantees:
    An image whose pixels cannot be read is refused, not passed unseen.
    Comments and application data of compressed frames are blanked; no coded pixel changes.

Design: letters are thin strokes that differ sharply from both sides, and come in rows. Noise
    repeats no value along a stroke, anatomy is rarely thin and constant: few strokes of one value
    are enough. Of soft, transparent or noisy letters, whose value is about one only, it takes a
    longer line. This finds grey and saturated text alike, in about ten passes over the pixels.
    Handwriting, letters less than about 6 pixels high, soft ones less than about 12, and letters
    hardly brighter than what they lie on are not found: ``tests/bench/deidentify.py`` prints how
    many of each.

References:
    DICOM PS3.3 C.7.6.1.1.2 (Image Type), C.7.6.1 (Burned In Annotation), C.8.6.1 (Conversion Type).
    ITU-T T.81 table B.1 (JPEG markers), T.800 table A.2 (JPEG 2000 markers).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import SegmentationStorage

from client.ingest.elements import first, number, tag_of, text_at
from client.ingest.profile import Profile, Terms

#: A stroke is at most this wide, in pixels of the scale looked at.
STROKE_WIDTH = 4
#: A stroke may change along its way by this part of its contrast, where letters are not solid.
STEADINESS = 4
#: Rows that a line of text takes at most, again in pixels of the scale looked at.
LINE_HEIGHT = 24
#: Columns below which there is no room for a line: its strokes, gaps between them, both sides.
NARROWEST = 24
#: Pixels looked at in one go: few enough for a processor's cache.
PIECE = 2**15
COLOURLESS = ("MONOCHROME1", "MONOCHROME2")
#: Modalities whose images have no colours of their own: where there are some, it is a screen.
GREY_MODALITIES = frozenset({"CT", "MR", "PT", "CR", "DX", "MG", "NM"})

Pixels = NDArray[np.signedinteger[Any]]
_Places = NDArray[np.intp]


class _Line(NamedTuple):
    """What makes a line of text."""

    fewest_pixels: int
    fewest_strokes: int
    fewest_rows: int  # of one stroke


class _Ink(NamedTuple):
    """Which strokes are looked for together, and how many it takes, coarsely and finely.

    ``is_exact``: strokes of one value that do not change at all along their way.
    """

    is_exact: bool
    coarse: _Line
    fine: _Line


class _Strokes(NamedTuple):
    """Where strokes are, the values there, and whether the row above has the same."""

    rows: _Places
    columns: _Places
    values: Pixels
    is_same: NDArray[np.bool_]


COARSE, FINE = 4, 1  # every so many rows
#: Solid letters; soft, transparent or noisy ones, of which it takes more to be sure.
INKS = (
    _Ink(True, _Line(10, 4, 1), _Line(40, 8, 3)),
    _Ink(False, _Line(24, 12, 1), _Line(100, 16, 3)),
)


class NoDecoder(Exception):
    """Nothing that is installed can decode these pixels."""


def announces_text(dataset: Dataset, profile: Profile) -> bool:
    """Return whether the header alone is reason enough to expect text in the pixels."""
    if first(dataset, "BurnedInAnnotation").upper() not in ("", "NO"):
        return True
    if first(dataset, "SOPClassUID") in profile.lettered or tag_of("ConversionType") in dataset:
        return True
    kinds = set(re.split(r"[\\ ]+", text_at(dataset, "ImageType").upper()))
    if kinds & profile.screens:
        return True
    is_grey = first(dataset, "PhotometricInterpretation") in COLOURLESS
    return not is_grey and first(dataset, "Modality") in GREY_MODALITIES


def is_cleared(dataset: Dataset, terms: Terms) -> bool:
    """Return whether the site has looked at images like this one and let them pass."""
    return any(
        first(dataset, "Modality") == rule.modality
        and first(dataset, "Manufacturer") == rule.manufacturer
        and first(dataset, "ManufacturerModelName") == rule.model
        and number(dataset, "Rows") == rule.rows
        and number(dataset, "Columns") == rule.columns
        for rule in terms.cleared
    )


def shows_text(dataset: Dataset) -> bool:
    """Return whether any frame looks lettered.

    Raises:
        NoDecoder: if nothing that is installed can decode the pixels.
        ValueError: if the header and the pixels do not fit.
    """
    if first(dataset, "SOPClassUID") == SegmentationStorage:
        return False  # classes of pixels, drawn by people or models: no letters, edges everywhere
    return any(has_lettering(frame) for frame in _frames(dataset))


def has_lettering(frame: NDArray[np.integer]) -> bool:
    """Return whether a frame holds a line of text, at any of three sizes.

    Args:
        frame: integers (row, column).
    """
    is_narrow = int(frame.min()) > -(2**14) and int(frame.max()) < 2**14  # differences fit 16 bits
    whole: Pixels
    if is_narrow and frame.dtype == np.uint16:
        whole = frame.view(np.int16)
    elif is_narrow:
        whole = frame.astype(np.int16, copy=False)
    else:
        whole = frame.astype(np.int64)
    every = max(1, min(whole.shape) // 32)
    sample = np.sort(whole[::every, ::every], axis=None)
    rare = len(sample) // 100
    contrast = max(1, (int(sample[-1 - rare]) - int(sample[rare])) // 6)
    for step in (1, 2, 4):
        view: Pixels = np.ascontiguousarray(whole[::step, ::step])
        if min(view.shape) < 4 * STROKE_WIDTH or view.shape[1] < NARROWEST:
            return False
        if _is_lettered(view, contrast):
            return True
    return False


def _is_lettered(view: Pixels, contrast: int) -> bool:
    """Return whether strokes, brighter or darker than both sides, stand in a row.

    Every fourth row decides whether the others are looked at: a line of text crosses several.
    """
    coarse = _strokes(view, contrast, COARSE)
    likely = [ink for ink in INKS if any(_finds_line(s, ink, contrast, COARSE) for s in coarse)]
    if not likely:
        return False
    fine = _strokes(view, contrast, FINE)
    return any(_finds_line(s, ink, contrast, FINE) for ink in likely for s in fine)


def _strokes(view: Pixels, contrast: int, every: int) -> tuple[_Strokes, _Strokes]:
    """Return the bright and the dark strokes in every so many rows.

    A stroke differs from what lies on both sides and goes on much the same in the row above.
    """
    width, flat = STROKE_WIDTH, view.reshape(-1)
    found: tuple[list[_Strokes], list[_Strokes]] = ([], [])
    piece = every * max(1, PIECE // view.shape[1])
    for top in range(1, len(view), piece):
        rows = view[top : top + piece : every]
        middle = rows[:, width:-width]
        over_left, over_right = middle - rows[:, : -2 * width], middle - rows[:, 2 * width :]
        differs = (
            np.minimum(over_left, over_right) > contrast,
            np.maximum(over_left, over_right) < -contrast,
        )
        for is_stroke, parts in zip(differs, found, strict=True):
            y, x = np.divmod(np.flatnonzero(is_stroke), middle.shape[1])
            y = y * every + top
            at = y * view.shape[1] + x + width
            values = flat.take(at)
            change = np.abs(values - flat.take(at - view.shape[1]))
            on = change <= contrast // STEADINESS
            parts.append(_Strokes(y[on], x[on], values[on], change[on] == 0))
    bright, dark = (_Strokes(*map(np.concatenate, zip(*f, strict=True))) for f in found)
    return bright, dark


def _finds_line(strokes: _Strokes, ink: _Ink, contrast: int, every: int) -> bool:
    """Return whether strokes of one of the two commonest values make a line of text.

    Values of letters that are not solid count as one if they differ by less than the contrast.
    """
    line = ink.coarse if every == COARSE else ink.fine
    rows, columns, values, is_same = strokes
    if ink.is_exact:
        rows, columns, values = rows[is_same], columns[is_same], values[is_same]
    if len(values) < line.fewest_pixels:
        return False
    levels = values.astype(np.int64) - int(values.min())
    levels //= 1 if ink.is_exact else contrast
    if levels.max() >= 2**16:
        levels = np.unique(levels, return_inverse=True)[1]
    counts, reach = np.bincount(levels), 1
    if not ink.is_exact:
        counts, reach = counts + np.append(counts[1:], 0), 2  # two neighbouring levels together
    for _ in range(2):
        level = int(np.argmax(counts))
        if counts[level] < line.fewest_pixels:
            return False
        is_level = (levels >= level) & (levels < level + reach)
        if _has_line(rows[is_level] // every, columns[is_level], line, every):
            return True
        counts[level] = 0
    return False


def _has_line(rows: _Places, columns: _Places, line: _Line, every: int) -> bool:
    """Return whether some band of rows holds enough pixels, in enough separate strokes."""
    height = LINE_HEIGHT // every
    per_row = np.bincount(rows)
    sums = np.concatenate(([0], np.cumsum(per_row)))
    ends = np.minimum(np.arange(len(per_row)) + height, len(per_row))
    band = sums[ends] - sums[: len(per_row)]
    top = int(np.argmax(band))
    if band[top] < line.fewest_pixels:
        return False
    inside = (rows >= top) & (rows < top + height)
    tall = np.flatnonzero(np.bincount(columns[inside]) >= line.fewest_rows)
    num_strokes = 1 + int(np.count_nonzero(np.diff(tall) > 1)) if len(tall) else 0
    return num_strokes >= line.fewest_strokes


def num_bytes(dataset: Dataset) -> int:
    """Return how many bytes the native pixels take, without padding."""
    bits = number(dataset, "Rows") * number(dataset, "Columns") * number(dataset, "BitsAllocated")
    bits *= number(dataset, "SamplesPerPixel", 1) * (number(dataset, "NumberOfFrames", 1) or 1)
    is_halved = first(dataset, "PhotometricInterpretation") == "YBR_FULL_422"
    return ((bits * 2 // 3 if is_halved else bits) + 7) // 8


def without_planes(native: bytes, dataset: Dataset) -> bytes:
    """Return native pixels with the bits blanked in which an overlay was drawn.

    Graphics in unused bits of the pixels are long retired (PS3.3 C.9.2 of 2004), and still there.

    Raises:
        ValueError: if there is one in pixels of another form than 16 bits of one sample.
    """
    if not _has_planes(dataset):
        return native
    stored, high = number(dataset, "BitsStored"), number(dataset, "HighBit")
    if number(dataset, "BitsAllocated") != 16 or high != stored - 1:
        raise ValueError("an overlay within pixels that it cannot be taken from")
    form = "<u2" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">u2"
    values = np.frombuffer(native, form).astype(np.int64)
    kept = values & (2**stored - 1)
    if number(dataset, "PixelRepresentation", 0):
        is_negative = kept >= 2 ** (stored - 1)
        kept = np.where(is_negative, kept | (2**16 - 2**stored), kept)
    return bytes(kept.astype(form).data)


def _has_planes(dataset: Dataset) -> bool:
    """Return whether an overlay says that it lies in the pixels (OverlayBitPosition above 0)."""
    tags = (tag for tag, _ in dataset.items() if tag.elem == 0x102 and tag.group >> 8 == 0x60)
    return any(dataset[tag].value for tag in list(tags))


def _frames(dataset: Dataset) -> Iterator[NDArray[np.integer]]:
    syntax = dataset.file_meta.TransferSyntaxUID
    pixels = _decoded(dataset) if syntax.is_encapsulated else _native(dataset)
    rows, columns = number(dataset, "Rows"), number(dataset, "Columns")
    samples = number(dataset, "SamplesPerPixel", 1)
    if samples == 1:
        yield from pixels.reshape(-1, rows, columns)
        return
    is_planar = number(dataset, "PlanarConfiguration", 0) == 1 and not syntax.is_encapsulated
    shape = (-1, samples, rows, columns) if is_planar else (-1, rows, columns, samples)
    for frame in pixels.reshape(shape):
        yield frame.sum(axis=0 if is_planar else 2, dtype=np.int32)


def _native(dataset: Dataset) -> NDArray[np.integer]:
    size = number(dataset, "BitsAllocated") // 8
    if size not in (1, 2, 4):
        raise ValueError("expected 8, 16 or 32 bits per value")
    syntax = dataset.file_meta.TransferSyntaxUID
    order = "<" if syntax.is_little_endian else ">"
    sign = "i" if number(dataset, "PixelRepresentation", 0) else "u"
    found = np.frombuffer(dataset.get_item("PixelData").value, f"{order}{sign}{size}")
    return found[: len(found) - len(found) % (number(dataset, "Rows") * number(dataset, "Columns"))]


def _decoded(dataset: Dataset) -> NDArray[np.integer]:
    try:
        return np.asarray(dataset.pixel_array)
    except Exception as problem:  # whatever a decoder raises, the pixels were not seen
        raise NoDecoder("no decoder for these pixels") from problem


def without_comments(encapsulated: bytes) -> bytes:
    """Return encapsulated frames with what is not pixels blanked, byte for byte in place.

    In JPEG and JPEG-LS comments, application segments other than JFIF's and Adobe's, and what
    follows the end of the image; in JPEG 2000 comments, and what follows the end.

    Raises:
        ValueError: if the items cannot be followed.
    """
    stream = bytearray(encapsulated)
    for start, stop in _items(encapsulated):
        head = encapsulated[start : start + 2]
        if head == b"\xff\xd8":
            _blank(stream, _jpeg_extras(encapsulated, start, stop))
        elif head == b"\xff\x4f":
            _blank(stream, _jpeg2000_comments(encapsulated, start, stop))
    return bytes(stream)


def _items(stream: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each fragment lies; the first item, the offset table, is not one."""
    at, number = 0, 0
    while at + 8 <= len(stream):
        tag, length = stream[at : at + 4], struct.unpack_from("<I", stream, at + 4)[0]
        if tag == b"\xfe\xff\xdd\xe0":
            return
        if tag != b"\xfe\xff\x00\xe0" or at + 8 + length > len(stream):
            raise ValueError("expected whole items of encapsulated pixels")
        if number:
            yield at + 8, at + 8 + length
        at, number = at + 8 + length, number + 1


def _jpeg_extras(stream: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    at = start + 2
    while at + 4 <= stop and stream[at] == 0xFF and stream[at + 1] != 0xDA:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xFE or (0xE0 <= marker <= 0xEF and not _is_needed(stream, at, length)):
            yield at + 4, min(at + 2 + length, stop)
        at += 2 + length
    end = stream.rfind(b"\xff\xd9", at, stop)
    if end >= 0:
        yield end + 2, stop


def _is_needed(stream: bytes, at: int, length: int) -> bool:
    """Return whether an application segment is JFIF's without a thumbnail, or Adobe's."""
    named = (stream[at + 1], stream[at + 4 : at + 9], length)
    return named in ((0xE0, b"JFIF\0", 16), (0xEE, b"Adobe", 14))


def _jpeg2000_comments(stream: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    at = start + 2
    while at + 4 <= stop and stream[at] == 0xFF and stream[at + 1] != 0x90:
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] == 0x64:
            yield at + 6, min(at + 2 + length, stop)
        at += 2 + length
    end = stream.rfind(b"\xff\xd9", at, stop)
    if end >= 0:
        yield end + 2, stop


def _blank(stream: bytearray, spans: Iterator[tuple[int, int]]) -> None:
    for start, stop in spans:
        stream[start:stop] = bytes(max(stop - start, 0))

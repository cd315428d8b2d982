"""Stored pixel values: read as they lie on disk or decoded, checked, and turned into units.

The value of a voxel is ``slope * stored + intercept`` (PS3.3 C.11.1.1.2), computed as in float64
and rounded once to float32; or what the modality LUT says.

Design: MONOCHROME1 is turned by ``lowest + highest - stored`` of what the stored bits can hold, for
films and MR only. The rule depends on the header, never on the picture: the same stored value means
the same thing in every slice and in every patient, as it would not if each picture's own extremes
were swapped. Padding of a MONOCHROME1 image lies at the top of the range (PS3.3 C.7.5.1.1.2) and so
comes to lie at the bottom, where MONOCHROME2 has it. Otherwise padding is a value like any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array

from shared_models.reasons import Fault
from shared_models.slices import Layout, Slice

EXACT = 2.0**24  # every whole number below is a float32
#: Syntaxes whose streams end in FF D9 (EOI of JPEG and JPEG-LS, EOC of JPEG 2000).
MARKED = {
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    *uid.JPEGLSTransferSyntaxes,
    *uid.JPEG2000TransferSyntaxes,
}
END = b"\xff\xd9"


def load(slices: Sequence[Slice], out: NDArray[np.float32]) -> None:
    """Put the values of ``slices`` into ``out``, float32 (z, y, x), in the same order.

    Raises:
        Fault: the pixels are cut short, damaged, or not what the header says.
    """
    scratch: NDArray[Any] | None = None
    decoded: tuple[Path, NDArray[Any]] | None = None
    for z, one in enumerate(slices):
        layout = one.layout
        assert layout is not None
        if one.offset is None:
            if decoded is None or decoded[0] != one.file:
                decoded = one.file, _decode(one, layout)
            stored = decoded[1][one.frame]
        else:
            if scratch is None:
                scratch = np.empty((layout.rows, layout.columns), _dtype(layout))
            stored = _read(one, scratch)
        _convert(_checked(stored, layout), one, layout, out[z])


def _dtype(layout: Layout) -> np.dtype[Any]:
    kind = "i" if layout.is_signed else "u"
    return np.dtype(f"{'>' if layout.is_big_endian else '<'}{kind}{layout.bits_allocated // 8}")


def _read(one: Slice, scratch: NDArray[Any]) -> NDArray[Any]:
    with one.file.open("rb", buffering=0) as stream:
        stream.seek(one.offset or 0)
        if stream.readinto(scratch.data) != scratch.nbytes:
            raise Fault("truncated")
    return scratch


def _decode(one: Slice, layout: Layout) -> NDArray[Any]:
    """Return all frames of a file, (frame, y, x), by pydicom's decoders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(one.file, force=True)
            syntax = dataset.file_meta.TransferSyntaxUID
            if syntax.is_compressed and syntax != uid.DeflatedExplicitVRLittleEndian:
                if not _can_decode(syntax):
                    raise Fault("transfer-syntax")
                _check_ends(dataset, one.num_frames, is_marked=syntax in MARKED)
            frames = pixel_array(dataset, raw=True)
        except Fault:
            raise
        except Exception:
            raise Fault("damaged") from None
    shape = (one.num_frames, layout.rows, layout.columns)
    if frames.size != np.prod(shape) or frames.dtype.kind not in "iu":
        raise Fault("damaged")
    if (frames.dtype.kind == "i") != layout.is_signed:
        raise Fault("damaged")
    return np.asarray(frames.reshape(shape))


def _can_decode(syntax: Any) -> bool:
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _check_ends(dataset: Any, num_frames: int, *, is_marked: bool) -> None:
    """Refuse a stream that stops early: some decoders fill the rest and say nothing."""
    streams = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=num_frames))
    if len(streams) != num_frames:
        raise Fault("bad-frames")
    if is_marked and not all(s[-16:].rstrip(b"\0").endswith(END) for s in streams):
        raise Fault("damaged")


def _checked(stored: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return ``stored`` as numbers of ``bits_stored`` bits; refuse what lies outside them."""
    if layout.bits_stored == layout.bits_allocated:
        return stored
    low, high = _range(layout)
    if layout.high_bit + 1 == layout.bits_stored:
        if stored.max() <= high and (not layout.is_signed or stored.min() >= low):
            return stored
        if not layout.is_signed:
            raise Fault("stray-bits")
    return _shifted(stored, layout)


def _shifted(stored: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return values that lie higher in their cells or are not sign-extended (PS3.5 8.1.1)."""
    width, below = layout.bits_allocated, layout.high_bit + 1 - layout.bits_stored
    above = width - 1 - layout.high_bit
    cells = stored.astype(stored.dtype.newbyteorder("="), copy=False).view(f"u{width // 8}")
    within = cells & np.array((1 << (layout.high_bit + 1)) - (1 << below), cells.dtype)
    values = (within << above).view(f"{'i' if layout.is_signed else 'u'}{width // 8}")
    values = values >> (above + below)
    extended = (values << below).view(cells.dtype)
    if not (np.array_equal(cells, within) or np.array_equal(cells, extended)):
        raise Fault("stray-bits")
    return np.asarray(values)


def _range(layout: Layout) -> tuple[int, int]:
    """Return the lowest and the highest value the stored bits can hold."""
    if layout.is_signed:
        return -(1 << (layout.bits_stored - 1)), (1 << (layout.bits_stored - 1)) - 1
    return 0, (1 << layout.bits_stored) - 1


def _convert(stored: NDArray[Any], one: Slice, layout: Layout, out: NDArray[np.float32]) -> None:
    if one.lut is not None:
        first, outputs = one.lut
        at = np.clip(stored.astype(np.int64) - first, 0, len(outputs) - 1)
        out[...] = np.asarray(outputs, np.float32)[at]
        return
    slope, intercept = one.slope, one.intercept
    low, high = _range(layout)
    if layout.is_inverted:
        slope, intercept = -slope, intercept + slope * (low + high)
    extreme = max(abs(low), abs(high)) * abs(slope) + abs(intercept)
    if slope.is_integer() and intercept.is_integer() and extreme < EXACT:
        out[...] = stored
        if slope != 1:
            out *= np.float32(slope)
        if intercept:
            out += np.float32(intercept)
        return
    exact = np.multiply(stored, slope, dtype=np.float64)
    exact += intercept
    out[...] = exact
    if not np.isfinite(out).all():
        raise Fault("bad-rescale")

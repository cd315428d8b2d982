"""Which planted identifiers are still in some bytes: a search that knows no DICOM and no profile.

Bytes are looked at as they are, inflated, unzipped and decoded from base64; text as UTF-8, Latin-1
and UTF-16 of both orders, in any case; names by their parts, dates in the usual ways of writing.
"""

from __future__ import annotations

import base64
import datetime
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_models.phantoms.identifiers import Planted

#: Shorter parts of a name or a text are found in anything.
SHORTEST = 6
MAX_DEPTH = 3
DATES = (
    "%Y%m%d",
    "%Y-%m-%d",
    "%Y.%m.%d",
    "%Y/%m/%d",
    "%d.%m.%Y",
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d-%m-%Y",
)
ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{24,}={0,2}")
DEFLATED = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08")


class Survivor(NamedTuple):
    """What was found again, and in which form."""

    planted: Planted
    form: str


class _Needle(NamedTuple):
    """``is_number``: part of a text, found only where it is not part of a longer number."""

    planted: Planted
    form: str
    text: bytes
    is_number: bool


def search(found: bytes, planted: Iterable[Planted]) -> list[Survivor]:
    """Return every planted identifier that ``found`` still holds, once."""
    needles = [needle for one in planted for needle in _needles(one)]
    starts = np.array([_number(needle.text) for needle in needles], np.uint64)
    survivors: dict[Planted, str] = {}
    for view in _views(found, MAX_DEPTH):
        lowered = view.lower()
        for index in np.flatnonzero(np.isin(starts, _grams(lowered))):
            needle = needles[index]
            if needle.planted not in survivors and _holds(lowered, needle):
                survivors[needle.planted] = needle.form
    return [Survivor(one, form) for one, form in survivors.items()]


def _holds(found: bytes, needle: _Needle) -> bool:
    if not needle.is_number:
        return needle.text in found
    around = rb"(?<![0-9])(?<![0-9]\0)" + re.escape(needle.text) + rb"(?!\0?[0-9])"
    return re.search(around, found) is not None


def _needles(one: Planted) -> Iterator[_Needle]:
    """Yield the ways in which a value may be written, in each encoding."""
    for form in _forms(one):
        for encoding in ENCODINGS:
            is_number = form.isdigit() and one.vr != "DA"
            yield _Needle(one, form, form.lower().encode(encoding), is_number)


def _forms(one: Planted) -> Iterator[str]:
    if one.vr == "DA":
        day = datetime.datetime.strptime(one.value, "%Y%m%d").date()
        yield from (day.strftime(shape) for shape in DATES)
    elif one.vr == "PN":
        yield from (part for part in re.split(r"[\^= ]+", one.value) if len(part) >= SHORTEST)
    elif one.vr == "DT":
        yield one.value[8:]  # the time of day, which is its own; the day may be another's
    else:
        yield one.value
        parts = re.split(r"[\s_]+", one.value)
        yield from (part for part in parts if part.isdigit() and len(part) > SHORTEST)


def _views(found: bytes, depth: int) -> Iterator[bytes]:
    """Yield the bytes, and what they turn out to be when decoded or inflated."""
    yield found
    if not depth:
        return
    inner = b"\0".join(_unpacked(found))
    if len(inner) > SHORTEST:
        yield from _views(inner, depth - 1)


def _unpacked(found: bytes) -> Iterator[bytes]:
    if zipfile.is_zipfile(io.BytesIO(found)):
        with zipfile.ZipFile(io.BytesIO(found)) as archive:
            for entry in archive.infolist():
                yield entry.filename.encode()
                yield archive.read(entry)
    for match in BASE64.finditer(found):
        text = match[0].rstrip(b"=")
        yield base64.b64decode(text[: len(text) // 4 * 4])
    for match in DEFLATED.finditer(found):
        yield _inflated(found[match.start() :], zlib.MAX_WBITS | 32)
    if found[128:132] == b"DICM" and len(found) > 144:  # a data set may be deflated as a whole
        length = int.from_bytes(found[140:144], "little")
        yield _inflated(found[144 + length :], -zlib.MAX_WBITS)


def _inflated(found: bytes, bits: int) -> bytes:
    try:
        return zlib.decompressobj(bits).decompress(found, 2**28)
    except zlib.error:
        return b""


def _grams(found: bytes) -> NDArray[np.uint64]:
    """Return every run of SHORTEST bytes as a number."""
    if len(found) < SHORTEST:
        return np.zeros(0, np.uint64)
    values = np.frombuffer(found, np.uint8).astype(np.uint64)
    count = len(values) - SHORTEST + 1
    grams = np.zeros(count, np.uint64)
    for offset in range(SHORTEST):
        grams = (grams << np.uint64(8)) | values[offset : offset + count]
    return np.unique(grams)


def _number(needle: bytes) -> int:
    return int.from_bytes(needle[:SHORTEST], "big")

"""The items of a sequence as they lie in a file: bytes in, bytes out.

pydicom leaves a sequence of stated length as bytes until somebody looks into it. De-identification
looks into every one that may stay, and an image of many frames has thousands: reading and writing
them element by element in pydicom costs many times what the whole file does otherwise.

Guarantees:
    What is read is what pydicom reads, element by element; what it would read in another way, or
    complain about, is an error here.

References:
    DICOM PS3.5 7.1 (data elements), 7.5 (sequences and items).
"""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import NamedTuple

from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
KNOWN = {vr.value.encode(): vr.value for vr in VR if len(vr.value) == 2}
LONG = frozenset(EXPLICIT_VR_LENGTH_32)


class _Form(NamedTuple):
    """How elements lie in the bytes; ``head``: group, element and length of four bytes."""

    head: Struct
    explicit: Struct  # group, element, VR, length of two bytes
    long: Struct  # a length of four bytes
    implicit: bool
    little: bool


def items_of(value: bytes, *, implicit: bool, little: bool) -> list[dict[BaseTag, RawDataElement]]:
    """Return the items in a sequence's value, the elements of each by tag.

    Raises:
        ValueError: if anything is unusual, so that pydicom must decide what it is.
    """
    form, at, items = _form(implicit, little), 0, []
    while at < len(value):
        tag, length = _mark(value, at, form)
        if tag == SEQUENCE_END:
            break
        if tag != ITEM:
            raise ValueError("expected an item")
        elements, at = _elements(value, at + 8, _stop(value, at + 8, length), form)
        items.append(elements)
    return items


def bytes_of_items(items: list[dict[BaseTag, RawDataElement]], *, little: bool) -> bytes:
    """Return a sequence's value: items of stated length, their elements in the order of tags.

    Raises:
        ValueError: if a value is longer than its representation may be.
    """
    form, parts = _form(True, little), list[bytes]()
    for item in items:
        inside = b"".join(_encoded(item[tag], form) for tag in sorted(item, key=int))
        parts += form.head.pack(0xFFFE, 0xE000, len(inside)), inside
    return b"".join(parts)


@cache
def _form(implicit: bool, little: bool) -> _Form:
    order = "<" if little else ">"
    head, explicit, long = (Struct(order + layout) for layout in ("HHL", "HH2sH", "L"))
    return _Form(head, explicit, long, implicit, little)


def _mark(value: bytes, at: int, form: _Form) -> tuple[int, int]:
    if at + 8 > len(value):
        raise ValueError("expected whole items")
    group, element, length = form.head.unpack_from(value, at)
    return group << 16 | element, length


def _stop(value: bytes, at: int, length: int) -> int | None:
    """Return where something of this length ends, None if it says so itself."""
    if length == UNDEFINED:
        return None
    if at + length > len(value):
        raise ValueError("expected whole items")
    return at + length


def _elements(
    value: bytes, at: int, stop: int | None, form: _Form
) -> tuple[dict[BaseTag, RawDataElement], int]:
    """Return the elements from ``at`` to ``stop``, or to the mark of the end, and where that is."""
    found: dict[BaseTag, RawDataElement] = {}
    end = len(value) if stop is None else stop
    while at < end:
        if at + 8 > end:
            raise ValueError("expected whole elements")
        group, number, vr, length = form.explicit.unpack_from(value, at)
        if group == 0xFFFE:
            if number == 0xE00D and stop is None:
                return found, at + 8
            raise ValueError("expected an element")
        name = None if form.implicit else KNOWN.get(vr)
        if form.implicit:
            (length,) = form.long.unpack_from(value, at + 4)
        elif name is None:
            raise ValueError("expected a value representation")
        elif name in LONG:
            at += 4
            if at + 8 > end:
                raise ValueError("expected whole elements")
            (length,) = form.long.unpack_from(value, at + 4)
        at += 8
        if length == UNDEFINED:
            if name not in ("SQ", None):
                raise ValueError("expected a sequence")
            begin, at = at, _end_of_sequence(value, at, form)
            content = value[begin : at - 8]
        else:
            begin, at = at, at + length
            content = value[begin:at]
        if at > end:
            raise ValueError("expected whole elements")
        tag = _tag(group << 16 | number)
        found[tag] = RawDataElement(tag, name, len(content), content, 0, form.implicit, form.little)
    if stop is None:
        raise ValueError("expected the mark of an item's end")
    return found, at


def _end_of_sequence(value: bytes, at: int, form: _Form) -> int:
    while True:
        tag, length = _mark(value, at, form)
        if tag == SEQUENCE_END:
            return at + 8
        if tag != ITEM:
            raise ValueError("expected an item")
        stop = _stop(value, at + 8, length)
        at = _elements(value, at + 8, None, form)[1] if stop is None else stop


@cache
def _tag(number: int) -> BaseTag:
    return BaseTag(number)


def _encoded(element: RawDataElement, form: _Form) -> bytes:
    content = element.value or b""
    group, number, vr = element.tag >> 16, element.tag & 0xFFFF, element.VR
    if element.is_implicit_VR or vr is None:
        return form.head.pack(group, number, len(content)) + content
    name = vr.encode()
    if vr in LONG:
        return form.explicit.pack(group, number, name, 0) + form.long.pack(len(content)) + content
    if len(content) > 0xFFFF:
        raise ValueError("expected a value of at most 65534 bytes")
    return form.explicit.pack(group, number, name, len(content)) + content

"""Items read from bytes are pydicom's, and what is unusual is left to it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import DataElement, Dataset, dcmread, dcmwrite
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_sequence
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.values import convert_SQ

from client.ingest import deid
from client.ingest.items import bytes_of_items, items_of
from client.ingest.profile import Terms

FORMS = ((False, True), (True, True), (False, False))
LEAVES: dict[int, tuple[str, Any]] = {
    0x00100010: ("PN", st.sampled_from(["OKAFOR^ADA", "X", ""])),
    0x00080018: ("UI", st.sampled_from(["1.2.840.10008.1.1", "1.2.3"])),
    0x00280010: ("US", st.integers(0, 2**16 - 1)),
    0x00189087: ("FD", st.floats(0, 1)),
    0x00291010: ("OB", st.binary(max_size=9).map(lambda b: b + bytes(len(b) % 2))),
    0x0040A160: ("UT", st.text("ab ", max_size=9)),
}


@st.composite
def datasets(draw: st.DrawFn, depth: int = 2) -> Dataset:
    """Return an item with some of the leaves, and sequences of items of either kind of length."""
    found = Dataset()
    for tag in draw(st.sets(st.sampled_from(sorted(LEAVES)))):
        vr, values = LEAVES[tag]
        found.add_new(tag, vr, draw(values))
    if depth and draw(st.booleans()):
        inner = draw(st.lists(datasets(depth=depth - 1), max_size=2))
        element = DataElement(0x00081115, "SQ", Sequence(inner))
        element.is_undefined_length = draw(st.booleans())
        found.add(element)
    found.is_undefined_length_sequence_item = draw(st.booleans())
    return found


def encoded(items: list[Dataset], implicit: bool, little: bool) -> bytes:
    stream = DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = implicit, little
    write_sequence(stream, DataElement(0x00081115, "SQ", Sequence(items)), ["iso8859"])
    return stream.getvalue()


def told(items: Any, implicit: bool, little: bool) -> list[Any]:
    """Return tags, representations and values, whatever holds them."""
    found = []
    for item in items:
        if not isinstance(item, Dataset):
            item = Dataset(dict(item))  # which decodes in place
            item.set_original_encoding(implicit, little, "iso8859")
        values = (told(e.value, implicit, little) if e.VR == "SQ" else e.value for e in item)
        found.append([(e.tag, e.VR, value or None) for e, value in zip(item, values, strict=True)])
    return found


@settings(max_examples=50)
@given(st.lists(datasets(), max_size=3), st.sampled_from(FORMS))
def test_what_is_read_is_what_pydicom_reads(items: list[Dataset], form: tuple[bool, bool]) -> None:
    implicit, little = form
    value = encoded(items, implicit, little)
    found = items_of(value, implicit=implicit, little=little)
    theirs = told(convert_SQ(value, implicit, little, ["iso8859"]), implicit, little)
    assert told(found, implicit, little) == theirs
    again = bytes_of_items(found, little=little)
    assert told(items_of(again, implicit=implicit, little=little), implicit, little) == theirs


@settings(max_examples=50)
@given(st.lists(datasets(), min_size=1, max_size=2), st.sampled_from(FORMS), st.data())
def test_cut_items_are_an_error_or_end_between_items(
    items: list[Dataset], form: tuple[bool, bool], data: st.DataObject
) -> None:
    implicit, little = form
    value = encoded(items, implicit, little)
    cut = value[: data.draw(st.integers(0, len(value) - 1))]
    try:
        found = items_of(cut, implicit=implicit, little=little)
    except ValueError:
        return
    whole = told(items_of(value, implicit=implicit, little=little), implicit, little)
    assert told(found, implicit, little) == whole[: len(found)]
    assert len(found) < len(whole)


def test_what_is_unusual_is_an_error() -> None:
    head = b"\xfe\xff\x00\xe0"
    for value, about in (
        (b"\x10\x00\x10\x00PN\x00\x00", "an item"),
        (head + b"\x08\0\0\0" + b"\x10\x00\x10\x00pn\x00\x00", "representation"),
        (head + b"\x08\0\0\0" + b"\x10\x00\x10\x00PN\x08\x00", "whole elements"),
        (head + b"\xff\xff\xff\xff", "end"),
        (head + b"\x0c\0\0\0" + b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff", "a sequence"),
    ):
        with pytest.raises(ValueError, match=about):
            items_of(value, implicit=False, little=True)


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_a_picture_is_cleaned_the_same_whoever_reads_its_items(new_image, key, monkeypatch, syntax):
    def groups(number: int) -> Dataset:
        inner, code, item = Dataset(), Dataset(), Dataset()
        inner.ImagePositionPatient = [0, 0, number]
        inner.PatientName, inner.ReferencedSOPInstanceUID = "OKAFOR^ADA", "1.2.3"
        inner.StudyDate = "20200229"
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "T-D1100", "SRT", "Ada's"
        item.PlanePositionSequence, item.AnatomicRegionSequence = [inner], [code]
        item.add_new(0x00291010, "LO", "MRN448213")
        return item

    image = new_image(syntax)
    image.PerFrameFunctionalGroupsSequence = [groups(n) for n in range(3)]
    stream = io.BytesIO()
    dcmwrite(stream, image)
    ours = cleaned(stream.getvalue(), key)
    monkeypatch.setattr(deid, "items_of", refuse)
    assert cleaned(stream.getvalue(), key) == ours
    assert ours.count("Image Position (Patient)") == 3
    assert ours.count("Anatomic Region Sequence") == 3
    assert "OKAFOR" not in ours and "Ada" not in ours


def refuse(*_: Any, **__: Any) -> Any:
    raise ValueError("unusual")


def cleaned(image: bytes, key: Any) -> str:
    found = deid.deidentify(dcmread(io.BytesIO(image)), Terms(), key)
    assert isinstance(found, Dataset), found
    stream = io.BytesIO()
    dcmwrite(stream, found)
    return str(dcmread(io.BytesIO(stream.getvalue())))

"""What is done to one element of a data set, by the act its rule names.

An act returns the very element it was given if that may stay as it is, another in its place, or
None where it must go. Elements are looked at as the bytes they were read as; few are ever decoded.

References:
    DICOM PS3.5 6.2 (value representations); PS3.15 E.3.6 (modified dates), E.3.7 (ages).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, timedelta
from functools import cache, lru_cache
from typing import NamedTuple

from pydicom import DataElement, Dataset
from pydicom._uid_dict import UID_dictionary
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag

from client.ingest.keys import Key
from client.ingest.profile import SIZES, Act, Rule

DUMMIES = {"DA": "19000101", "DT": "19000101", "TM": "000000", "AS": "000Y", "IS": "0", "DS": "0"}
DUMMIES |= dict.fromkeys(["AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"], "REMOVED")
DECIMALS = re.compile(rb"[0-9eE+.\- \\]*\0?")
SEPARATORS = re.compile(r"[ _/*+.\-]+")
RUNS = re.compile(r"[0-9]+")
#: Digits that a kept text may hold in all: neither dates nor record numbers have so few.
MOST_DIGITS = 4
DATE = re.compile(r"(\d{4})\.?(\d{2})\.?(\d{2})")
TIME = re.compile(r"\d{2}(?:\d{2}(?:\d{2}(?:\.\d{1,6})?)?)?")
DATETIME = re.compile(r"(\d{8})(\d{2}(?:\d{2}(?:\d{2}(?:\.\d{1,6})?)?)?)?(?:[+-]\d{4})?")
AGE = re.compile(r"(\d{3})([DWMY])")
OLDEST_AGE = {"D": 32872, "W": 4695, "M": 1080, "Y": 90}  # 90 years
PRINTABLE = re.compile(r"[ -\[\]-~]*")

Element = DataElement | RawDataElement
Item = dict[BaseTag, Element]
Note = Callable[[str, str, str], None]


class Job(NamedTuple):
    """What stays the same within one object; ``made``: what became of its sequences so far."""

    acts: dict[int, tuple[Apply | None, Rule]]
    words: frozenset[str]
    key: Key
    patient: str
    days: int
    keep_times: bool
    traces: frozenset[str]
    implicit: bool
    little: bool
    note: Note | None
    made: dict[tuple[int, bytes], Element | None]


Apply = Callable[[Element, Rule, Job], Element | None]


def _numbers(element: Element, rule: Rule, job: Job) -> Element | None:
    if not element.is_raw:
        is_plain = all(isinstance(value, (int, float)) for value in several(element.value))
        return element if is_plain else None
    size = SIZES[element.VR or min(rule.vrs)]
    found = len(bytes_of(element))
    return element if found % size == 0 and rule.allows(found // size) else None


def _decimals(element: Element, rule: Rule, job: Job) -> Element | None:
    text = bytes_of(element) if element.is_raw else text_of(element).encode("ascii", "replace")
    is_plain = DECIMALS.fullmatch(text) and rule.allows(text.count(b"\\") + 1 if text else 0)
    return element if is_plain else None


def _words(element: Element, rule: Rule, job: Job) -> Element | None:
    text = text_of(element)
    values = [value.strip() for value in text.split("\\")]
    known = [_is_known(value, job.words) for value in values]
    if all(known):
        return element
    if rule.keyword in ("ImageType", "FrameType"):  # a value means what its place says
        found = [v if k else "OTHER" for v, k in zip(values, known, strict=True)]
    else:
        found = [v for v, k in zip(values, known, strict=True) if k]
        if not any(found) and rule.vrs & {"LO", "SH"}:  # may be required, with any value
            found = ["UNKNOWN"]
    return with_text(element, "\\".join(found), job)


@lru_cache(maxsize=4096)
def _is_known(value: str, words: frozenset[str]) -> bool:
    """Return whether ``value`` is made of words that the profile knows, and short codes."""
    capitals = value.upper()
    if not value or capitals in words:
        return True
    if sum(character.isdigit() for character in value) > MOST_DIGITS:
        return False
    parts = (part for part in SEPARATORS.split(capitals) if part)
    return value.isascii() and all(part in words or _is_code(part, words) for part in parts)


def _is_code(part: str, words: frozenset[str]) -> bool:
    """Return whether ``part`` is digits among known words and at most two letters: B40F, MR750."""
    runs = RUNS.split(part)
    return len(runs) > 1 and all(
        not run or (run.isalpha() and (len(run) <= 2 or run in words)) for run in runs
    )


def _retained(element: Element, rule: Rule, job: Job) -> Element | None:
    text = text_of(element).upper()
    if not PRINTABLE.fullmatch(text) or any(trace in text for trace in job.traces):
        return None
    return element


def _uids(element: Element, rule: Rule, job: Job) -> Element | None:
    values = text_of(element).split("\\")
    new = [v if not v or v in UID_dictionary else job.key.uid(v) for v in values]
    return element if new == values else with_text(element, "\\".join(new), job)


def _date(element: Element, rule: Rule, job: Job) -> Element | None:
    values = [_moved(value.strip(), DATE, job) for value in text_of(element).split("\\")]
    return with_text(element, "" if "" in values else "\\".join(values), job)


def _datetime(element: Element, rule: Rule, job: Job) -> Element | None:
    moved = []
    for value in text_of(element).split("\\"):
        found = DATETIME.fullmatch(value.strip())
        day = _moved(found[1], DATE, job) if found else ""
        moved.append(day + (found[2] or "") if found and day and job.keep_times else day)
    return with_text(element, "" if "" in moved else "\\".join(moved), job)


def _moved(value: str, shape: re.Pattern[str], job: Job) -> str:
    """Return the date this patient's days later; empty if it is none that can be moved."""
    found = shape.fullmatch(value)
    try:
        day = date(*(int(part) for part in found.groups())) if found else None
        return f"{day + timedelta(days=job.days):%Y%m%d}".rjust(8, "0") if day else ""
    except (ValueError, OverflowError):
        return ""


def _time(element: Element, rule: Rule, job: Job) -> Element | None:
    are_times = all(TIME.fullmatch(v.strip()) for v in text_of(element).split("\\"))
    return element if are_times else with_text(element, "", job)


def _age(element: Element, rule: Rule, job: Job) -> Element | None:
    found = AGE.fullmatch(text_of(element))
    if not found:
        return with_text(element, "", job)
    return with_text(element, "090Y", job) if int(found[1]) >= OLDEST_AGE[found[2]] else element


def _empty(element: Element, rule: Rule, job: Job) -> Element | None:
    return with_text(element, "", job)


def _dummy(element: Element, rule: Rule, job: Job) -> Element | None:
    vr = min(rule.vrs)
    if vr not in DUMMIES:
        return None
    return with_text(element, DUMMIES[vr] if text_of(element) else "", job)


@cache
def tag_of(keyword: str) -> BaseTag:
    """Return the tag of a keyword of the standard."""
    return Tag(keyword)


def as_dataset(kept: Item, job: Job) -> Dataset:
    """Return a data set of these elements, to be written as they were read."""
    dataset = Dataset(kept)
    dataset.set_original_encoding(job.implicit, job.little, "iso8859")
    return dataset


def put(kept: Item, keyword: str, vr: str, text: str, job: Job) -> None:
    """Add an attribute with a text in ASCII."""
    tag = tag_of(keyword)
    kept[tag] = _encoded(tag, vr, text, job)


def with_text(element: Element, text: str, job: Job) -> RawDataElement:
    """Return the element with another text, in ASCII."""
    vr = element.VR or min(job.acts[int(element.tag)][1].vrs)
    return _encoded(element.tag, vr, text, job)


def with_bytes(element: Element, value: bytes, job: Job) -> RawDataElement:
    """Return the element of pixels with others."""
    is_encapsulated = value[:4] == b"\xfe\xff\x00\xe0"
    length = 0xFFFFFFFF if is_encapsulated else len(value)
    vr = element.VR or "OW"
    return RawDataElement(element.tag, vr, length, value, 0, job.implicit, job.little)


def first(dataset: Dataset, keyword: str) -> str:
    """Return the first value of an attribute as text without padding, empty if there is none."""
    return text_at(dataset, keyword).partition("\\")[0].strip()


def text_at(dataset: Dataset, keyword: str) -> str:
    """Return all values of an attribute as one text without padding, empty if there is none."""
    tag = tag_of(keyword)
    element = dataset.get_item(tag)
    if element is None:
        return ""
    if element.is_raw and not bytes_of(element).isascii():
        element = dataset[tag]  # decoded with its character set
    return text_of(element)


def number(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """Return the first value of an attribute that holds whole numbers.

    Raises:
        ValueError: if there is none and no default.
    """
    tag = tag_of(keyword)
    element = dataset.get_item(tag)
    if element is None or not element.value:
        if default is None and (element is None or element.value != 0):
            raise ValueError(f"expected {keyword}")
        return default or 0
    if isinstance(element, RawDataElement) and (element.VR or "US", element.length) == ("US", 2):
        return int.from_bytes(bytes_of(element), "little" if element.is_little_endian else "big")
    return int(str(several(dataset[tag].value)[0]))


def text_of(element: Element) -> str:
    """Return all values as one text, separated as in a file, without padding."""
    if element.is_raw:
        return bytes_of(element).decode("latin-1").strip(" \0")
    value = element.value
    return "" if value is None else "\\".join(str(v) for v in several(value)).strip(" \0")


def several(value: object) -> list[object]:
    """Return the values of an element that may have one, several or none."""
    return list(value) if isinstance(value, (list, MultiValue)) else [value]


def bytes_of(element: Element) -> bytes:
    """Return the value as bytes.

    Raises:
        ValueError: if it was left in the file, or is not bytes.
    """
    value = element.value
    if value is None and not getattr(element, "length", 0):
        return b""
    if not isinstance(value, bytes):
        raise ValueError("expected a data set read whole, got one with values left in the file")
    return value


def _encoded(tag: BaseTag, vr: str, text: str, job: Job) -> RawDataElement:
    value = text.encode("ascii")
    if len(value) % 2:
        value += b"\0" if vr == "UI" else b" "
    return RawDataElement(tag, vr, len(value), value, 0, job.implicit, job.little)


NOTHING: tuple[None, Rule] = (None, Rule(Act.EMPTY, frozenset(), "", 0))
ACTS: dict[Act, Apply] = {
    Act.NUMBERS: _numbers,
    Act.DECIMALS: _decimals,
    Act.WORDS: _words,
    Act.TEXT: _retained,
    Act.UID: _uids,
    Act.DATE: _date,
    Act.DATETIME: _datetime,
    Act.TIME: _time,
    Act.AGE: _age,
    Act.EMPTY: _empty,
    Act.DUMMY: _dummy,
}

"""Which attribute of a DICOM object is kept, changed or removed, for the options a site chose.

``table_e1_1.csv`` is table E.1-1 of PS3.15 (edition 2026c), written by
``tests/client/ingest/test_profile.py`` from dicom-anonymizer 2.1.0. ``profile.toml`` says what else
may stay; what neither names is removed.

References:
    DICOM PS3.15 2026c Annex E (Attribute Confidentiality Profiles), table E.1-1, section E.3.
    PS3.16 CID 7050 (De-identification Method).
"""

from __future__ import annotations

import tomllib
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import NamedTuple

from pydicom import uid as uids
from pydicom.datadict import dictionary_has_tag, get_entry, tag_for_keyword

from client.ingest.terms import Clearance, Terms

__all__ = ["Clearance", "Terms"]

EDITION = "PS3.15 2026c"
#: Dates and times that no option retains: they are the patient's, not the examination's.
PERSONAL_TIMES = frozenset({"PatientBirthDate", "PatientBirthTime", "GPSTimeStamp"})
TEXTS = frozenset(["AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"])
#: How many bytes one value takes; a VR that is not here is never kept as numbers.
SIZES = {"AT": 4, "FD": 8, "FL": 4, "SL": 4, "SS": 2, "SV": 8, "UL": 4, "US": 2, "UV": 8}


class Act(StrEnum):
    """What is done to an attribute that is not removed."""

    NUMBERS = "numbers"
    DECIMALS = "decimals"
    WORDS = "words"
    TEXT = "text"
    UID = "uid"
    SEQUENCE = "sequence"
    PIXELS = "pixels"
    TABLE = "lookup table"
    DATE = "date"
    DATETIME = "datetime"
    TIME = "time"
    AGE = "age"
    EMPTY = "empty"
    DUMMY = "dummy"


class Rule(NamedTuple):
    """``vrs``: the value representations the standard gives it; any other is removed.

    ``num_values`` is how many values it has, 0 if that varies.
    """

    act: Act
    vrs: frozenset[str]
    keyword: str
    num_values: int

    def allows(self, found: int) -> bool:
        """Return whether an element of so many values may be this attribute."""
        return found == 0 or self.num_values in (0, found)


class Profile(NamedTuple):
    """``rules`` by tag; ``words`` a kept text may consist of, in capitals; classes by UID.

    ``telling``: tags whose words may not come back in a text that an option retains.
    """

    rules: dict[int, Rule]
    words: frozenset[str]
    images: frozenset[str]
    lettered: frozenset[str]
    screens: frozenset[str]
    telling: tuple[int, ...]


@cache
def profile_for(terms: Terms) -> Profile:
    """Return what applies under ``terms``: the options first, then the table, then what is kept."""
    document = tomllib.loads(_read("profile.toml"))
    rules = {}
    for keywords in document["keep"].values():
        for keyword in keywords.split():
            rules[_tag(keyword)] = _rule(_tag(keyword), _kept(_vrs(_tag(keyword))))
    for tag, action in table().items():
        act = _listed(tag, action, terms)
        rules.pop(tag, None)
        if act is not None:
            rules[tag] = _rule(tag, act)
    for keyword in _retained(document["options"], terms):
        act = Act.AGE if keyword == "PatientAge" else _retained_as(_vrs(_tag(keyword)))
        rules[_tag(keyword)] = _rule(_tag(keyword), act)
    return Profile(
        rules,
        frozenset(" ".join(document["words"].values()).split()),
        frozenset(getattr(uids, name) for name in document["objects"]["image"].split()),
        frozenset(getattr(uids, name) for name in document["objects"]["lettered"].split()),
        frozenset(document["objects"]["screens"].split()),
        tuple(_tag(keyword) for keyword in document["options"]["telling"].split()),
    )


@cache
def table() -> dict[int, str]:
    """Return table E.1-1: the Basic Profile's action by tag. Groups 50xx and 60xx are not in it."""
    rows = (line.split(",") for line in _read("table_e1_1.csv").splitlines()[1:])
    return {int(tag, 16): action for tag, action, _ in rows}


@cache
def code_meanings() -> dict[tuple[str, str], str]:
    """Return the standard's own meaning of each code of PS3.16, by scheme and value."""
    from pydicom.sr._concepts_dict import concepts
    from pydicom.sr._snomed_dict import mapping

    schemes: dict[str, dict[str, dict[str, tuple[str, object]]]] = concepts  # type: ignore[assignment]
    found: dict[tuple[str, str], str] = {}
    for scheme, keywords in schemes.items():
        for values in keywords.values():
            for value, (meaning, *_) in values.items():  # of several, the shortest: Liver
                known = found.get((scheme, value), meaning)
                found[scheme, value] = min(known, meaning, key=lambda text: (len(text), text))
    for old, new in mapping["SRT"].items():
        found["SRT", old] = found.get(("SCT", new), old)
    return found


def _listed(tag: int, action: str, terms: Terms) -> Act | None:
    """Return what the table asks for: of several actions the one no object is invalid after."""
    vrs = _vrs(tag)
    vr = min(vrs, default="")
    if vrs and get_entry(tag)[4] not in PERSONAL_TIMES:
        if terms.dates == "shift" and vr in ("DA", "DT"):
            return Act.DATE if vr == "DA" else Act.DATETIME
        if terms.dates == "shift" and terms.keep_times and vr == "TM":
            return Act.TIME
    if vr == "SQ":
        if "U" in action:
            return Act.SEQUENCE
        return Act.EMPTY if "Z" in action and "D" not in action else None
    if action == "X" or not vr:
        return None
    if "U" in action or vr == "UI":
        return Act.UID
    return Act.DUMMY if "D" in action else Act.EMPTY


def _kept(vrs: frozenset[str]) -> Act:
    if vrs <= SIZES.keys():
        return Act.NUMBERS
    if vrs <= {"DS", "IS"}:
        return Act.DECIMALS
    if vrs <= TEXTS:
        return Act.WORDS
    if "SQ" in vrs:
        return Act.SEQUENCE
    if "UI" in vrs:
        return Act.UID
    return Act.PIXELS if "OB" in vrs else Act.TABLE


def _retained_as(vrs: frozenset[str]) -> Act:
    """Return how an option keeps an attribute; a device's own dates are shifted with the rest."""
    if vrs & {"DA", "TM"}:
        return Act.DATE if "DA" in vrs else Act.TIME
    return Act.TEXT if vrs & {"SH", "LO"} else _kept(vrs)


def _retained(options: dict[str, str], terms: Terms) -> list[str]:
    device = options["device"].split() if terms.retain_device else []
    if terms.dates != "shift":
        device = [keyword for keyword in device if not _vrs(_tag(keyword)) & {"DA", "TM"}]
    return device + (options["patient"].split() if terms.retain_patient else [])


def _rule(tag: int, act: Act) -> Rule:
    _, multiplicity, _, _, keyword = get_entry(tag)
    return Rule(act, _vrs(tag), keyword, int(multiplicity) if multiplicity.isdigit() else 0)


def _vrs(tag: int) -> frozenset[str]:
    return frozenset(get_entry(tag)[0].split(" or ")) if dictionary_has_tag(tag) else frozenset()


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError(f"no attribute {keyword!r} in the data dictionary")
    return tag


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")

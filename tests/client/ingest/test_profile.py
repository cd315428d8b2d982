"""The profile is the standard's table and a list of what may stay.

``PYTHONPATH=. python tests/client/ingest/test_profile.py`` writes the table anew from the installed
dicom-anonymizer, whose tables are generated from the standard.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from pydicom.datadict import dictionary_has_tag, keyword_for_tag

from client.ingest.profile import Act, Terms, profile_for, table

SOURCE = "dicomanonymizer.dicom_anonymization_databases.dicomfields_2026c"
TABLE = Path(__file__).parents[3] / "client" / "ingest" / "table_e1_1.csv"
ACTIONS = {
    "D_TAGS": "D",
    "Z_TAGS": "Z",
    "X_TAGS": "X",
    "U_TAGS": "U",
    "Z_D_TAGS": "Z/D",
    "X_Z_TAGS": "X/Z",
    "X_D_TAGS": "X/D",
    "X_Z_D_TAGS": "X/Z/D",
    "X_Z_U_STAR_TAGS": "X/Z/U*",
}


def derive() -> str:
    source = importlib.import_module(SOURCE)
    rows = {
        (tag[0] << 16) + tag[1]: action
        for name, action in ACTIONS.items()
        for tag in getattr(source, name)
        if len(tag) == 2  # curves and overlays are ranges of groups
    }
    lines = ["tag,action,keyword"]
    for tag, action in sorted(rows.items()):
        lines.append(
            f"{tag:08X},{action},{keyword_for_tag(tag) if dictionary_has_tag(tag) else ''}"
        )
    return "\n".join(lines) + "\n"


def test_the_table_is_the_one_generated_from_the_standard():
    pytest.importorskip("dicomanonymizer")
    assert TABLE.read_text() == derive()


def test_every_attribute_of_the_table_is_removed_or_changed():
    for terms in (Terms(), Terms(dates="remove")):
        rules = profile_for(terms).rules
        plain = {tag: rules[tag].act for tag in table() if tag in rules}
        assert not {Act.NUMBERS, Act.DECIMALS, Act.WORDS, Act.TEXT, Act.PIXELS} & {*plain.values()}


def test_an_option_brings_back_what_it_names_and_nothing_else():
    plain, more = profile_for(Terms()).rules, profile_for(Terms(retain_device=True)).rules
    changed = {rule.keyword for tag, rule in more.items() if plain.get(tag) != rule}
    assert {"DeviceSerialNumber", "StationName", "SoftwareVersions"} <= changed
    assert not any("Patient" in keyword or "Institution" in keyword for keyword in changed)


def test_no_private_tag_curve_or_overlay_has_a_rule():
    for tag in profile_for(Terms(retain_device=True, retain_patient=True)).rules:
        group = tag >> 16
        assert group % 2 == 0
        assert group not in range(0x5000, 0x5100)
        assert group not in range(0x6000, 0x6100)


if __name__ == "__main__":
    TABLE.write_text(derive())

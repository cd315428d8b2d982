"""Codes for what classes are called: SNOMED CT where a name is known, else the plan's own word.

References:
    DICOM PS3.16 CID 7150 (categories), 7151 (types of segmented property); PS3.3 8.2 (a coding
    scheme designator that begins with 99 is a private one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.sr.coding import Code

SCHEME = "99CONSILIA"
ANATOMY = ("91723000", "Anatomical Structure")
FINDING = ("49755003", "Morphologically Abnormal Structure")
TISSUE = ("85756007", "Tissue")

#: SNOMED CT codes and meanings by a class's name, in small letters.
KNOWN: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    ANATOMY: {
        "aorta": ("15825003", "Aorta"),
        "bladder": ("89837001", "Bladder"),
        "bone": ("272673000", "Bone"),
        "brain": ("12738006", "Brain"),
        "gallbladder": ("28231008", "Gallbladder"),
        "heart": ("80891009", "Heart"),
        "hippocampus": ("5366008", "Hippocampus"),
        "kidney": ("64033007", "Kidney"),
        "liver": ("10200004", "Liver"),
        "lung": ("39607008", "Lung"),
        "organ": ("91772007", "Organ"),
        "pancreas": ("15776009", "Pancreas"),
        "prostate": ("41216001", "Prostate"),
        "spleen": ("78961009", "Spleen"),
        "stomach": ("69695003", "Stomach"),
    },
    FINDING: {
        "cyst": ("367643001", "Cyst"),
        "edema": ("79654002", "Edema"),
        "hemorrhage": ("50960005", "Hemorrhage"),
        "lesion": ("52988006", "Lesion"),
        "mass": ("4147007", "Mass"),
        "nodule": ("27925004", "Nodule"),
        "tumor": ("108369006", "Neoplasm"),
        "tumour": ("108369006", "Neoplasm"),
    },
}


def coded(name: str, *, number: int) -> tuple[Code, Code]:
    """Return the category and the type of a class; ``number`` tells unknown ones apart."""
    from pydicom.sr.coding import Code

    for (value, meaning), types in KNOWN.items():
        if name.lower() in types:
            code, known_as = types[name.lower()]
            return Code(value, "SCT", meaning), Code(code, "SCT", known_as)
    own = Code(f"CLASS-{number}", SCHEME, plain(name))
    return Code(TISSUE[0], "SCT", TISSUE[1]), own


def plain(text: str, *, length: int = 64) -> str:
    """Return text as a DICOM value may hold it: printable, no backslash, at most ``length``."""
    return "".join(c if c.isprintable() and c != "\\" else " " for c in text)[:length] or "unnamed"

"""DICOM files with an identifier in every place that can hold text, and the list of what is where.

For trying what de-identification leaves. Nobody's: every value is made of the seed. Planted are all
attributes of the data dictionary whose value representation can carry text or bytes, an item in
every sequence, items within items, private attributes of several forms, curves, overlays, an icon,
tags that no edition assigns, the file meta information, the preamble, the padding after the data
set and after the pixels. The list of attributes is the data dictionary's, not that of any profile.

Dates lie within one year, so that dates shifted by more than a year are none of those planted.

References:
    DICOM PS3.6 (data dictionary), PS3.10 7.1 (preamble, file meta information), PS3.3 C.9, C.10.
"""

from __future__ import annotations

import csv
import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import Dataset, config, dcmwrite
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from shared_models.phantoms.seeds import make_generator, make_uid

SIZE = 64
FIRST_DAY = datetime.date(1987, 1, 1)
NUM_DAYS = 360
TEXTS = frozenset(["AE", "CS", "LO", "LT", "SH", "ST", "UC", "UT"])
BYTES = frozenset(["OB", "OD", "OF", "OL", "OV", "OW", "UN"])
#: Longest values that a value representation may have (PS3.5 6.2), where it is short.
LENGTHS = {"AE": 16, "CS": 16, "SH": 16}
#: Attributes without which this would be no CT image, or none that anyone would look at.
NEEDED = frozenset(
    [
        "SOPClassUID",
        "SpecificCharacterSet",
        "PhotometricInterpretation",
        "BurnedInAnnotation",
        "ConversionType",
        "PixelData",
        "Modality",
    ]
)
SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
#: What else stands in every tenth sequence.
MORE = ("PatientID", "CodeValue", "StudyDate", "ReferencedSOPInstanceUID", "TextValue")
SYLLABLES = [
    "bra",
    "dru",
    "fen",
    "gol",
    "hix",
    "jum",
    "kor",
    "lan",
    "mev",
    "nib",
    "pol",
    "qua",
    "ros",
    "tiv",
    "vak",
    "wex",
    "yor",
    "zun",
]
#: Even tags that the data dictionary does not assign, in groups of patients, studies and devices.
UNASSIGNED = tuple(
    (group, element)
    for group in (0x0008, 0x0010, 0x0018, 0x0020, 0x0032, 0x0040, 0x0088)
    for element in range(0xF001, 0xF005)
) + tuple((0x0010, element) for element in (0x0011, 0x0012, 0x0041, 0x0044, 0x0071))


class Planted(NamedTuple):
    """``value`` as text; ``where`` it stands, by keywords or tags from the outside inwards.

    ``kind`` is attribute, nested, private, graphics, unassigned, meta, preamble or padding.
    """

    kind: str
    where: str
    keyword: str
    vr: str
    value: str


class Corpus(NamedTuple):
    """``files`` as written; ``planted``: what each of them holds, by the file's name."""

    files: tuple[Path, ...]
    planted: dict[str, tuple[Planted, ...]]


def write_identifiers(folder: Path, *, seed: int) -> Corpus:
    """Write one file per transfer syntax and ``answers.csv``; the same seed writes the same bytes.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, planted = [], {}
    for number, syntax in enumerate(SYNTAXES, start=1):
        file = folder / f"{number}.dcm"
        dataset, answers = plant(syntax, seed=seed + number)
        with config.disable_value_validation():
            dcmwrite(file, dataset)
        files.append(file)
        planted[file.name] = answers
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", *Planted._fields))
        writer.writerows((name, *one) for name, answers in planted.items() for one in answers)
    return Corpus(tuple(files), planted)


def plant(syntax: UID, *, seed: int) -> tuple[Dataset, tuple[Planted, ...]]:
    """Return a CT image with everything planted, and what was."""
    with config.disable_value_validation():
        planter = _Planter(seed)
        dataset = _picture(syntax, seed)
        for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
            if tag >> 16 in (0x0000, 0x0002, 0x0004, 0x7FE0, 0xFFFC, 0xFFFE) or not keyword:
                continue
            if keyword in NEEDED or (keyword in dataset and vr not in ("UI",)):
                continue
            if vr == "SQ":
                dataset.add_new(tag, "SQ", planter.items(keyword, depth=max(0, tag // 2 % 30 - 27)))
            else:
                planter.add(dataset, "attribute", keyword, tag, vr)
        _plant_outside(dataset, planter)
    return dataset, tuple(planter.planted)


class _Planter:
    """Makes values that occur once, and notes where they went."""

    def __init__(self, seed: int) -> None:
        self.planted: list[Planted] = []
        self._rng = make_generator(seed, "identifiers")
        self._days = [int(day) for day in self._rng.permutation(NUM_DAYS)]
        self._made: set[str] = set()

    def add(self, dataset: Dataset, kind: str, where: str, tag: int, vr: str) -> None:
        """Plant one attribute, unless its value representation can carry nothing."""
        vr = "OW" if vr == "OB or OW" else vr
        value = self.value(vr)
        if value is None:
            return
        dataset.add_new(tag, vr, value.encode() if vr in BYTES else value)
        self.note(kind, where, vr, value)

    def text(self, kind: str, where: str, vr: str) -> str:
        """Return a value to be put where no attribute is."""
        value = self.value(vr) or ""
        self.note(kind, where, vr, value)
        return value

    def note(self, kind: str, where: str, vr: str, value: str) -> None:
        keyword = where.rpartition(">")[2]
        self.planted.append(Planted(kind, where, keyword, vr, value))

    def items(self, where: str, *, depth: int) -> Sequence:
        """Return a sequence of one item; at depth 1 and 2 with more in it, and a sequence."""
        item = Dataset()
        keywords = ("PatientName", "CodeMeaning") + (MORE if depth else ())
        for keyword in keywords:
            tag = Tag(keyword)
            self.add(item, "nested", f"{where}>{keyword}", tag, DicomDictionary[tag][0])
        if depth:
            self.add(item, "nested", f"{where}>(0009,1001)", 0x00091001, "LO")
            inner = "AnatomicRegionSequence" if depth == 1 else "ReferencedSeriesSequence"
            item.add_new(Tag(inner), "SQ", self.items(f"{where}>{inner}", depth=depth - 1))
        return Sequence([item])

    def value(self, vr: str) -> str | None:
        """Return a value that was not made before, None for what can carry no text."""
        if vr == "DA":
            return self._day() if self._days else None
        if vr == "DT":
            return f"19870101{self.value('TM')}"
        for _ in range(1000):
            value = self._guess(vr)
            if value is None:
                return None
            if value not in self._made:
                self._made.add(value)
                return value
        raise ValueError(f"no more values of {vr}")

    def _day(self) -> str:
        return f"{FIRST_DAY + datetime.timedelta(days=self._days.pop()):%Y%m%d}"

    def _guess(self, vr: str) -> str | None:
        rng = self._rng
        number = int(rng.integers(10**6, 10**7))
        if vr == "PN":
            return f"{self._word(4)}^{self._word(3)}"
        if vr in TEXTS:
            text = f"{self._word(3)} {number}"
            text = text if vr in LENGTHS else f"seen by Dr {text} in ward {self._word(2)}"
            return (text.upper().replace(" ", "_") if vr == "CS" else text)[: LENGTHS.get(vr)]
        if vr in BYTES:
            return f"{self._word(4)}{number:012d}"[:24].ljust(24, "x")
        if vr == "TM":
            return f"{rng.integers(24):02d}{rng.integers(60):02d}31.{rng.integers(10**6):06d}"
        if vr == "UI":
            return f"1.2.826.0.1.3680043.2.{number}.{rng.integers(10**9)}"
        return f"http://{self._word(3)}-{number}.example/" if vr == "UR" else None

    def _word(self, syllables: int) -> str:
        chosen = self._rng.integers(len(SYLLABLES), size=syllables)
        return "".join(SYLLABLES[index] for index in chosen).capitalize()


def _picture(syntax: UID, seed: int) -> Dataset:
    """Return what makes it a CT image: noise around a disc, and where that lies."""
    rng = make_generator(seed, "pixels")
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    stored = (rng.normal(0, 30, (SIZE, SIZE)) + 900 * (x**2 + y**2 < 600)).astype("<i2")
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = CTImageStorage
    dataset.Modality = "CT"
    dataset.BurnedInAnnotation = "NO"
    dataset.ImagePositionPatient = [0, 0, 0]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [1, 1]
    dataset.SliceThickness = 1
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = dataset.Columns = SIZE
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.PixelData = stored.tobytes()
    return dataset


def _plant_outside(dataset: Dataset, planter: _Planter) -> None:
    """Plant where the data dictionary does not lead."""
    _plant_meta(dataset, planter)
    _plant_graphics(dataset, planter)
    _plant_private(dataset, planter)
    for number in UNASSIGNED:
        planter.add(dataset, "unassigned", str(Tag(number)), Tag(number), "LO")
    icon = dataset.IconImageSequence[0]
    planter.add(icon, "nested", "IconImageSequence>PixelData", Tag("PixelData"), "OB")
    dataset.PixelData += planter.text("padding", "PixelData", "OB").encode()
    planter.add(dataset, "padding", "DataSetTrailingPadding", Tag("DataSetTrailingPadding"), "OB")


def _plant_meta(dataset: Dataset, planter: _Planter) -> None:
    meta = dataset.file_meta
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.ImplementationClassUID = make_uid("consilia", "identifiers")
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    for keyword in (
        "ImplementationVersionName",
        "SourceApplicationEntityTitle",
        "SendingApplicationEntityTitle",
        "ReceivingApplicationEntityTitle",
        "PrivateInformationCreatorUID",
        "PrivateInformation",
    ):
        tag = Tag(keyword)
        planter.add(meta, "meta", keyword, tag, DicomDictionary[tag][0])
    dataset.preamble = planter.text("preamble", "preamble", "LO").encode().ljust(128, b"\0")[:128]


def _plant_graphics(dataset: Dataset, planter: _Planter) -> None:
    """Plant in the repeating groups: curves (5000 to 501E) and overlays (6000 to 601E)."""
    for group in range(0x5000, 0x5020, 2):
        for element, vr in ((0x0022, "LO"), (0x0040, "SH"), (0x2500, "LO"), (0x3000, "OW")):
            tag = Tag(group, element)
            planter.add(dataset, "graphics", str(tag), tag, vr)
    for group in range(0x6000, 0x6020, 2):
        for element, vr in ((0x0022, "LO"), (0x1500, "LO"), (0x3000, "OW"), (0x4000, "LT")):
            tag = Tag(group, element)
            planter.add(dataset, "graphics", str(tag), tag, vr)


def _plant_private(dataset: Dataset, planter: _Planter) -> None:
    for group in (0x0009, 0x0019, 0x0029, 0x0051, 0x7FE1):
        planter.add(dataset, "private", f"({group:04X},0010)", Tag(group, 0x0010), "LO")
        for offset, vr in enumerate(("LO", "PN", "UN", "OB", "DA", "UI", "LT")):
            tag = Tag(group, 0x1001 + offset)
            planter.add(dataset, "private", str(tag), tag, vr)
        item = Dataset()
        tag = Tag(group, 0x10F0)
        planter.add(item, "private", f"{tag}>PatientName", Tag("PatientName"), "PN")
        planter.add(item, "private", f"{tag}>({group:04X},1001)", Tag(group, 0x1001), "LO")
        dataset.add_new(tag, "SQ", [item])

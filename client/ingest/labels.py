"""Labels from the hospital's own tables, pseudonymised on the way in; and how images are removed.

A table is a CSV whose lines name a patient (PatientID), a study or a series (their Instance UIDs),
and say a label, a label map (a NIfTI or DICOM segmentation file, relative to the table), a split,
or several of these.

Guarantees:
    A table is taken whole or not at all.
    What is wrong with it is told by line number; no identifier and no label is in any message.
"""

from __future__ import annotations

import csv
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from client.config import IngestSettings
from client.ingest import catalogue, maps, shelves
from client.ingest.catalogue import Series, Volume
from client.ingest.keys import Key
from client.ingest.sources import read_file
from shared_models.errors import DataError
from shared_models.splits import SPLITS
from shared_models.volume import read_volume

WHOSE, WHAT = ("patient", "study", "series"), ("label", "map", "split")
MOST_OBJECTIONS = 20
LONGEST = 120


class Line(NamedTuple):
    """One line of a table: whose it is, by new names, and what it says; empty says nothing."""

    number: int
    patient: str
    study: str
    series: str
    label: str
    map: str
    split: str


class Taken(NamedTuple):
    """How much of a table was taken: series labelled, with maps, patients with a split."""

    labels: int
    maps: int
    splits: int
    skipped: int


def take(
    table: Path,
    settings: IngestSettings,
    connection: sqlite3.Connection,
    key: Key,
    *,
    skip_unknown: bool = False,
) -> Taken:
    """Take the labels of ``table``.

    Raises:
        DataError: with every objection at once; nothing is taken then.
    """
    lines = list(_lines(table, key))
    objections: list[str] = []
    labels: dict[str, str] = {}
    splits: dict[str, str] = {}
    found_maps: dict[str, str] = {}
    num_skipped = 0
    for line in lines:
        series = _series(connection, line)
        if not series and skip_unknown:
            num_skipped += 1
        objections += _objections(line, series, is_skipped=skip_unknown)
        for one in series:
            objections += _put(labels, one.uid, line.label, line.number, "label")
            objections += _put(found_maps, one.uid, line.map, line.number, "map")
            objections += _put(splits, one.patient or "", line.split, line.number, "split")
    _refuse(objections)
    with catalogue.changing(connection):
        for uid, label in labels.items():
            catalogue.set_label(connection, uid, label)
        for patient, split in splits.items():
            catalogue.set_split(connection, patient, split)
        _refuse(_take_maps(found_maps, table.parent, lines, settings, connection))
    return Taken(len(labels), len(found_maps), len(splits), num_skipped)


def forget(uid: str, settings: IngestSettings, connection: sqlite3.Connection, key: Key) -> int:
    """Remove a patient's or a series' images, and all that the catalogue knows of them.

    The line of the register stays, for it is the hospital's way back.
    """
    rows = connection.execute(
        "SELECT * FROM series WHERE patient = ? OR series_uid = ? OR study_uid = ?",
        (key.pseudonym(uid), key.uid(uid), key.uid(uid)),
    )
    found = [Series(*row) for row in rows]
    volumes = [catalogue.find_volume(connection, one.uid) for one in found]
    with catalogue.changing(connection):
        for one in found:
            for name in ("volumes", "flags", "provenance", "maps", "instances", "seen"):
                connection.execute(f"DELETE FROM {name} WHERE series = ?", (one.uid,))
            connection.execute("DELETE FROM expected WHERE series_uid = ?", (one.series_uid,))
            connection.execute("DELETE FROM segmentations WHERE series_uid = ?", (one.series_uid,))
            connection.execute("DELETE FROM series WHERE uid = ?", (one.uid,))
        connection.execute(
            "DELETE FROM patients WHERE pseudonym = ? AND pseudonym NOT IN "
            "(SELECT patient FROM series WHERE patient IS NOT NULL)",
            (key.pseudonym(uid),),
        )
    for one, volume in zip(found, volumes, strict=True):
        shelves.clear_pending(settings, one.uid)
        if volume is not None:
            shelves.remove(settings, volume.folder)
    shelves.sweep(settings, connection)
    return len(found)


def _lines(table: Path, key: Key) -> Iterator[Line]:
    """Yield the lines under new names.

    Raises:
        DataError: if it is no such table.
    """
    if not table.is_file():
        raise DataError("expected a table of labels (CSV); there is no such file")
    try:
        with table.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = reader.fieldnames or []
            if not set(columns) & set(WHOSE) or not set(columns) & set(WHAT):
                raise DataError(
                    f"expected a column of {', '.join(WHOSE)} and one of {', '.join(WHAT)}"
                )
            for record in reader:
                told = {name: (record.get(name) or "").strip() for name in (*WHOSE, *WHAT)}
                yield Line(
                    reader.line_num,
                    told["patient"] and key.pseudonym(told["patient"]),
                    told["study"] and key.uid(told["study"]),
                    told["series"] and key.uid(told["series"]),
                    *(told[name] for name in WHAT),
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table as CSV: {type(error).__name__}") from None


def _series(connection: sqlite3.Connection, line: Line) -> list[Series]:
    """Return the accepted series that a line is about: of all it names, those that fit it."""
    wanted = {"patient": line.patient, "study_uid": line.study, "series_uid": line.series}
    given = {name: value for name, value in wanted.items() if value}
    if not given:
        return []
    where = " AND ".join(f"{name} = ?" for name in given)
    rows = connection.execute(
        f"SELECT * FROM series WHERE state = 'accepted' AND {where}", tuple(given.values())
    )
    return [Series(*row) for row in rows]


def _objections(line: Line, series: list[Series], *, is_skipped: bool) -> Iterator[str]:
    where = f"line {line.number}"
    if not (line.patient or line.study or line.series):
        yield f"{where}: expected a patient, a study or a series"
    elif not series and not is_skipped:
        yield f"{where}: no image here is of that patient, study or series; take the images in "
        "first, correct the line, or leave such lines out with --skip-unknown"
    if not (line.label or line.map or line.split):
        yield f"{where}: expected a label, a map or a split"
    if line.split and line.split not in SPLITS:
        yield f"{where}: expected a split that is one of {', '.join(SPLITS)}"
    if len(line.label) > LONGEST or not line.label.isprintable():
        yield f"{where}: expected a label of at most {LONGEST} printable characters"
    if line.map and len(series) > 1:
        yield f"{where}: a label map is of one series, the line names several; name the series"


def _put(found: dict[str, str], whose: str, value: str, number: int, what: str) -> Iterator[str]:
    if value and found.setdefault(whose, value) != value:
        yield f"line {number}: a second, other {what} for the same images; keep one"


def _take_maps(
    found: dict[str, str],
    folder: Path,
    lines: Iterable[Line],
    settings: IngestSettings,
    connection: sqlite3.Connection,
) -> Iterator[str]:
    number_of = {line.map: line.number for line in lines}
    for uid, name in found.items():
        volume = catalogue.find_volume(connection, uid)
        assert volume is not None
        try:
            _take_map(folder / name, volume, settings, connection)
        except DataError as error:
            yield f"line {number_of[name]}: {error}"


def _take_map(
    file: Path, volume: Volume, settings: IngestSettings, connection: sqlite3.Connection
) -> None:
    if not file.is_file():
        raise DataError("there is no such label map beside the table")
    if file.name.lower().endswith((".nii", ".nii.gz")):
        map_, names = read_volume(file), dict[int, str]()
        maps.keep(settings, connection, volume, map_, kind="nifti", names=names)
        return
    read_file(file)
    map_, names = maps.read_segmentation(file)
    maps.keep(settings, connection, volume, map_, kind="segmentation", names=names)


def _refuse(objections: Iterable[str]) -> None:
    found = list(objections)
    if len(found) > MOST_OBJECTIONS:
        found = [*found[:MOST_OBJECTIONS], f"and {len(found) - MOST_OBJECTIONS} more of the kind"]
    if found:
        raise DataError(found)

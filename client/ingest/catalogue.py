"""The site's catalogue: what was taken in, from where, what became of it, and what it is called.

SQLite in one file beside the store. Patients stand here by pseudonym and everything else by UIDs
that the site's key made; no value of a header is kept, and of a file's place only a keyed mark.

Guarantees:
    A catalogue of an earlier version is brought up to date when it is opened, whole or not at all.
    A catalogue of a later version is refused.

Design: functions over a connection. Who changes several rows that belong together does it within
``changing``; a process killed in between leaves what was there before.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shared_models.errors import DocumentError

State = Literal["open", "accepted", "refused"]

#: One script per version; what was released is never changed, only followed by another.
MIGRATIONS = ("catalogue_1.sql",)


class Series(NamedTuple):
    """Files that are one volume, or may become one; ``uid`` is the volume's own."""

    uid: str
    series_uid: str
    study_uid: str
    patient: str | None
    modality: str
    profile: str
    state: State
    reason: str | None
    changed: float
    label: str | None


class Instance(NamedTuple):
    """One object. ``digest`` is that of the file kept of it, ``content`` of what it shows.

    ``marks`` tell which instances may be slices of one volume, by what their headers said before
    they were de-identified. ``fault`` is why it can be none; an object that is set aside is a
    localizer or the like.
    """

    uid: str
    series: str
    series_uid: str
    marks: str
    fault: str | None
    is_aside: int
    digest: str | None
    content: str | None
    profile: str


class Volume(NamedTuple):
    """A series that was accepted: where it is stored, and what it looks like (mm, (z, y, x))."""

    series: str
    folder: str
    digest: str
    num_files: int
    num_slices: int
    num_rows: int
    num_columns: int
    z_mm: float
    y_mm: float
    x_mm: float
    orientation: str
    low: float
    p1: float
    median: float
    p99: float
    high: float


class Map(NamedTuple):
    """A label map beside the ``volume`` (its digest); ``names`` of its values, where known."""

    series: str
    file: str
    volume: str
    digest: str
    kind: Literal["nifti", "segmentation"]
    names: dict[int, str]


class Listed(NamedTuple):
    """What a manifest may list: a volume, its patient, label and label map."""

    series: Series
    volume: Volume
    split: str | None
    map: Map | None


@contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    """Open the catalogue, which is made if there is none and brought up to date if it is older.

    Raises:
        DocumentError: if it cannot be used, or a later version made it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(file, timeout=60, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise DocumentError(f"cannot open the catalogue {file}: {type(error).__name__}") from error
    with closing(connection):
        try:
            file.chmod(0o600)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            _migrate(connection)
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error as error:
            raise DocumentError(
                f"the catalogue {file} is broken ({type(error).__name__}); restore it from a "
                "backup, or move its folder away and take the images in again"
            ) from error
        yield connection


@contextmanager
def changing(connection: sqlite3.Connection) -> Iterator[None]:
    """Change everything within, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _migrate(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise DocumentError(
            f"the catalogue is of version {version}, this program knows {len(MIGRATIONS)}; "
            "install the program that made it"
        )
    for number in range(version, len(MIGRATIONS)):
        with changing(connection):
            script = resources.files(__package__).joinpath(MIGRATIONS[number])
            for statement in script.read_text("utf-8").split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number + 1}")


# --- arrivals


def series_seen(
    connection: sqlite3.Connection, state: str, *, place: str, root: str, run: int
) -> tuple[bool, str | None]:
    """Return whether a file in this state was looked at before, and of which series it is."""
    found = connection.execute("SELECT series FROM seen WHERE state = ?", (state,)).fetchone()
    if found is None:
        return False, None
    connection.execute(
        "UPDATE seen SET run = ?, place = ?, root = ? WHERE state = ?", (run, place, root, state)
    )
    return True, found[0]


def note_seen(
    connection: sqlite3.Connection,
    state: str,
    *,
    series: str | None,
    place: str,
    root: str,
    run: int,
) -> None:
    """Note that a file in this state was looked at; ``series`` is None if it is no object."""
    connection.execute(
        "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?, ?)", (state, root, place, series, run)
    )


def forget_gone(connection: sqlite3.Connection, *, root: str, run: int) -> None:
    """Forget the files under ``root`` that this run did not find; what they held stays."""
    connection.execute("DELETE FROM seen WHERE root = ? AND run < ?", (root, run))


def is_beside_no_object(connection: sqlite3.Connection, series: str) -> bool:
    """Return whether a file that is no object lies where one of the series' files lies."""
    found = connection.execute(
        "SELECT 1 FROM seen AS ours JOIN seen AS other ON other.place = ours.place "
        "WHERE ours.series = ? AND other.series IS NULL LIMIT 1",
        (series,),
    )
    return found.fetchone() is not None


def num_alone(connection: sqlite3.Connection, *, run: int) -> int:
    """Return in how many places this run found files that are no objects, and nothing else."""
    return int(
        connection.execute(
            "SELECT COUNT(DISTINCT place) FROM seen WHERE run = ? AND series IS NULL AND place NOT "
            "IN (SELECT place FROM seen WHERE series IS NOT NULL)",
            (run,),
        ).fetchone()[0]
    )


def find_series(connection: sqlite3.Connection, uid: str) -> Series | None:
    """Return a series, None if there is none."""
    row = connection.execute("SELECT * FROM series WHERE uid = ?", (uid,)).fetchone()
    return None if row is None else Series(*row)


def series_of(connection: sqlite3.Connection, series_uid: str) -> list[Series]:
    """Return the volumes whose files say that they are of this series."""
    rows = connection.execute("SELECT * FROM series WHERE series_uid = ?", (series_uid,))
    return [Series(*row) for row in rows]


def put_series(connection: sqlite3.Connection, series: Series) -> None:
    """Write a series as it is; it keeps what else is known of it."""
    marks = ", ".join("?" * len(series))
    updates = ", ".join(f"{name} = excluded.{name}" for name in Series._fields[1:])
    connection.execute(
        f"INSERT INTO series VALUES ({marks}) ON CONFLICT (uid) DO UPDATE SET {updates}", series
    )


def add_patient(connection: sqlite3.Connection, pseudonym: str) -> None:
    """Add a patient, if there is none of that pseudonym."""
    connection.execute("INSERT OR IGNORE INTO patients (pseudonym) VALUES (?)", (pseudonym,))


def find_instance(connection: sqlite3.Connection, uid: str) -> Instance | None:
    """Return an instance, None if there is none."""
    row = connection.execute("SELECT * FROM instances WHERE uid = ?", (uid,)).fetchone()
    return None if row is None else Instance(*row)


def put_instance(connection: sqlite3.Connection, instance: Instance) -> None:
    """Write an instance in the place of the one that was there."""
    marks = ", ".join("?" * len(instance))
    connection.execute(f"INSERT OR REPLACE INTO instances VALUES ({marks})", instance)


def instances(connection: sqlite3.Connection, series: str) -> list[Instance]:
    """Return a series' instances, in an order that does not depend on how they came."""
    rows = connection.execute("SELECT * FROM instances WHERE series = ? ORDER BY uid", (series,))
    return [Instance(*row) for row in rows]


def drop_files(connection: sqlite3.Connection, series: str) -> None:
    """Note that no file of a series is kept any more."""
    connection.execute("UPDATE instances SET digest = NULL WHERE series = ?", (series,))


def num_instances(connection: sqlite3.Connection, series_uid: str) -> int:
    """Return how many objects of a series came, whatever became of them."""
    query = "SELECT COUNT(*) FROM instances WHERE series_uid = ?"
    return int(connection.execute(query, (series_uid,)).fetchone()[0])


def expect(connection: sqlite3.Connection, series_uid: str, num_instances: int) -> None:
    """Note how many objects a PACS says a series has."""
    connection.execute("INSERT OR REPLACE INTO expected VALUES (?, ?)", (series_uid, num_instances))


def num_missing(connection: sqlite3.Connection, series_uid: str) -> int:
    """Return how many objects of a series a PACS holds that did not come; 0 if none said so."""
    query = "SELECT num_instances FROM expected WHERE series_uid = ?"
    row = connection.execute(query, (series_uid,)).fetchone()
    return 0 if row is None else max(0, row[0] - num_instances(connection, series_uid))


def open_series(connection: sqlite3.Connection, *, before: float) -> list[str]:
    """Return the series to be judged of which nothing came after ``before``."""
    rows = connection.execute(
        "SELECT uid FROM series WHERE state = 'open' AND changed <= ? ORDER BY uid", (before,)
    )
    return [uid for (uid,) in rows]


def reopen(connection: sqlite3.Connection, *, reason: str) -> None:
    """Have the series that were refused for ``reason`` judged again."""
    connection.execute(
        "UPDATE series SET state = 'open' WHERE state = 'refused' AND reason = ?", (reason,)
    )


def reopen_at(connection: sqlite3.Connection, place: str) -> None:
    """Have the series judged again that have a file in ``place``."""
    connection.execute(
        "UPDATE series SET state = 'open' WHERE state = 'accepted' AND uid IN "
        "(SELECT series FROM seen WHERE place = ?)",
        (place,),
    )


# --- what became of them


def judge(
    connection: sqlite3.Connection, uid: str, *, state: State, reason: str | None = None
) -> None:
    """Write down what became of a series."""
    connection.execute(
        "UPDATE series SET state = ?, reason = ? WHERE uid = ?", (state, reason, uid)
    )


def find_volume(connection: sqlite3.Connection, series: str) -> Volume | None:
    """Return a series' volume, None if it has none."""
    row = connection.execute("SELECT * FROM volumes WHERE series = ?", (series,)).fetchone()
    return None if row is None else Volume(*row)


def put_volume(
    connection: sqlite3.Connection,
    volume: Volume,
    *,
    source: str,
    taken: str,
    profile: str,
    software: str,
    flags: Iterable[str],
) -> None:
    """Write down the volume a series is, where it came from, and what is worth a look about it."""
    marks = ", ".join("?" * len(volume))
    connection.execute(f"INSERT OR REPLACE INTO volumes VALUES ({marks})", volume)
    connection.execute(
        "INSERT OR IGNORE INTO provenance VALUES (?, ?, ?, ?, ?, ?, ?)",
        (volume.series, volume.digest, source, taken, profile, software, volume.num_files),
    )
    connection.execute("DELETE FROM flags WHERE series = ?", (volume.series,))
    for flag in flags:
        put_flag(connection, volume.series, flag)


def put_flag(connection: sqlite3.Connection, series: str, flag: str) -> None:
    """Flag a series."""
    connection.execute("INSERT OR IGNORE INTO flags VALUES (?, ?)", (series, flag))


def drop_volume(connection: sqlite3.Connection, series: str) -> None:
    """Take a series out of what may be trained on; where it came from stays written down."""
    for table in ("volumes", "flags"):
        connection.execute(f"DELETE FROM {table} WHERE series = ?", (series,))


def folders(connection: sqlite3.Connection) -> set[str]:
    """Return the folders that hold volumes."""
    return {folder for (folder,) in connection.execute("SELECT folder FROM volumes")}


# --- labels


def set_label(connection: sqlite3.Connection, series: str, label: str) -> None:
    """Say what a series shows."""
    connection.execute("UPDATE series SET label = ? WHERE uid = ?", (label, series))


def set_split(connection: sqlite3.Connection, patient: str, split: str) -> None:
    """Say what a patient's images are for."""
    connection.execute("UPDATE patients SET split = ? WHERE pseudonym = ?", (split, patient))


def put_map(connection: sqlite3.Connection, found: Map) -> None:
    """Write down a label map in the place of the one that was there."""
    row = (*found[:-1], json.dumps(found.names))
    connection.execute("INSERT OR REPLACE INTO maps VALUES (?, ?, ?, ?, ?, ?)", row)


def find_map(connection: sqlite3.Connection, series: str) -> Map | None:
    """Return a series' label map, None if it has none."""
    row = connection.execute("SELECT * FROM maps WHERE series = ?", (series,)).fetchone()
    return None if row is None else _map(row)


def map_files(connection: sqlite3.Connection) -> set[str]:
    """Return the files that hold label maps."""
    return {file for (file,) in connection.execute("SELECT file FROM maps")}


def num_maps(connection: sqlite3.Connection) -> int:
    """Return how many volumes have a label map."""
    query = "SELECT COUNT(*) FROM maps JOIN volumes ON volumes.digest = maps.volume"
    return int(connection.execute(query).fetchone()[0])


def put_segmentation(
    connection: sqlite3.Connection, uid: str, *, series_uid: str, digest: str
) -> None:
    """Write down a segmentation of a series, to be made a label map of."""
    connection.execute(
        "INSERT OR REPLACE INTO segmentations VALUES (?, ?, ?, NULL)", (uid, series_uid, digest)
    )


def segmentations(connection: sqlite3.Connection) -> list[tuple[str, str, str, str | None]]:
    """Return (uid, the series it is of, the digest of its file, why it is no label map)."""
    rows = connection.execute("SELECT * FROM segmentations ORDER BY uid")
    return [(uid, series, digest, reason) for uid, series, digest, reason in rows]


def judge_segmentation(connection: sqlite3.Connection, uid: str, reason: str | None) -> None:
    """Write down why a segmentation is no label map, or that it is one."""
    connection.execute("UPDATE segmentations SET reason = ? WHERE uid = ?", (reason, uid))


# --- looking


def listed(connection: sqlite3.Connection, *, modalities: Sequence[str] = ()) -> list[Listed]:
    """Return the volumes of ``modalities``, or all, with their labels, in a lasting order."""
    rows = connection.execute(
        "SELECT series.*, volumes.*, patients.split, maps.* FROM series "
        "JOIN volumes ON volumes.series = series.uid "
        "JOIN patients ON patients.pseudonym = series.patient "
        "LEFT JOIN maps ON maps.series = series.uid AND maps.volume = volumes.digest "
        "WHERE series.state = 'accepted' ORDER BY series.patient, volumes.folder"
    )
    first, second = len(Series._fields), len(Series._fields) + len(Volume._fields)
    found = [
        Listed(
            Series(*row[:first]),
            Volume(*row[first:second]),
            row[second],
            None if row[second + 1] is None else _map(row[second + 1 :]),
        )
        for row in rows
    ]
    return [one for one in found if not modalities or one.series.modality in modalities]


def num_patients(connection: sqlite3.Connection) -> int:
    """Return how many patients have a volume."""
    query = "SELECT COUNT(DISTINCT patient) FROM series JOIN volumes ON volumes.series = series.uid"
    return int(connection.execute(query).fetchone()[0])


def refusals(connection: sqlite3.Connection) -> Counter[str]:
    """Return how many series are refused, by reason."""
    rows = connection.execute(
        "SELECT reason, COUNT(*) FROM series WHERE state = 'refused' GROUP BY reason"
    )
    return Counter(dict(rows.fetchall()))


def flags(connection: sqlite3.Connection) -> Counter[str]:
    """Return how many series have each flag."""
    return Counter(
        dict(connection.execute("SELECT flag, COUNT(*) FROM flags GROUP BY flag").fetchall())
    )


# --- runs


def begin_run(connection: sqlite3.Connection, *, source: str, began: str) -> int:
    """Begin a run and return its number."""
    query = "INSERT INTO runs (source, began) VALUES (?, ?)"
    return int(connection.execute(query, (source, began)).lastrowid or 0)


def end_run(connection: sqlite3.Connection, number: int, *, ended: str, report: str) -> None:
    """Write down how a run ended: counts only."""
    connection.execute(
        "UPDATE runs SET ended = ?, report = ? WHERE number = ?", (ended, report, number)
    )


def _map(row: Sequence[Any]) -> Map:
    series, file, volume, digest, kind, told = row
    names = {int(value): name for value, name in json.loads(told).items()}
    return Map(series, file, volume, digest, kind, names)

"""A site's intake while it is open: where from, under which terms, and what was seen so far."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from pydicom import config

from client.config import IngestSettings
from client.ingest import catalogue, shelves
from client.ingest.deid import METHOD
from client.ingest.keys import Key, create_key, load_key
from client.ingest.sources import Arrival
from shared_models.contracts import Contract
from shared_models.errors import MachineError
from shared_models.files import locked

Kind = Literal["folder", "web", "dimse"]
#: Told what is being done, how much is done, and of how much (0: not known).
Progress = Callable[[str, int, int], None]


class Source(NamedTuple):
    """Where images come from; ``root`` is the folder, if it is one.

    ``uncounted`` are the series, by their new UID, of which the PACS does not say how many objects
    it holds: if it breaks off, they are left to the next run.
    """

    kind: Kind
    arrivals: Iterator[Arrival]
    root: Path | None = None
    num_files: int = 0
    uncounted: set[str] | None = None


class Report(Contract):
    """What a run took in: counts, and nothing else.

    ``known`` files were looked at before. Series are counted as they stand after the run, if the
    source holds them: of the accepted, ``new`` and ``changed`` by this run. ``withdrawn`` were
    accepted before. ``waiting`` came too recently to be judged, or not all of it could be had.
    """

    source: Kind
    files: int = 0
    known: int = 0
    accepted: int = 0
    new: int = 0
    changed: int = 0
    withdrawn: int = 0
    waiting: int = 0
    refused: dict[str, int] = Field(default_factory=dict)
    patients: int = 0
    label_maps: int = 0
    objections: tuple[str, ...] = ()


class Desk:
    """A site's intake while it is open: its settings, key and catalogue, and what it has seen."""

    def __init__(
        self, settings: IngestSettings, connection: sqlite3.Connection, key: Key, source: Source
    ) -> None:
        self.settings, self.connection, self.key = settings, connection, key
        self.source = source
        self.uncounted = set[str]() if source.uncounted is None else source.uncounted
        self.profile = profile_of(settings)
        self.root = "" if source.root is None else key.mark(str(source.root.absolute()))
        self.run = catalogue.begin_run(connection, source=source.kind, began=now())
        self.touched: set[str] = set()
        self.known_patients = registered(settings)
        self.unsynced: list[int] = []
        self.folders: set[Path] = set()
        self.done: list[Callable[[], None]] = []
        self.num_files = self.num_known = 0


@contextmanager
def opened(settings: IngestSettings) -> Iterator[tuple[sqlite3.Connection, Key]]:
    """Open the site's catalogue and its key, which is made if there is none, for one process.

    Raises:
        ConsiliaError: if they cannot be used, or another process takes images in.
    """
    try:
        shelves.make_folders(settings)
    except OSError as error:
        raise MachineError(
            f"cannot make {settings.folder} ({error.strerror}); correct ingest.folder in site.toml"
        ) from error
    refusal = "another process takes images in or changes labels; wait for it, or end it"
    with locked(settings.private / shelves.LOCK, refusal=refusal):
        file = settings.private / shelves.KEY
        key = load_key(file) if file.exists() else create_key(file)
        with catalogue.opened(settings.private / shelves.CATALOGUE) as connection:
            yield connection, key


@contextmanager
def quiet() -> Iterator[None]:
    """Let nothing that reads DICOM warn or log: it would quote what it complains about."""
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        for name in ("pydicom", "highdicom"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield


def profile_of(settings: IngestSettings) -> str:
    """Return under which terms images are de-identified; others mean that it is done again."""
    terms = settings.terms.model_dump_json().encode()
    return f"{METHOD} {hashlib.sha256(terms).hexdigest()[:16]}"


def now() -> str:
    """Return the time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def registered(settings: IngestSettings) -> set[str]:
    """Return the pseudonyms that the register knows."""
    with suppress(FileNotFoundError):
        lines = (settings.private / shelves.REGISTER).read_text("ascii").splitlines()
        return {line.partition(" ")[0] for line in lines}
    return set()

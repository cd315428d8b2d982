"""The sources that a site's settings name, made ready to be taken in, and the dry run.

Guarantees:
    A dry run writes nothing, and tells attributes and counts, never a value.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from os import urandom
from pathlib import Path

from client.config import SiteConfig
from client.ingest import catalogue, dimse, shelves, sources, web
from client.ingest.deid import Refused, plan_changes
from client.ingest.desk import Progress, Source, profile_of, quiet
from client.ingest.keys import KEY_BYTES, Key
from client.ingest.pacs import Series
from client.ingest.receive import inspected
from client.ingest.sources import Arrival
from shared_models import series as readers
from shared_models.contracts import Contract
from shared_models.errors import ConsiliaError, DataError, DocumentError
from shared_models.reasons import Reason
from shared_models.slices import Slice

#: Private attributes, and those that the data dictionary does not know.
NAMELESS = "private or unknown"


class Plan(Contract):
    """What a dry run found: files, series by verdict, and what would happen to which attribute."""

    files: int
    volumes: int
    refused: dict[str, int]
    changes: dict[str, int]


def from_folder(root: Path, *, quiet_s: float = 0.0) -> Source:
    """Return what lies in a folder.

    Raises:
        DocumentError: if there is no such folder.
    """
    if not root.is_dir():
        raise DocumentError(f"expected a folder at {root}; there is none")
    num_files = sum(1 for _ in sources.files_in(root))
    return Source("folder", sources.folder(root, quiet_s=quiet_s), root, num_files)


def from_web(site: SiteConfig, connection: sqlite3.Connection, key: Key) -> Source:
    """Return what the PACS holds that is not here whole, over DICOMweb.

    Raises:
        DocumentError: if site.toml names none.
    """
    pacs = site.pacs.web
    if pacs is None:
        raise DocumentError("site.toml has no [pacs.web]; write its address and user there")
    uncounted: set[str] = set()
    is_whole = asking(connection, key, uncounted, profile=profile_of(site.ingest))
    arrivals = web.pull(pacs, site.ingest.query, is_whole=is_whole)
    return Source("web", arrivals, uncounted=uncounted)


def web_as_it_is(site: SiteConfig) -> Source:
    """Return all that the PACS holds, over DICOMweb, whatever is here.

    Raises:
        DocumentError: if site.toml names none.
    """
    if site.pacs.web is None:
        raise DocumentError("site.toml has no [pacs.web]; write its address and user there")
    return Source("web", web.pull(site.pacs.web, site.ingest.query))


def from_dimse(
    site: SiteConfig, connection: sqlite3.Connection, key: Key, *, progress: Progress
) -> Source:
    """Return what the PACS holds that is not here whole, over DIMSE.

    Raises:
        DocumentError: if site.toml names none.
    """
    pacs = site.pacs.dimse
    if pacs is None:
        raise DocumentError("site.toml has no [pacs.dimse]; write its title, host and port there")
    uncounted: set[str] = set()
    is_whole = asking(connection, key, uncounted, profile=profile_of(site.ingest))
    inbox = shelves.inbox(site.ingest)

    def arrivals() -> Iterator[Arrival]:
        broken: ConsiliaError | None = None
        try:
            moved = dimse.pull(
                pacs,
                site.pacs.station,
                site.ingest.query,
                inbox,
                is_whole=is_whole,
                advance=lambda done, total: progress("receiving series", done, total),
            )
        except ConsiliaError as error:
            broken = error
        else:
            if moved.num_failed:
                broken = ConsiliaError(
                    f"the PACS could not send {moved.num_failed} images; they are asked for again"
                )
        yield from sources.inbox(inbox)
        if broken is not None:
            raise broken

    return Source("dimse", arrivals(), uncounted=uncounted)


def from_inbox(site: SiteConfig) -> Source:
    """Return what a PACS sent of itself."""
    return Source("dimse", sources.inbox(shelves.inbox(site.ingest)))


def asking(
    connection: sqlite3.Connection, key: Key, uncounted: set[str], *, profile: str
) -> Callable[[Series], bool]:
    """Return what tells whether a series is here whole, and notes how many objects it has.

    What was de-identified under another ``profile`` is asked for again.
    """

    def is_whole(series: Series) -> bool:
        uid = key.uid(series.series)
        if series.num_instances is None:
            uncounted.add(uid)
        else:
            catalogue.expect(connection, uid, series.num_instances)
        known = catalogue.series_of(connection, uid)
        is_judged = bool(known) and all(one.state != "open" for one in known)
        is_broken = any(one.reason == "incomplete" or one.profile != profile for one in known)
        is_there = not catalogue.num_missing(connection, uid) and uid not in uncounted
        return is_judged and not is_broken and is_there

    return is_whole


def dry_run(site: SiteConfig, source: Source, *, progress: Progress) -> Plan:
    """Return what taking ``source`` in would do; nothing is kept, not even a key.

    Series are judged by their headers alone: pixels that are damaged are not noticed.
    """
    key = Key(urandom(KEY_BYTES))
    changes: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    found: list[tuple[Path, list[Slice] | Reason]] = []
    faults: dict[Path, str] = {}
    with quiet():
        for number, arrival in enumerate(source.arrivals, start=1):
            name = arrival.file or Path(str(number))
            try:
                dataset = arrival.read()
                found.append((name, inspected(arrival.file, dataset)))
            except DataError:
                found.append((name, "not-dicom"))
                continue
            planned = plan_changes(dataset, site.ingest.terms, key)
            if isinstance(planned, Refused):
                faults[name] = planned.reason
            else:
                changes.update({f"{one.keyword or NAMELESS}: {one.action}" for one in planned})
            progress("reading", number, source.num_files)
        verdicts = [_verdict(series, faults) for series in readers.gather(found)]
    refused.update(reason for reason in verdicts if reason is not None)
    return Plan(
        files=len(found),
        volumes=verdicts.count(None),
        refused=dict(sorted(refused.items())),
        changes=dict(sorted(changes.items())),
    )


def _verdict(series: readers.Series, faults: dict[Path, str]) -> str | None:
    told = readers.verdict(series).reason
    return told or next((faults[file] for file in series.files if file in faults), None)

"""From a source to the store: de-identify, judge, keep, and write down what became of it.

Objects come one at a time, in any order. Each is looked at, de-identified, and waits on the disk
until its source is exhausted (or, when a source is watched, quiet); then its series is judged as a
whole, and kept as a volume or refused with a reason.

Guarantees:
    Nothing that came is written to the disk before it is de-identified, nor are its names; but what
    a PACS sends over DIMSE waits in the inbox as it came, which is emptied as it is taken in.
    The same images taken in twice change nothing.
    A series that has grown is replaced as a whole; one that grew into no volume is withdrawn.
    A process killed at any point leaves a store that the next run completes, as if undisturbed.
    A series that is refused stops no other.
    Memory does not grow with the source: one object, then one volume at a time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from client.config import IngestSettings
from client.ingest import catalogue, maps, shelves
from client.ingest.desk import Desk, Progress, Report, Source, now, opened, quiet
from client.ingest.keys import Key
from client.ingest.manifest import write_manifest
from client.ingest.receive import receive_all
from client.ingest.settle import reported, settle_all
from shared_models.errors import MachineError

__all__ = ["Progress", "Report", "Source", "opened", "quiet", "take_in"]


def take_in(
    settings: IngestSettings,
    connection: sqlite3.Connection,
    key: Key,
    source: Source,
    *,
    settle_s: float = 0.0,
    is_stopped: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Take in what ``source`` holds, and return what became of it.

    Args:
        settings: where to, and under which terms.
        connection: the catalogue.
        key: the site's own.
        source: where from.
        settle_s: a series of which something came within this time is left to a later run.
        is_stopped: asked between files; what came until then is kept.
        progress: told of what is done.

    Raises:
        MachineError: if the disk is full or cannot be written; the next run goes on from there.
    """
    with quiet():
        try:
            shelves.sweep(settings, connection)
            desk = Desk(settings, connection, key, source)
            objections = receive_all(desk, is_stopped, progress)
            if source.root is not None and not is_stopped():
                with catalogue.changing(connection):
                    catalogue.forget_gone(connection, root=desk.root, run=desk.run)
                    catalogue.reopen(connection, reason="not-dicom")
            catalogue.reopen(connection, reason="incomplete")
            outcomes = settle_all(desk, settle_s, is_stopped, progress)
            maps.make_all(settings, connection)
            write_manifest(settings, connection)
            report = reported(desk, outcomes, objections)
        except OSError as error:
            raise MachineError(
                f"the store cannot be written ({error.strerror}); see to {settings.folder}, then "
                "run the same command again: it goes on from there"
            ) from error
        catalogue.end_run(connection, desk.run, ended=now(), report=report.model_dump_json())
    return report

"""The list of what may be trained on, written for ``shared_models.cohort`` from the catalogue."""

from __future__ import annotations

import csv
import io
import sqlite3

from client.config import IngestSettings
from client.ingest import catalogue
from client.ingest.catalogue import Listed
from shared_models.files import replace

COLUMNS = ("image", "patient", "label", "split")


def write_manifest(settings: IngestSettings, connection: sqlite3.Connection) -> int:
    """Write the manifest, in one step and only if it changes; return how many images it lists.

    Raises:
        OSError: if it cannot be written.
    """
    rows = [
        (one.volume.folder, one.series.patient, label_of(one, settings.labels), one.split or "")
        for one in catalogue.listed(connection, modalities=settings.modalities)
    ]
    whole = [row for row in rows if row[2]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(whole)
    content = text.getvalue().encode()
    if not settings.manifest.exists() or settings.manifest.read_bytes() != content:
        replace(settings.manifest, content, mode=0o600)
    return len(whole)


def label_of(one: Listed, labels: str) -> str:
    """Return what the manifest says as label, empty if there is none."""
    if labels == "maps":
        return "" if one.map is None else one.map.file
    return one.series.label or ""

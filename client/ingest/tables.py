"""What the site holds, in figures: how much, of what kind, and under which labels."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from client.ingest import catalogue
from client.ingest.catalogue import Listed
from client.ingest.refusals import sentence


def summary(connection: sqlite3.Connection, *, modalities: Sequence[str] = ()) -> dict[str, Any]:
    """Return counts, spacings, intensities and labels, by modality; no patient is in them."""
    found = catalogue.listed(connection)
    kinds = sorted({one.series.modality for one in found})
    return {
        "series": len(found),
        "patients": len({one.series.patient for one in found}),
        "trained_on": sum(not modalities or one.series.modality in modalities for one in found),
        "modalities": {
            kind: _figures([one for one in found if one.series.modality == kind]) for kind in kinds
        },
        "labels": dict(sorted(Counter(one.series.label or "" for one in found).items())),
        "maps": sum(one.map is not None for one in found),
        "map_values": dict(
            sorted(Counter(str(v) for one in found if one.map for v in one.map.names).items())
        ),
        "splits": dict(sorted(_patients_by_split(found).items())),
        "flags": dict(sorted(catalogue.flags(connection).items())),
        "refused": dict(sorted(catalogue.refusals(connection).items())),
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """Print it as tables."""
    console.print(f"{found['series']} series of {found['patients']} patients")
    table = Table("", "series", "slices", "size", "spacing mm", "values 1-50-99 %", box=None)
    for kind, figures in found["modalities"].items():
        table.add_row(
            kind,
            str(figures["series"]),
            _range(figures["slices"]),
            " x ".join(_range(figures[name]) for name in ("rows", "columns")),
            " x ".join(_range(figures[name]) for name in ("z_mm", "y_mm", "x_mm")),
            " ".join(f"{figures[name]:.4g}" for name in ("p1", "median", "p99")),
        )
    console.print(table)
    for what in ("labels", "splits", "flags"):
        if found[what]:
            rows = Table(what, "", box=None)
            for name, number in found[what].items():
                rows.add_row(name or "none", str(number))
            console.print(rows)
    console.print(f"{found['maps']} series have a label map")
    if found["refused"]:
        rows = Table("refused", "", "", box=None)
        for reason, number in found["refused"].items():
            rows.add_row(reason, str(number), sentence(reason))
        console.print(rows)


def _figures(found: Sequence[Listed]) -> dict[str, Any]:
    def ends(name: str) -> list[float]:
        values = [getattr(one.volume, name) for one in found]
        return [min(values), median(values), max(values)]

    middles = {
        name: median(getattr(one.volume, name) for one in found) for name in ("p1", "median", "p99")
    }
    return {
        "series": len(found),
        "slices": ends("num_slices"),
        "rows": ends("num_rows"),
        "columns": ends("num_columns"),
        "z_mm": ends("z_mm"),
        "y_mm": ends("y_mm"),
        "x_mm": ends("x_mm"),
        "orientations": dict(Counter(one.volume.orientation for one in found)),
        **middles,
    }


def _patients_by_split(found: Sequence[Listed]) -> Counter[str]:
    return Counter(split or "" for _, split in {(one.series.patient, one.split) for one in found})


def _range(ends: Sequence[float]) -> str:
    low, _, high = ends
    return f"{low:.3g}" if low == high else f"{low:.3g}-{high:.3g}"

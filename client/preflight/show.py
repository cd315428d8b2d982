"""Findings for people: a table with marks, and of what is wrong its owner and its cure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.preflight.base import Finding, Progress, several

MARKS = {True: Text("✓", "green"), False: Text("✗", "bold red"), None: Text("–", "yellow")}


def table(areas: Mapping[str, Sequence[Finding]]) -> RenderableType:
    """Return every area's findings and the verdict."""
    shown: list[RenderableType] = []
    for area, findings in areas.items():
        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(width=1)
        rows.add_column(width=15)
        rows.add_column(ratio=1)
        for one in findings:
            rows.add_row(MARKS[one.ok], Text(one.what), _said(one))
        shown += [Text(area, "bold"), rows, Text()]
    return Group(*shown, verdict([one for findings in areas.values() for one in findings]))


def verdict(findings: Sequence[Finding]) -> Text:
    """Return the last line: how much is wrong, and who can put it right."""
    failed = [one for one in findings if one.ok is False]
    open_ = sum(one.ok is None for one in findings)
    rest = f"; {open_} not tried, or worth a look (–)" if open_ else ""
    if not failed:
        return Text(f"nothing is wrong in {several(len(findings), 'check')}{rest}", "bold green")
    owners = Counter(one.owner for one in failed)
    told = ", ".join(f"{owner} {count}" for owner, count in owners.most_common())
    return Text(
        f"{len(failed)} of {len(findings)} failed, to be put right by: {told}{rest}", "bold"
    )


def print_table(areas: Mapping[str, Sequence[Finding]]) -> None:
    """Write the table to standard output, as wide as it is."""
    Console(highlight=False).print(table(areas))


def as_json(areas: Mapping[str, Sequence[Finding]]) -> str:
    """Return the same for machines."""
    found = [
        {"area": area, **one._asdict(), "figures": dict(one.figures)}
        for area, findings in areas.items()
        for one in findings
    ]
    return json.dumps({"ok": all(one["ok"] is not False for one in found), "findings": found})


@contextmanager
def progress() -> Iterator[Progress]:
    """Show on standard error what is being done, if that is a terminal; yield what tells it."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    with console.status("") as status:
        yield lambda what, done, total: status.update(
            f"{what} {done} of {total}" if total else what
        )


def _said(one: Finding) -> Text:
    text = Text(one.said)
    if one.ok is not True and one.cure:
        text.append(f"\n{one.owner}: ", "bold" if one.ok is False else "")
        text.append(one.cure, "" if one.ok is False else "dim")
    return text

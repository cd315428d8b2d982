"""The site's privacy ledger on disk: reserve before the first noisy step, never take back.

An append-only file of JSON lines, one reservation a line, flushed to disk before training starts.
A reservation is a charge: a crash after it costs the patients' budget, never their privacy. A round
asked for again is charged again.

Design: a text file rather than a database, because an auditor can read it with any editor and an
append with fsync is all the atomicity a reservation needs. A lock file keeps two processes from
charging at once. A line cut short by a crash was never acted on and is refused loudly, not skipped.

Guarantees:
    Nothing is trained before its cost is on disk.
    A reservation that would exceed a budget is refused and not written.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from shared_models.contracts import Contract, Digest, PrivacyEvent
from shared_models.errors import LedgerError
from shared_models.files import append_line
from shared_models.privacy import epsilon

FILE = "ledger.jsonl"


class Entry(Contract):
    """One reservation: what one round of one study will do to this site's cohort."""

    study: Digest
    round_: Annotated[int, Field(ge=0)]
    event: PrivacyEvent
    when: datetime


class Budget(Contract):
    """The most epsilon one study and all studies together may cost a patient, at ``delta``."""

    per_study: float
    lifetime: float
    delta: float


def read(state_dir: Path) -> tuple[Entry, ...]:
    """Return all reservations, oldest first.

    Raises:
        LedgerError: if any line is broken; a ledger that cannot be read whole allows nothing.
    """
    file = state_dir / FILE
    if not file.exists():
        return ()
    content = file.read_bytes()
    if content and not content.endswith(b"\n"):
        raise LedgerError(f"the last line of {file} was cut short; have it checked by hand")
    try:
        return tuple(Entry.model_validate_json(line) for line in content.splitlines())
    except ValidationError as error:
        raise LedgerError(f"{file} holds a line that is no reservation") from error


def events(entries: tuple[Entry, ...], *, study: str | None = None) -> tuple[PrivacyEvent, ...]:
    """Return the events of one study, or of all."""
    return tuple(e.event for e in entries if study is None or e.study == study)


def reserve(
    state_dir: Path, *, study: str, round_: int, event: PrivacyEvent, budget: Budget
) -> tuple[PrivacyEvent, ...]:
    """Charge ``event`` and return all of the study's events, this one included.

    Raises:
        LedgerError: if a budget would be exceeded, naming the epsilon that would be reached.
    """
    with _locked(state_dir):
        entries = read(state_dir)
        for text, limit, past in (
            ("this study", budget.per_study, events(entries, study=study)),
            ("this cohort's lifetime", budget.lifetime, events(entries)),
        ):
            cost = epsilon((*past, event), delta=budget.delta)
            if cost > limit:
                raise LedgerError(
                    f"the round would bring {text} to epsilon {cost:g} per patient, over the "
                    f"{limit:g} allowed at delta {budget.delta:g}"
                )
        entry = Entry(study=study, round_=round_, event=event, when=datetime.now(UTC))
        append_line(state_dir / FILE, entry.model_dump_json())
        return (*events(entries, study=study), event)


def studies(entries: tuple[Entry, ...]) -> list[str]:
    """Return the digests of the studies charged, in the order of their first charge."""
    return list(dict.fromkeys(entry.study for entry in entries))


def spent(entries: tuple[Entry, ...], *, delta: float, study: str | None = None) -> float:
    """Return the epsilon of one study, or of all together, at ``delta``."""
    return epsilon(events(entries, study=study), delta=delta)


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / f"{FILE}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

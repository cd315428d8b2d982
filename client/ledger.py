"""The site's privacy ledger on disk: reserve before the first noisy step, never take back.

An append-only file of JSON lines, one reservation a line, flushed to disk before training starts.
A reservation is a charge: a crash after it costs the patients' budget, never their privacy. A round
asked for again is charged again.

Design: a text file rather than a database, because an auditor can read it with any editor and an
append with fsync is all the atomicity a reservation needs. A lock file keeps two processes from
charging at once. What a ledger says is read by ``shared_models.privacy``, for site and auditor
alike.

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
from typing import NamedTuple

from shared_models.contracts import PrivacyEvent, Reservation
from shared_models.errors import LedgerError
from shared_models.files import append_line
from shared_models.privacy import events_of, parse_ledger, spent

FILE = "ledger.jsonl"


class Budget(NamedTuple):
    """The most epsilon one study and all studies together may cost a patient, at ``delta``."""

    per_study: float
    lifetime: float
    delta: float


def read(state_dir: Path) -> tuple[Reservation, ...]:
    """Return all reservations, oldest first.

    Raises:
        LedgerError: if any line is broken; a ledger that cannot be read whole allows nothing.
    """
    file = state_dir / FILE
    return parse_ledger(file.read_bytes()) if file.exists() else ()


def reserve(
    state_dir: Path, *, study: str, round_: int, event: PrivacyEvent, budget: Budget
) -> tuple[PrivacyEvent, ...]:
    """Charge ``event`` and return all of the study's events, this one included.

    Raises:
        LedgerError: if a budget would be exceeded, naming the epsilon that would be reached.
    """
    with _locked(state_dir):
        new = Reservation(
            study=study,
            round_=round_,
            event=event,
            delta=budget.delta,
            when=datetime.now(UTC),
        )
        entries = (*read(state_dir), new)
        for text, limit, counted in (
            ("this study", budget.per_study, study),
            ("this cohort's lifetime", budget.lifetime, None),
        ):
            cost = spent(entries, study=counted)
            if cost.epsilon > limit:
                raise LedgerError(
                    f"the round would bring {text} to epsilon {cost.epsilon:g} per patient, over "
                    f"the {limit:g} allowed at delta {cost.delta:g}"
                )
        append_line(state_dir / FILE, new.model_dump_json())
        return events_of(entries, study=study)


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / f"{FILE}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

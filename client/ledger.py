"""The site's privacy ledger on disk: reserve before the first noisy step, never take back.

An append-only file of JSON lines, flushed to disk one by one. A *reservation* stands there before
training starts, a *commit* before the reply made under it may leave. A reservation is a charge,
committed or not: a crash after it costs the patients' budget, never their privacy. A round asked
for again is answered with the same bytes (``client.outbox``) or charged again, as its next attempt.

Design: a text file rather than a database, because an auditor can read it with any editor and an
append with fsync is all the atomicity a reservation needs. A lock file keeps two processes from
charging at once. What a ledger says is read by ``shared_models.privacy``, for site and auditor
alike.

Design: a crash in the middle of a write leaves a last line without its end, and nothing followed
from it: what it would have allowed waits until the line is on disk. If it lacks only its end, it
gets one and counts. If it was cut short, its bytes go to ``ledger.torn`` for the auditor, and then
from the ledger; what starts with ``{`` and is cut short is never JSON, so no whole line can go that
way. Who only reads refuses such a ledger; the site puts it right by itself, when its agent starts
or next comes to charge, for it holds the lock and so knows that nobody is still writing.

Guarantees:
    Nothing is trained before its cost is on disk.
    A reservation that would exceed a budget is refused and not written.
    A process killed at any write never undercounts, and the site comes back by itself.
    A repair killed at any write is done by the next.
    Nothing is written with which the ledger could no longer be read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from shared_models.contracts import Commit, PrivacyEvent, Reservation
from shared_models.errors import LedgerError
from shared_models.files import append_line, in_turn, replace
from shared_models.privacy import Ledger, parse_ledger, spent

FILE = "ledger.jsonl"
TORN = "ledger.torn"

log = logging.getLogger(__name__)


class Budget(NamedTuple):
    """The most epsilon one study and all studies together may cost a patient, at ``delta``."""

    per_study: float
    lifetime: float
    delta: float


def read(state_dir: Path) -> Ledger:
    """Return what the ledger holds, oldest first.

    Raises:
        LedgerError: if any line is broken; a ledger that cannot be read whole allows nothing.
    """
    return parse_ledger(_content(state_dir / FILE))


def reserve(
    state_dir: Path, *, study: str, round_: int, event: PrivacyEvent, budget: Budget
) -> tuple[Reservation, ...]:
    """Charge ``event`` and return all of the study's reservations, this one last.

    Raises:
        LedgerError: if a budget would be exceeded, naming the epsilon that would be reached.
    """
    with _locked(state_dir):
        before = read(state_dir).reservations
        asked = (study, round_, event.purpose)
        new = Reservation(
            study=study,
            round_=round_,
            attempt=sum((e.study, e.round_, e.event.purpose) == asked for e in before),
            event=event,
            delta=budget.delta,
            when=datetime.now(UTC),
        )
        entries = (*before, new)
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
        _append(state_dir / FILE, new)
    return tuple(entry for entry in entries if entry.study == study)


def commit(state_dir: Path, charge: Reservation, *, reply: str) -> Commit:
    """Write down that from here on the reply of digest ``reply``, made under ``charge``, may leave.

    Raises:
        LedgerError: if the ledger does not hold ``charge``, or holds its commit.
    """
    with _locked(state_dir):
        new = Commit(
            study=charge.study,
            round_=charge.round_,
            purpose=charge.event.purpose,
            attempt=charge.attempt,
            reply=reply,
            when=datetime.now(UTC),
        )
        _append(state_dir / FILE, new)
    return new


def is_committed(state_dir: Path, reply: str) -> bool:
    """Tell whether the reply of that digest was charged and may leave.

    Raises:
        LedgerError: if the ledger cannot be read whole.
    """
    with _locked(state_dir):
        return any(entry.reply == reply for entry in read(state_dir).commits)


def repair(state_dir: Path) -> None:
    """Put a last line right that a crash left without its end; see above."""
    if (state_dir / FILE).exists():
        with _locked(state_dir):
            pass


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Keep every other process away from the ledger, and from a last line without its end."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with in_turn(state_dir / f"{FILE}.lock"):
        _repair(state_dir / FILE)
        yield


def _append(file: Path, entry: Reservation | Commit) -> None:
    line = entry.model_dump_json()
    parse_ledger(_content(file) + line.encode() + b"\n")
    append_line(file, line)


def _repair(file: Path) -> None:
    content = _content(file)
    end = content.rfind(b"\n") + 1
    whole, tail = content[:end], content[end:]
    if not tail:
        return
    if _is_json(tail):
        replace(file, content + b"\n")
        log.warning("the ledger's last line lacked its end after a crash; it counts")
        return
    torn = file.with_name(TORN)
    replace(torn, _content(torn) + tail + b"\n")
    replace(file, whole)
    log.warning("the ledger's last line was cut short by a crash; its bytes are in %s", TORN)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""

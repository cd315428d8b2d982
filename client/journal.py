"""The site's journal on disk: everything asked, decided and sent, in signed lines, each once.

An append-only file of lines, each signed with the site's key and bound to the line before it
(``shared_models.journal``). Nothing leaves before it stands there. The first line states the key;
a ledger that is older than the journal is taken into it then.

Design: what a crash leaves is put right as in ``client.ledger``: a last line that lacks only its
end gets one and counts; one that was cut short goes to ``journal.torn``, and an entry ``repaired``
takes its place in the same step. A crash between the ledger and the journal leaves the ledger's
newest line without its entry, which ``catch_up`` adds. Any other difference between the two is not
of a crash, and the site refuses until a person has looked.

Guarantees:
    No half entry ever counts.
    What is written costs the same however long the journal is.
    Nothing is written after a line that is not this site's own.
    Two processes that write at once keep the chain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import ledger
from shared_models.contracts import (
    Checkpoint,
    Commit,
    JournalEntry,
    JournalKind,
    JournalLine,
    OrderKind,
    Refusal,
    RefusalCode,
    Reservation,
    RoundOrder,
    SignedCheckpoint,
    SiteReply,
)
from shared_models.errors import DocumentError
from shared_models.files import append_line, in_turn, read_tail, replace
from shared_models.journal import FILE, NOTHING, ledger_faults, parse, parse_line
from shared_models.privacy import Ledger
from shared_models.signing import canonical, digest, is_signed_by, public_key, sign
from shared_models.wire import Letter

TORN = "journal.torn"

log = logging.getLogger(__name__)


class Event(NamedTuple):
    """What is to be written down; the fields are those of ``JournalEntry``."""

    kind: JournalKind
    study: str | None = None
    round_: int | None = None
    order_kind: OrderKind | None = None
    attempt: int | None = None
    code: RefusalCode | None = None
    digest: str | None = None
    size_bytes: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    who: str | None = None
    key: str | None = None


class Book(NamedTuple):
    """A site's journal: where it lies, whose it is, and the key that signs it."""

    state_dir: Path
    site: str
    key: Ed25519PrivateKey

    @property
    def file(self) -> Path:
        """The journal's file."""
        return self.state_dir / FILE


def append(book: Book, event: Event, *, check: Callable[[], None] = lambda: None) -> JournalLine:
    """Write ``event`` down, durably, as the journal's next entry.

    ``check`` is called while nobody else can write; nothing is written if it raises.

    Raises:
        DocumentError: if the journal's last line cannot be read or is not this site's own.
        OSError: if it cannot be written.
    """
    with _locked(book):
        check()
        return _append(book, event)


def last(book: Book) -> JournalLine:
    """Return the journal's last line, the first one if there was none before.

    Raises:
        DocumentError: if it cannot be read or is not this site's own.
    """
    with _locked(book):
        return _last(book)


def catch_up(book: Book) -> None:
    """Add the ledger's newest line if a crash kept it out of the journal.

    Raises:
        DocumentError: if journal and ledger differ in anything else.
        LedgerError: if the ledger cannot be read whole.
    """
    ledger.repair(book.state_dir)
    with _locked(book):
        charges, lines = ledger.read(book.state_dir), parse(book.file.read_bytes())
        noted = {line.entry.digest for line in lines}
        missing = [event for event in _events_of(charges) if event.digest not in noted]
        if len(missing) == 1 and missing[0].digest in _newest(charges):
            lines = (*lines, _append(book, missing[0]))
        differences = list(ledger_faults(lines, charges))
        if differences:
            raise DocumentError(["the journal and the ledger disagree", *differences])


def note_config(book: Book, config_file: Path) -> None:
    """Write down the digest of ``config_file`` if it is not the last that was written down.

    Raises:
        DocumentError: if the journal cannot be read whole.
        OSError: if it cannot be written.
    """
    found = digest(config_file.read_bytes())
    with _locked(book):
        lines = parse(book.file.read_bytes())
        known = [line.entry.digest for line in lines if line.entry.kind == "config"]
        if known[-1:] != [found]:
            _append(book, Event("config", digest=found))


def checkpoint(book: Book) -> SignedCheckpoint:
    """Return how far the journal has come, signed, and write down that it was told.

    Raises:
        DocumentError: if the journal's last line cannot be read or is not this site's own.
        OSError: if it cannot be written.
    """
    with _locked(book):
        last = _last(book)
        point = Checkpoint(
            site=book.site, index=last.entry.index, head=digest(last), when=datetime.now(UTC)
        )
        _append(book, Event("checkpoint", digest=digest(point)))
    return SignedCheckpoint(checkpoint=point, signature=sign(point, key=book.key))


def event_of_order(order: RoundOrder) -> Event:
    """Return what is written down of an order whose signature holds."""
    return Event(
        "order",
        study=order.study,
        round_=order.round_,
        order_kind=order.kind,
        attempt=order.attempt,
        digest=digest(order),
    )


def event_of_letter(letter: Letter) -> Event:
    """Return what is written down of a reply or a refusal before it leaves."""
    if letter.kind == "refusal":
        refusal = Refusal.model_validate_json(letter.document)
        return Event(
            "refusal",
            study=refusal.study,
            round_=refusal.round_,
            order_kind=refusal.kind,
            code=refusal.code,
        )
    reply = SiteReply.model_validate_json(letter.document)
    return Event(
        "reply",
        study=reply.study,
        round_=reply.round_,
        order_kind=reply.kind,
        attempt=reply.attempt,
        digest=digest(letter.document.encode()),
        size_bytes=letter.size_bytes,
    )


def event_of_charge(entry: Reservation | Commit, *, epsilon: float | None = None) -> Event:
    """Return what is written down of a line of the ledger."""
    is_commit = isinstance(entry, Commit)
    return Event(
        entry.kind,
        study=entry.study,
        round_=entry.round_,
        order_kind=entry.purpose if isinstance(entry, Commit) else entry.event.purpose,
        attempt=entry.attempt,
        digest=digest(entry),
        epsilon=None if is_commit else epsilon,
        delta=None if isinstance(entry, Commit) else entry.delta,
    )


def _events_of(charges: Ledger) -> Iterator[Event]:
    """Yield the entries that stand for the ledger's lines: charges first, then commits."""
    yield from map(event_of_charge, charges.reservations)
    yield from map(event_of_charge, charges.commits)


def _newest(charges: Ledger) -> set[str]:
    """Return the digests of the last charge and of the last commit."""
    return {digest(entry) for entry in (*charges.reservations[-1:], *charges.commits[-1:])}


@contextmanager
def _locked(book: Book) -> Iterator[None]:
    """Keep every other process away from the journal; open it, or put its last line right."""
    book.state_dir.mkdir(parents=True, exist_ok=True)
    with in_turn(book.state_dir / f"{FILE}.lock"):
        if book.file.exists():
            _repair(book)
        else:
            _open(book)
        yield


def _open(book: Book) -> None:
    """Begin the journal, with what an older ledger holds, in one step."""
    ledger.repair(book.state_dir)
    events = [Event("opened", key=public_key(book.key)), *_events_of(ledger.read(book.state_dir))]
    lines: list[JournalLine] = []
    for event in events:
        lines.append(_next(book, event, before=lines[-1] if lines else None))
    replace(book.file, b"".join(canonical(line) + b"\n" for line in lines))


def _append(book: Book, event: Event) -> JournalLine:
    line = _next(book, event, before=_last(book))
    append_line(book.file, canonical(line).decode())
    return line


def _next(book: Book, event: Event, *, before: JournalLine | None) -> JournalLine:
    entry = JournalEntry(
        site=book.site,
        index=0 if before is None else before.entry.index + 1,
        previous=NOTHING if before is None else digest(before),
        when=datetime.now(UTC),
        **event._asdict(),
    )
    return JournalLine(entry=entry, signature=sign(entry, key=book.key))


def _last(book: Book) -> JournalLine:
    line = _ours(book, read_tail(book.file).line)
    if line is None:
        raise DocumentError(
            f"the last line of {FILE} is not this site's own; nothing is written after it, and "
            "nothing leaves, before a person has looked: consilia-audit verify"
        )
    return line


def _ours(book: Book, raw: bytes) -> JournalLine | None:
    """Return a line that this site's key signed, or nothing."""
    try:
        line = parse_line(raw, index=0)
    except DocumentError:
        return None
    is_ours = is_signed_by(line.entry, line.signature, key=public_key(book.key))
    return line if is_ours and line.entry.site == book.site else None


def _repair(book: Book) -> None:
    torn = read_tail(book.file).torn
    if not torn:
        return
    content = book.file.read_bytes()
    if _ours(book, torn) is not None:
        replace(book.file, content + b"\n")
        log.warning("the journal's last line lacked its end after a crash; it counts")
        return
    last = _last(book)
    kept = book.state_dir / TORN
    replace(kept, (kept.read_bytes() if kept.exists() else b"") + torn + b"\n")
    line = _next(book, Event("repaired", digest=digest(torn), size_bytes=len(torn)), before=last)
    replace(book.file, content[: len(content) - len(torn)] + canonical(line) + b"\n")
    log.warning("the journal's last line was cut short by a crash; its bytes are in %s", TORN)

"""What a site's journal says, and the first place where it is broken; for site and auditor alike.

A journal is a file of signed lines, each naming the digest of the one before it. Its lines are the
canonical bytes of a ``JournalLine``, so that no byte of it can change unseen.

Guarantees:
    An edited, removed, doubled, reordered or torn entry is found, and the first one is named.
    An entry signed by another key is found.
    A journal shorter than a checkpoint, or other than it, is found.
    A charge or a commit that stands in the ledger or in the journal alone is found.

Design: who holds the site's key can write a whole new journal that is right in itself. Against that
there are only checkpoints that somebody else keeps, and a key that the auditor knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from shared_models.contracts import JournalEntry, JournalLine, SignedCheckpoint
from shared_models.errors import DocumentError
from shared_models.privacy import Ledger
from shared_models.signing import canonical, digest, is_signed_by

FILE = "journal.jsonl"
NOTHING = "0" * 64


class Chain(NamedTuple):
    """A journal's entries up to the first broken one, and what broke there, in words."""

    lines: tuple[JournalLine, ...]
    fault: str | None


def parse(content: bytes) -> tuple[JournalLine, ...]:
    """Read a journal's lines; whether they are true is for ``follow`` to say.

    Raises:
        DocumentError: naming the first entry that cannot be read, or was cut short.
    """
    *whole, torn = content.split(b"\n")
    lines = tuple(parse_line(line, index=index) for index, line in enumerate(whole))
    if torn:
        raise DocumentError(f"entry {len(whole)}: the last line is cut short")
    return lines


def parse_line(line: bytes, *, index: int) -> JournalLine:
    """Read one line, the ``index``-th.

    Raises:
        DocumentError: if it is no entry, or not in its canonical bytes.
    """
    try:
        found = JournalLine.model_validate_json(line)
    except ValidationError:
        raise DocumentError(f"entry {index}: it cannot be read") from None
    if canonical(found) != line:
        raise DocumentError(f"entry {index}: it is not in its canonical bytes")
    return found


def follow(content: bytes, *, key: str | None = None, site: str | None = None) -> Chain:
    """Return the entries that hold, in order, and what is broken in the next one.

    Without ``key`` the first entry's own word is taken for the public key that signs.
    """
    *whole, torn = content.split(b"\n")
    lines: list[JournalLine] = []
    for index, raw in enumerate(whole):
        try:
            line = parse_line(raw, index=index)
        except DocumentError as error:
            return Chain(tuple(lines), str(error))
        expected = key or (lines[0] if lines else line).entry.key or line.signature.key
        fault = _fault(line, lines[-1:], key=expected, site=site)
        if fault is not None:
            return Chain(tuple(lines), f"entry {index}: {fault}")
        lines.append(line)
    if torn:
        return Chain(tuple(lines), f"entry {len(lines)}: the last line is cut short")
    return Chain(tuple(lines), None if lines else "entry 0: the journal is empty")


def faults(
    content: bytes,
    *,
    key: str | None = None,
    site: str | None = None,
    checkpoints: Iterable[SignedCheckpoint] = (),
) -> list[str]:
    """Return what is broken: the first broken entry, then each checkpoint the journal belies."""
    chain = follow(content, key=key, site=site)
    found = [] if chain.fault is None else [chain.fault]
    return [*found, *checkpoint_faults(chain.lines, checkpoints, key=key)]


def checkpoint_faults(
    lines: Sequence[JournalLine], checkpoints: Iterable[SignedCheckpoint], *, key: str | None = None
) -> Iterator[str]:
    """Yield what keeps each checkpoint from being one of this journal."""
    for signed in checkpoints:
        point, at = signed.checkpoint, f"entry {signed.checkpoint.index}"
        expected = key or (lines[0].entry.key if lines else None) or signed.signature.key
        if not is_signed_by(point, signed.signature, key=expected):
            yield f"{at}: its checkpoint is not signed by this site's key"
        elif lines and point.site != lines[0].entry.site:
            yield f"{at}: its checkpoint is another site's"
        elif point.index >= len(lines):
            yield f"{at}: truncated; a checkpoint knows of it, and {len(lines)} entries hold"
        elif digest(lines[point.index]) != point.head:
            yield f"{at}: a fork; a checkpoint knows of another"


def ledger_faults(lines: Sequence[JournalLine], ledger: Ledger) -> Iterator[str]:
    """Yield every difference between what the journal and the ledger say was charged and sent."""
    charges = {"reservation": ledger.reservations, "commit": ledger.commits}
    for kind, entries in charges.items():
        noted = {line.entry.digest: line.entry.index for line in lines if line.entry.kind == kind}
        held = {digest(entry): number for number, entry in enumerate(entries)}
        for number in (held[value] for value in held.keys() - noted.keys()):
            yield f"the ledger's {kind} {number} is not in the journal"
        for index in sorted(noted[value] for value in noted.keys() - held.keys()):
            yield f"entry {index}: its {kind} is not in the ledger"
    private = {entry.study for entry in ledger.reservations}
    sent = {entry.reply for entry in ledger.commits}
    for entry in (line.entry for line in lines):
        is_private = entry.study in private and entry.order_kind != "evaluate"
        if entry.kind == "reply" and is_private and entry.digest not in sent:
            yield f"entry {entry.index}: a reply that the ledger did not commit"


def _fault(
    line: JournalLine, before: Sequence[JournalLine], *, key: str, site: str | None
) -> str | None:
    """Return why ``line`` cannot stand after the line ``before`` it, if there is one."""
    entry, last = line.entry, before[-1].entry if before else None
    index = 0 if last is None else last.index + 1
    objections = {
        "signed by another key than the journal's": line.signature.key != key,
        "edited: its signature does not hold": not is_signed_by(entry, line.signature, key=key),
        "written by another site": entry.site != (site or (last or entry).site),
        f"a fork: a second entry {entry.index}": last is not None and entry.index < index,
        f"removed or moved: entry {entry.index} stands here": entry.index != index,
        "it does not follow from the entry before it": entry.previous != _previous(before),
        "it states another key": _is_about_another_key(entry, key),
    }
    return next((text for text, holds in objections.items() if holds), None)


def _previous(before: Sequence[JournalLine]) -> str:
    return digest(before[-1]) if before else NOTHING


def _is_about_another_key(entry: JournalEntry, key: str) -> bool:
    return entry.kind == "opened" and entry.key != key

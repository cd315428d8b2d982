"""What a site's journal says, and the first place where it is broken; for site and auditor alike.

A journal is a file of signed lines, each naming the digest of the one before it. Its lines are the
canonical bytes of a ``JournalLine``, so that no byte of it can change unseen.

Guarantees:
    An edited, removed, doubled, reordered or torn entry is found, and the first one is named.
    An entry signed by another key is found.
    A journal shorter than a checkpoint, or other than it, is found.
    A charge or a commit that stands in the ledger or in the journal alone is found.
    A reply of a study that was refused or withdrawn, and not approved since, is found.
    A decision on file that was not journalled, or that a later one overrules, is found.
    A journal other than the one the coordinator gave a receipt for is found.

Design: who holds the site's key can write a whole new journal that is right in itself. Against that
there are only checkpoints that somebody else keeps, and a key that the auditor knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from shared_models.contracts import (
    Contract,
    Countersignature,
    JournalEntry,
    JournalLine,
    PublicKey,
    SignedCheckpoint,
    SignedReceipt,
)
from shared_models.errors import DocumentError
from shared_models.privacy import Ledger
from shared_models.signing import canonical, digest, is_signed_by

FILE, RECEIPTS = "journal.jsonl", "receipts.jsonl"
NOTHING = "0" * 64
DECISIONS = ("approved", "refused", "withdrawn")

_UNAPPROVED = {
    "refused": "a reply of a study that was refused, and not approved since",
    "withdrawn": "a reply of a study whose approval was withdrawn, and not given again since",
}


class Receipted(Contract):
    """One line of a site's ``receipts.jsonl``: a checkpoint, and that the coordinator has it."""

    checkpoint: SignedCheckpoint
    receipt: SignedReceipt


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
    decided: dict[str | None, str] = {}
    for index, raw in enumerate(whole):
        try:
            line = parse_line(raw, index=index)
        except DocumentError as error:
            return Chain(tuple(lines), str(error))
        expected = key or (lines[0] if lines else line).entry.key or line.signature.key
        fault = _fault(line, lines[-1:], key=expected, site=site)
        if fault is None and line.entry.kind == "reply" and line.entry.study in decided:
            fault = _UNAPPROVED.get(decided[line.entry.study])
        if fault is not None:
            return Chain(tuple(lines), f"entry {index}: {fault}")
        if line.entry.kind in DECISIONS:
            decided[line.entry.study] = line.entry.kind
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


def receipt_faults(
    lines: Sequence[JournalLine],
    receipts: Iterable[Receipted],
    *,
    coordinator: PublicKey,
    key: str | None = None,
) -> Iterator[str]:
    """Yield what keeps each receipt from being the coordinator's, of a point of this journal."""
    for line in receipts:
        point, receipt = line.checkpoint.checkpoint, line.receipt.receipt
        at = f"entry {point.index}"
        if not is_signed_by(receipt, line.receipt.signature, key=coordinator):
            yield f"{at}: its receipt is not signed by the coordinator"
        elif (receipt.site, receipt.checkpoint) != (point.site, digest(point)):
            yield f"{at}: its receipt is of another checkpoint"
        else:
            yield from checkpoint_faults(lines, [line.checkpoint], key=key)


def decision_faults(
    lines: Sequence[JournalLine],
    study: str,
    *,
    decisions: Iterable[Countersignature],
    standing: Countersignature | None,
) -> Iterator[str]:
    """Yield what is wrong with the decisions on file about a study, the ``standing`` one at last.

    A decision that is journalled and not on file is none: a crash may have come between.

    Raises:
        ValueError: if there are no lines.
    """
    if not lines:
        raise ValueError("expected a journal's lines, got none")
    noted = [e for e in (line.entry for line in lines) if e.kind in DECISIONS and e.study == study]
    known = {(entry.kind, entry.digest, entry.who) for entry in noted}
    name = f"study {study[:12]}"
    on_file = [*decisions, *([] if standing is None else [standing])]
    for found in dict.fromkeys(on_file):
        approval = found.approval
        is_ours = approval.study == study and approval.site == lines[0].entry.site
        if not is_signed_by(approval, found.signature, key=lines[0].signature.key) or not is_ours:
            yield f"{name}: a decision is not this site's own about it"
        elif (approval.decision, digest(approval), approval.who) not in known:
            yield f"{name}: a decision is not in the journal: {approval.decision}"
    is_approved = standing is not None and standing.approval.decision == "approved"
    if is_approved and noted and noted[-1].kind != "approved":
        yield f"{name}: the approval on file is not the journal's last word on it"


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

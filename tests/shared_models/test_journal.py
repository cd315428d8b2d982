"""Whatever is done to a journal is found, and the first entry that it was done to is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from shared_models import journal
from shared_models.audit import app
from shared_models.contracts import (
    Approval,
    Checkpoint,
    Commit,
    Countersignature,
    JournalEntry,
    JournalLine,
    PrivacyEvent,
    Receipt,
    Reservation,
    SignedCheckpoint,
    SignedReceipt,
)
from shared_models.errors import DocumentError
from shared_models.privacy import Ledger
from shared_models.signing import canonical, digest, public_key, sign

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
EVENT = PrivacyEvent(
    sample_rate=0.1, noise_multiplier=1.0, max_grad_norm=1.0, images_per_patient=4, steps=10
)
CHARGE = Reservation(study="5" * 64, round_=0, event=EVENT, delta=1e-5, when=NOON)
COMMIT = Commit(study="5" * 64, round_=0, purpose="train", attempt=0, reply="e" * 64, when=NOON)
LEDGER = Ledger((CHARGE,), (COMMIT,))
ASKED = {"study": "5" * 64, "round_": 0, "order_kind": "train", "attempt": 0}
ENTRIES = (
    {"kind": "opened", "key": public_key(KEY)},
    {"kind": "started"},
    {"kind": "order", "digest": "a" * 64, **ASKED},
    {"kind": "reservation", "digest": digest(CHARGE), "epsilon": 0.5, "delta": 1e-5, **ASKED},
    {"kind": "commit", "digest": digest(COMMIT), **ASKED},
    {"kind": "reply", "digest": "e" * 64, "size_bytes": 9, **ASKED},
)


def written(*entries: dict[str, object], key: Ed25519PrivateKey = KEY) -> list[bytes]:
    """Return a journal's lines, each with its end."""
    lines: list[bytes] = []
    previous = journal.NOTHING
    for index, fields in enumerate(entries or ENTRIES):
        entry = JournalEntry.model_validate(
            {"site": "north", "index": index, "previous": previous, "when": NOON, **fields}
        )
        line = JournalLine(entry=entry, signature=sign(entry, key=key))
        previous = digest(line)
        lines.append(canonical(line) + b"\n")
    return lines


def point(index: int, *, key: Ed25519PrivateKey = KEY, head: str | None = None) -> SignedCheckpoint:
    at = Checkpoint(
        site="north",
        index=index,
        head=head or digest(journal.parse(b"".join(written()))[index]),
        when=NOON,
    )
    return SignedCheckpoint(checkpoint=at, signature=sign(at, key=key))


def test_a_whole_journal_has_no_fault() -> None:
    content = b"".join(written())
    points = [point(index) for index in range(len(ENTRIES))]
    assert journal.faults(content, key=public_key(KEY), site="north", checkpoints=points) == []
    assert len(journal.parse(content)) == len(ENTRIES)


def swapped(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[3], lines[2], *lines[4:]]


FORKED = written(*ENTRIES[:3], {"kind": "stopped"})
TAMPERING: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "edited": (lambda x: [*x[:3], x[3].replace(b"0.5", b"0.1"), *x[4:]], "entry 3: edited"),
    "removed": (lambda x: x[:2] + x[3:], "entry 2: removed or moved"),
    "first removed": (lambda x: x[1:], "entry 0: removed or moved"),
    "reordered": (swapped, "entry 2: removed or moved"),
    "doubled": (lambda x: [*x[:3], x[2], *x[3:]], "entry 3: a fork: a second entry 2"),
    "forked": (lambda x: [*x[:3], FORKED[3], *x[4:]], "entry 4: it does not follow"),
    "torn": (lambda x: [*x[:-1], x[-1][:-9]], "entry 5: the last line is cut short"),
    "without its end": (lambda x: [*x[:-1], x[-1][:-1]], "entry 5: the last line is cut short"),
    "spaced out": (lambda x: [x[0], x[1].replace(b":", b": ", 1), *x[2:]], "entry 1: it is not in"),
    "no entry": (lambda x: [*x[:1], b"{}\n", *x[2:]], "entry 1: it cannot be read"),
    "empty": (lambda _: [], "entry 0: the journal is empty"),
    "a swapped key": (
        lambda x: x[:2] + written(key=OTHER)[2:],
        "entry 2: signed by another key",
    ),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_what_was_tampered_with_is_found_and_named(kind: str) -> None:
    tamper, expected = TAMPERING[kind]
    found = journal.faults(b"".join(tamper(written())))
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_a_journal_of_another_key_throughout_is_found_by_who_knows_the_key() -> None:
    opened = {"kind": "opened", "key": public_key(OTHER)}
    content = b"".join(written(opened, *ENTRIES[1:], key=OTHER))
    assert journal.faults(content) == []
    assert journal.faults(content, key=public_key(KEY))[0].startswith("entry 0: signed by another")


def test_the_key_stated_is_the_key_that_signs() -> None:
    content = b"".join(written(key=OTHER))
    assert journal.faults(content)[0].startswith("entry 0: signed by another key")


def test_a_shorter_journal_than_a_checkpoint_is_found() -> None:
    found = journal.faults(b"".join(written()[:3]), checkpoints=[point(2), point(4)])
    assert found == ["entry 4: truncated; a checkpoint knows of it, and 3 entries hold"]


def test_another_journal_than_the_checkpoints_is_found() -> None:
    found = journal.faults(b"".join(FORKED), checkpoints=[point(2), point(3)])
    assert found == ["entry 3: a fork; a checkpoint knows of another"]


def test_a_checkpoint_of_another_key_proves_nothing() -> None:
    found = journal.faults(b"".join(written()), checkpoints=[point(3, key=OTHER)])
    assert found == ["entry 3: its checkpoint is not signed by this site's key"]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_no_byte_of_a_journal_can_change_unseen(data: st.DataObject) -> None:
    content = bytearray(b"".join(written()))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    number = bytes(content[:at]).count(b"\n")
    found = journal.faults(bytes(content), key=public_key(KEY))
    assert found[0].startswith(f"entry {number}:")


# --- beside the ledger


def test_a_journal_and_its_ledger_agree() -> None:
    lines = journal.parse(b"".join(written()))
    assert list(journal.ledger_faults(lines, LEDGER)) == []


@pytest.mark.parametrize(
    ("num_lines", "ledger", "expected"),
    [
        (3, LEDGER, "the ledger's reservation 0 is not in the journal"),
        (4, LEDGER, "the ledger's commit 0 is not in the journal"),
        (6, Ledger(), "entry 3: its reservation is not in the ledger"),
        (6, Ledger((CHARGE,)), "entry 4: its commit is not in the ledger"),
    ],
)
def test_what_only_one_of_them_holds_is_found(
    num_lines: int, ledger: Ledger, expected: str
) -> None:
    lines = journal.parse(b"".join(written()[:num_lines]))
    assert next(journal.ledger_faults(lines, ledger)) == expected


def test_a_ledger_made_cheaper_is_found() -> None:
    cheaper = CHARGE.model_copy(update={"event": EVENT.model_copy(update={"steps": 1})})
    lines = journal.parse(b"".join(written()))
    found = list(journal.ledger_faults(lines, Ledger((cheaper,), (COMMIT,))))
    assert found == [
        "the ledger's reservation 0 is not in the journal",
        "entry 3: its reservation is not in the ledger",
    ]


# --- entries


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "started", "who": "Dr. Reed"},
        {"kind": "config"},
        {"kind": "opened", "key": "a" * 64, "index": 1},
        {"kind": "started", "index": 0},
        {"kind": "started", "when": "2026-03-01T12:00:00"},
        {"kind": "started", "patient": "x"},
    ],
)
def test_an_entry_has_the_fields_of_its_kind_and_no_others(fields: dict[str, object]) -> None:
    whole = {"site": "north", "index": 1, "previous": "b" * 64, "when": NOON} | fields
    with pytest.raises(ValidationError):
        JournalEntry.model_validate(whole)


# --- the auditor's command


@pytest.fixture
def site_dir(tmp_path: Path) -> Path:
    (tmp_path / "site.toml").write_text('name = "north"\nstate_dir = "state"\n')
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / journal.FILE).write_bytes(b"".join(written()))
    rows = [CHARGE.model_dump_json(), COMMIT.model_dump_json()]
    (tmp_path / "state" / "ledger.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "point.json").write_text(point(4).model_dump_json())
    return tmp_path


def test_the_auditor_verifies_a_site(site_dir: Path) -> None:
    options = ["--key", public_key(KEY), "--checkpoint", str(site_dir / "point.json")]
    found = CliRunner().invoke(app, ["verify", str(site_dir), *options])
    assert found.exit_code == 0
    assert [line.split()[0] for line in found.output.splitlines()] == ["holds"] * 3 + ["verified"]


def test_the_auditor_names_what_fails_at_a_site(site_dir: Path) -> None:
    (site_dir / "state" / journal.FILE).write_bytes(b"".join(written()[:3]))
    options = ["--checkpoint", str(site_dir / "point.json"), "--json"]
    found = CliRunner().invoke(app, ["verify", str(site_dir), *options])
    assert found.exit_code == 1
    assert json.loads(found.output)["failed"] == [
        "the ledger's reservation 0 is not in the journal",
        "the ledger's commit 0 is not in the journal",
        "entry 4: truncated; a checkpoint knows of it, and 3 entries hold",
    ]


def test_a_site_without_a_journal_cannot_be_verified(site_dir: Path) -> None:
    (site_dir / "state" / journal.FILE).unlink()
    found = CliRunner().invoke(app, ["verify", str(site_dir)])
    assert isinstance(found.exception, DocumentError)


# --- decisions and receipts

STUDY = "5" * 64
SENT = {"kind": "reply", "digest": "f" * 64, "size_bytes": 9, **ASKED}


def decided(decision: str, *, minute: int = 0, **changed: object) -> Countersignature:
    fields = {"study": STUDY, "site": "north", "decision": decision, "who": "Dr. Reed"}
    when = NOON.replace(minute=minute)
    approval = Approval.model_validate(fields | {"when": when} | changed)
    return Countersignature(approval=approval, signature=sign(approval, key=KEY))


def entry_of(found: Countersignature) -> dict[str, object]:
    approval = found.approval
    return {
        "kind": approval.decision,
        "study": approval.study,
        "who": approval.who,
        "digest": digest(approval),
    }


@pytest.mark.parametrize("decision", ["withdrawn", "refused"])
def test_a_reply_after_a_withdrawal_is_found_unless_approved_since(decision: str) -> None:
    no, yes = entry_of(decided(decision)), entry_of(decided("approved", minute=1))
    found = journal.faults(b"".join(written(*ENTRIES, no, SENT)))
    assert len(found) == 1
    assert found[0].startswith("entry 7: a reply of a study")
    assert journal.faults(b"".join(written(*ENTRIES, no, yes, SENT))) == []
    other = SENT | {"study": "6" * 64}
    assert journal.faults(b"".join(written(*ENTRIES, no, other))) == []


def lines_of(*entries: dict[str, object]) -> tuple[JournalLine, ...]:
    return journal.parse(b"".join(written(*ENTRIES, *entries)))


def test_decisions_on_file_are_those_of_the_journal() -> None:
    first, second = decided("approved"), decided("withdrawn", minute=1)
    lines = lines_of(entry_of(first), entry_of(second))
    for on_file, standing in (([first, second], second), ([first], None), ([], None)):
        faults = journal.decision_faults(lines, STUDY, decisions=on_file, standing=standing)
        assert list(faults) == []


def other_who() -> Countersignature:
    found = decided("approved")
    return found.model_copy(update={"approval": found.approval.model_copy(update={"who": "x"})})


DECISION_LIES: dict[str, tuple[Countersignature, str]] = {
    "not journalled": (decided("approved", minute=7), "is not in the journal: approved"),
    "edited": (other_who(), "is not this site's own"),
    "of another study": (decided("approved", study="6" * 64), "is not this site's own"),
    "of another site": (decided("approved", site="south"), "is not this site's own"),
    "withdrawn since": (decided("approved"), "is not the journal's last word"),
}


@pytest.mark.parametrize("lie", DECISION_LIES)
def test_a_decision_that_is_not_the_journals_is_found(lie: str) -> None:
    found, words = DECISION_LIES[lie]
    lines = lines_of(entry_of(decided("approved")), entry_of(decided("withdrawn", minute=1)))
    faults = list(journal.decision_faults(lines, STUDY, decisions=[], standing=found))
    assert any(words in fault for fault in faults)


def receipt(
    signed: SignedCheckpoint, *, key: Ed25519PrivateKey = OTHER, **changed: object
) -> journal.Receipted:
    at = signed.checkpoint
    fields = {"site": "north", "checkpoint": digest(at), "index": at.index, "when": NOON}
    found = Receipt.model_validate(fields | changed)
    return journal.Receipted(
        checkpoint=signed, receipt=SignedReceipt(receipt=found, signature=sign(found, key=key))
    )


def receipt_faults(*receipts: journal.Receipted, key: Ed25519PrivateKey = OTHER) -> list[str]:
    lines = journal.parse(b"".join(written()))
    return list(journal.receipt_faults(lines, receipts, coordinator=public_key(key)))


def test_a_receipt_of_a_point_of_the_journal_holds() -> None:
    assert receipt_faults(receipt(point(2)), receipt(point(4))) == []


def test_a_journal_rewritten_since_a_receipt_is_found() -> None:
    """Whoever holds the site's key can sign another journal, but not the coordinator's receipt."""
    assert receipt_faults(receipt(point(4, head="9" * 64))) == [
        "entry 4: a fork; a checkpoint knows of another"
    ]
    assert receipt_faults(receipt(point(9, head="9" * 64)))[0].startswith("entry 9: truncated")


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"key": KEY}, "not signed by the coordinator"), ({"checkpoint": "9" * 64}, "another")],
)
def test_a_receipt_that_is_not_the_coordinators_for_it_is_found(
    changed: dict[str, Any], words: str
) -> None:
    (found,) = receipt_faults(receipt(point(2), **changed))
    assert words in found


def test_the_auditor_checks_decisions_receipts_and_the_coordinators_checkpoints(
    site_dir: Path,
) -> None:
    approval = decided("approved")
    state = site_dir / "state"
    (state / journal.FILE).write_bytes(b"".join(written(*ENTRIES, entry_of(approval))))
    coordinator = f'coordinator = "{public_key(OTHER)}"\n'
    (site_dir / "site.toml").write_text((site_dir / "site.toml").read_text() + coordinator)
    folder = state / "studies" / STUDY
    folder.mkdir(parents=True)
    (folder / "approval.json").write_text(approval.model_dump_json())
    (folder / "decisions.jsonl").write_text(approval.model_dump_json() + "\n")
    lines = [receipt(point(2)), receipt(point(4))]
    (state / journal.RECEIPTS).write_text("".join(f"{one.model_dump_json()}\n" for one in lines))
    kept = site_dir / "north.jsonl"
    kept.write_text("".join(f"{point(at).model_dump_json()}\n" for at in (1, 3)))
    command = ["verify", str(site_dir), "--checkpoint", str(kept)]
    found = CliRunner().invoke(app, command)
    assert found.output.splitlines()[2:] == [
        "  holds  1 decisions about studies are this site's and journalled",
        "  holds  the journal holds all that 2 receipts know of",
        "  holds  the journal holds all that 2 checkpoints know of",
        "verified",
    ]
    forged = decided("approved", who="Dr. Nobody")
    (folder / "approval.json").write_text(forged.model_dump_json())
    (state / journal.RECEIPTS).write_text(receipt(point(2), key=KEY).model_dump_json() + "\n")
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 1
    assert f"  FAILS  study {STUDY[:12]}: a decision is not in the journal" in found.output
    assert "  FAILS  entry 2: its receipt is not signed by the coordinator" in found.output

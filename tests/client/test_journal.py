"""The journal on disk: nothing leaves before it stands there, and a crash leaves no half of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import answer as answers
from client import journal, ledger, studies
from client.answer import Site, Study, answer
from client.gate import Result
from client.journal import Book, Event
from shared_models import signing
from shared_models.contracts import RoundOrder
from shared_models.errors import DocumentError
from shared_models.journal import FILE, faults, ledger_faults, parse
from shared_models.plan import SignedPlan
from shared_models.weights import digest
from shared_models.wire import Letter, seal

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
WEIGHTS = np.ones(3, np.float32)
STARTED = Event("started")


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "state", "north", KEY)


def kinds(book: Book) -> list[str]:
    content = book.file.read_bytes()
    assert faults(content, key=signing.public_key(KEY), site="north") == []
    return [line.entry.kind for line in parse(content)]


def test_the_first_entry_states_the_key(book: Book) -> None:
    journal.append(book, STARTED)
    assert kinds(book) == ["opened", "started"]
    assert parse(book.file.read_bytes())[0].entry.key == signing.public_key(KEY)


@pytest.mark.parametrize("lacking", [1, 2, 300])
def test_a_line_cut_short_never_counts_and_its_bytes_are_kept(book: Book, lacking: int) -> None:
    journal.append(book, STARTED)
    content = book.file.read_bytes()
    torn = content.splitlines(keepends=True)[-1][:-lacking]
    book.file.write_bytes(content[:-lacking])
    journal.append(book, Event("stopped"))
    is_whole = lacking == 1
    assert kinds(book) == ["opened", "started" if is_whole else "repaired", "stopped"]
    kept = book.state_dir / journal.TORN
    assert not kept.exists() if is_whole else kept.read_bytes() == torn + b"\n"


def test_nothing_is_written_after_a_line_that_is_not_ours(book: Book) -> None:
    journal.append(book, STARTED)
    stranger = book._replace(key=Ed25519PrivateKey.generate())
    before = book.file.read_bytes()
    with pytest.raises(DocumentError, match="not this site's own"):
        journal.append(stranger, STARTED)
    assert book.file.read_bytes() == before


def test_a_changed_site_toml_is_written_down_once(book: Book, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    for text in ("a", "a", "b"):
        file.write_text(text)
        journal.note_config(book, file)
    assert kinds(book) == ["opened", "config", "config"]


def test_a_checkpoint_is_one_of_the_journal(book: Book) -> None:
    point = journal.checkpoint(book)
    journal.append(book, STARTED)
    assert faults(book.file.read_bytes(), checkpoints=[point]) == []
    assert kinds(book) == ["opened", "checkpoint", "started"]


WRITER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from client.journal import Book, Event, append
book = Book(Path(sys.argv[1]), "north", Ed25519PrivateKey.from_private_bytes(bytes(32)))
for _ in range(20):
    append(book, Event("started"))
"""


def test_two_processes_that_write_at_once_keep_the_chain(book: Book) -> None:
    command = [sys.executable, "-c", WRITER, str(book.state_dir)]
    writers = [subprocess.Popen(command) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert kinds(book) == ["opened"] + 40 * ["started"]


# --- from approval to reply


class House:
    """A site that approved a plan; training is a stub that charges."""

    def __init__(self, site: Site, plan: Any, coordinator: Ed25519PrivateKey) -> None:
        self.site, self.plan, self.coordinator = site, plan, coordinator

    def ask(self, round_: int = 0) -> Letter:
        now = datetime.now(UTC)
        order = RoundOrder(
            study=signing.digest(self.plan),
            round_=round_,
            kind="train",
            site="north",
            weights_digest=digest(WEIGHTS),
            issued_at=now,
            expires_at=now + timedelta(hours=1),
        )
        return answer(seal(order, key=self.coordinator, vector=WEIGHTS), self.site)


def obey(order: RoundOrder, weights: Any, study: Study, site: Site) -> Result:
    charge, privacy = answers._charge(order, study, site, rounds=1)
    return Result(12, 1.0, update={"w": np.ones(3, np.float32)}, privacy=privacy, charge=charge)


@pytest.fixture
def house(
    plan_of: Callable[..., Any],
    site_of: Callable[..., Any],
    coordinator_key: Ed25519PrivateKey,
    book: Book,
    monkeypatch: pytest.MonkeyPatch,
) -> House:
    plan = plan_of()
    config = site_of().model_copy(update={"state_dir": book.state_dir})
    signed = SignedPlan(plan, signing.sign(plan, key=coordinator_key))
    studies.approve(signed, config, key=KEY, who="Dr. Reed")
    site = Site(config, key=KEY)
    site.studies[signing.digest(plan)] = Study(plan, None, {}, (("w", (3,)),))
    monkeypatch.setattr(answers, "_obey", obey)
    return House(site, plan, coordinator_key)


ROUND = ["order", "reservation", "commit", "reply"]


def test_a_round_leaves_its_entries_and_no_others(house: House, book: Book) -> None:
    said = house.ask()
    assert said.kind == "reply"
    assert kinds(book) == ["opened", "approved", *ROUND]
    last = parse(book.file.read_bytes())[-1].entry
    assert last.digest == signing.digest(said.document.encode())
    assert last.size_bytes == said.size_bytes
    assert house.ask() == said
    assert kinds(book) == ["opened", "approved", *ROUND, "order", "reply"]


def test_a_refusal_is_written_down_with_its_code(house: House, book: Book) -> None:
    assert house.ask(round_=99).kind == "refusal"
    assert kinds(book) == ["opened", "approved", "order", "refusal"]
    assert parse(book.file.read_bytes())[-1].entry.code == "out-of-order"


@pytest.mark.parametrize("at", [0, 1, 2, 3], ids=ROUND)
def test_what_cannot_be_written_down_does_not_leave(
    at: int, house: House, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = journal.append, []

    def full(book: Book, event: Event, **checked: Any) -> Any:
        seen.append(event.kind)
        if seen == ROUND[: at + 1]:
            raise OSError("disk full")
        return real(book, event, **checked)

    monkeypatch.setattr(journal, "append", full)
    said = house.ask()
    assert said.kind == "refusal"
    assert '"code":"failed"' in said.document
    assert house.ask().kind == "reply"
    lines = parse(book.file.read_bytes())
    assert list(ledger_faults(lines, ledger.read(book.state_dir))) == []


def test_a_site_whose_journal_is_another_keys_answers_nothing(house: House, book: Book) -> None:
    text = book.file.read_text()
    book.file.write_text(text.replace('"who":"Dr. Reed"', '"who":"Dr. Rood"'))
    said = house.ask()
    assert '"code":"failed"' in said.document
    assert not (book.state_dir / ledger.FILE).exists()
    assert book.file.name == FILE


# --- an approval withdrawn while the agent runs


def withdraw(house: House) -> None:
    plan, config = house.plan, house.site.config
    signed = SignedPlan(plan, signing.sign(plan, key=house.coordinator))
    studies.withdraw(signed, config, key=KEY, who="Dr. Reed", reason="capacity")


def test_the_very_next_order_after_a_withdrawal_is_refused(house: House, book: Book) -> None:
    assert house.ask(0).kind == "reply"
    withdraw(house)
    for round_ in (0, 1):  # not even what was answered before is given again
        said = house.ask(round_)
        assert said.kind == "refusal"
        assert '"code":"not-approved"' in said.document
    assert kinds(book)[-3:] == ["refusal", "order", "refusal"]
    assert len(ledger.read(book.state_dir).reservations) == 1


def test_what_was_made_while_the_approval_was_withdrawn_does_not_leave(
    house: House, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    def obey_meanwhile(*arguments: Any) -> Result:
        found = obey(*arguments)
        withdraw(house)
        return found

    monkeypatch.setattr(answers, "_obey", obey_meanwhile)
    said = house.ask()
    assert said.kind == "refusal"
    assert '"code":"not-approved"' in said.document
    assert "reply" not in kinds(book)
    assert kinds(book)[-1] == "refusal"


def test_a_study_approved_again_goes_on(house: House, book: Book) -> None:
    assert house.ask(0).kind == "reply"
    withdraw(house)
    signed = SignedPlan(house.plan, signing.sign(house.plan, key=house.coordinator))
    studies.approve(signed, house.site.config, key=KEY, who="Dr. Reed")
    assert house.ask(1).kind == "reply"
    assert kinds(book)[-1] == "reply"

"""The status says what is, what is not known, and nothing of a patient."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from client import config as configs
from client import journal, ledger, page, running, show, status, studies, supervisor, visits
from client.config import SiteConfig
from client.confinement import Confinement
from client.status import Status
from shared_models.contracts import Receipt, SignedReceipt
from shared_models.errors import MachineError
from shared_models.journal import FILE, RECEIPTS, Receipted
from shared_models.plan import SignedPlan, StudyPlan, event_of
from shared_models.privacy import epsilon
from shared_models.signing import digest, sign

ROUNDS = 3


class House(NamedTuple):
    """A site with a study that ran, one that was withdrawn and one that waits."""

    config: SiteConfig
    key: Ed25519PrivateKey
    coordinator: Ed25519PrivateKey
    plans: dict[str, StudyPlan]

    def look(self, *, now: datetime | None = None, **known: Any) -> Status:
        return status.gather(self.config, key=self.key, now=now or datetime.now(UTC), **known)

    def signed(self, name: str) -> SignedPlan:
        return SignedPlan(self.plans[name], sign(self.plans[name], key=self.coordinator))

    @property
    def book(self) -> journal.Book:
        return journal.Book(self.config.state_dir, self.config.name, self.key)


def train(house: House, name: str, round_: int, *, size_bytes: int = 5000) -> None:
    """Write down what a round leaves in ledger and journal."""
    plan, state_dir = house.plans[name], house.config.state_dir
    study, reply = digest(plan), digest(f"{name} {round_}".encode())
    charged = ledger.reserve(
        state_dir,
        study=study,
        round_=round_,
        event=event_of(plan, steps=plan.training.steps_per_round),
        budget=ledger.Budget(per_study=99, lifetime=99, delta=0.01),
    )
    cost = epsilon([one.event for one in charged], delta=0.01)
    commit = ledger.commit(state_dir, charged[-1], reply=reply)
    for event in (
        journal.event_of_charge(charged[-1], epsilon=cost),
        journal.event_of_charge(commit),
        journal.Event(
            "reply",
            study=study,
            round_=round_,
            order_kind="train",
            attempt=0,
            digest=reply,
            size_bytes=size_bytes,
        ),
    ):
        journal.append(house.book, event)


@pytest.fixture
def house(
    hospital: Any,
    plan_of: Callable[..., StudyPlan],
    coordinator_key: Ed25519PrivateKey,
    mark: str,
) -> House:
    config = configs.read(hospital.config_file)
    words = {"description": f"of {mark}"}
    named = {
        name: plan_of(words | {"name": name, "seed": seed})
        for seed, name in enumerate(("opacity", "lesions", "bone-age"))
    }
    found = House(config, hospital.key, coordinator_key, named)
    journal.append(found.book, journal.Event("started"))
    word = studies.Word(state="running", num_rounds_done=2, when=datetime.now(UTC))
    for name in named:
        studies.keep_offer(found.signed(name), word, config, key=found.key)
    for name in ("opacity", "lesions"):
        studies.approve(found.signed(name), config, key=found.key, who="Dr. Reed")
    for round_ in range(ROUNDS):
        train(found, "opacity", round_)
    train(found, "lesions", 0)
    studies.withdraw(
        found.signed("lesions"), config, key=found.key, who="Dr. Reed", note=f"because of {mark}"
    )
    refusal = journal.Event(
        "refusal", study=digest(named["lesions"]), round_=1, order_kind="train", code="not-approved"
    )
    journal.append(found.book, refusal)
    return found


def told_by(house: House, confinement: Confinement) -> Status:
    worker: Any = SimpleNamespace(confinement=lambda: confinement)
    supervisor.tell(worker, house.config.state_dir)
    return house.look()


def test_it_tells_what_the_worker_gave_up_and_how_the_machine_would_let_it(house: House) -> None:
    found = house.look()
    assert found.worker is None
    assert "once the agent has started one" in shown(found)
    everything = Confinement(None, None, None, None, None)
    found = told_by(house, everything)
    assert found.worker is not None
    assert found.worker.given_up == ("network", "files", "privileges", "memory", "parent")
    assert found.worker.lacking == ()
    assert "gave up: network, files" in shown(found)
    assert not any("confined" in sentence for sentence in found.attention)
    found = told_by(house, everything._replace(files="ENOSYS", network="EPERM"))
    assert found.worker is not None
    assert [(one.step, one.why) for one in found.worker.lacking] == [
        ("network", "EPERM"),
        ("files", "ENOSYS"),
    ]
    words = " ".join(shown(found).split())
    assert "not allowed here: network (EPERM), files (ENOSYS)" in words
    cures = [sentence for sentence in found.attention if "is not confined in" in sentence]
    assert len(cures) == 2
    assert "user.max_user_namespaces" in cures[0]
    assert "Landlock" in cures[1]


def test_a_worker_that_does_not_tell_leaves_no_older_word_of_it(house: House) -> None:
    told_by(house, Confinement(None, None, None, None, None))

    def fail() -> Confinement:
        raise MachineError("the worker said nothing")

    silent: Any = SimpleNamespace(confinement=fail)
    supervisor.tell(silent, house.config.state_dir)
    assert house.look().worker is None


def study(found: Status, name: str) -> Any:
    return next(one for one in found.studies if one.name == name)


def shown(found: Status, *, width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(show.status_in_words(found))
    return console.export_text()


def test_the_status_tells_what_was_decided_spent_and_sent(house: House) -> None:
    found = house.look()
    opacity, lesions = study(found, "opacity"), study(found, "lesions")
    plan = house.plans["opacity"]
    cost = epsilon([event_of(plan, steps=2 * ROUNDS)], delta=0.01)
    assert (opacity.status, lesions.status) == ("approved", "withdrawn")
    assert study(found, "bone-age").status == "offered"
    assert opacity.cost.epsilon == opacity.charged[-1].epsilon == cost
    assert opacity.cost.limit == 4
    assert found.lifetime is not None
    assert found.lifetime.epsilon == epsilon([event_of(plan, steps=2 * ROUNDS + 2)], delta=0.01)
    assert (found.lifetime.unit, found.lifetime.delta, found.lifetime.limit) == ("patient", 0.01, 8)
    assert [one.size_bytes for one in opacity.sent] == ROUNDS * [5000]
    assert [one.round_ for one in found.left] == [0, 2, 1, 0]
    assert found.sent_bytes == 5000 * (ROUNDS + 1)
    (refused,) = found.refused
    assert (refused.code, refused.meaning) == (
        "not-approved",
        "this site has not approved this plan",
    )
    assert found.journal.fault is None
    assert found.journal.num_entries == len(
        (house.config.state_dir / FILE).read_text().splitlines()
    )


def test_a_new_site_has_nothing_and_looking_makes_nothing(hospital: Any) -> None:
    config = configs.read(hospital.config_file)
    found = status.gather(config, key=hospital.key, now=datetime.now(UTC))
    assert (found.studies, found.left, found.journal.num_entries) == ((), (), 0)
    assert found.lifetime is not None
    assert found.lifetime.epsilon == 0
    assert not config.state_dir.exists()
    assert "nothing has left" in shown(found)
    assert "No study was offered yet" in page.render(found)


def test_nothing_is_written_to_the_site_by_looking_at_it(house: House) -> None:
    def files() -> dict[Path, bytes]:
        return {f: f.read_bytes() for f in house.config.state_dir.rglob("*") if f.is_file()}

    before = files()
    found = house.look()
    shown(found)
    page.render(found)
    assert files() == before


# --- what somebody should see to


def test_an_agent_that_does_not_run_is_told(house: House) -> None:
    found = house.look()
    assert not found.is_running
    assert any("agent is not running" in one for one in found.attention)
    with running.running(house.config.state_dir):
        found = house.look()
        assert found.is_running
        assert not any("agent is not running" in one for one in found.attention)
    assert not house.look().is_running


def test_a_site_has_one_agent_at_a_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WAIT_S", 0.0)
    with running.running(house.config.state_dir):
        with (
            pytest.raises(MachineError, match="another agent"),
            running.running(house.config.state_dir),
        ):
            pass
        assert house.look().is_running
    with running.running(house.config.state_dir):
        pass


def test_a_broken_journal_is_told_first_with_its_entry(house: House) -> None:
    file = house.config.state_dir / FILE
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4] + lines[5:]))
    found = house.look()
    assert found.journal.fault is not None
    assert found.journal.fault.startswith("entry 4: removed or moved")
    assert found.attention[0].startswith("The journal is broken at entry 4")
    assert "BROKEN: entry 4" in shown(found)
    assert "broken" in page.render(found)


def test_a_reply_after_a_withdrawal_breaks_the_journal(house: House) -> None:
    train(house, "lesions", 1)
    assert "whose approval was withdrawn" in str(house.look().journal.fault)


def test_a_ledger_that_lost_a_charge_is_told(house: House) -> None:
    file = house.config.state_dir / ledger.FILE
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    assert "is not in the ledger" in str(house.look().journal.fault)


def test_a_ledger_that_cannot_be_read_is_told_and_no_budget_is_shown(house: House) -> None:
    with (house.config.state_dir / ledger.FILE).open("a") as handle:
        handle.write("{}\n")
    found = house.look()
    assert found.lifetime is None
    assert any("ledger cannot be read" in one for one in found.attention)
    assert "the ledger cannot be read" in shown(found)
    assert "The ledger cannot be read" in page.render(found)


def test_a_receipt_for_another_journal_is_told(house: House) -> None:
    point = journal.checkpoint(house.book)
    for head in (point.checkpoint.head, "9" * 64):
        at = point.checkpoint.model_copy(update={"head": head})
        receipt = Receipt(site="north", checkpoint=digest(at), index=at.index, when=at.when)
        signature = sign(receipt, key=house.coordinator)
        line = Receipted(
            checkpoint=point.model_copy(
                update={"checkpoint": at, "signature": sign(at, key=house.key)}
            ),
            receipt=SignedReceipt(receipt=receipt, signature=signature),
        )
        (house.config.state_dir / RECEIPTS).write_text(line.model_dump_json() + "\n")
        found = house.look().journal
        assert found.receipt_index == at.index
        assert (found.fault is None) == (head == point.checkpoint.head)


@pytest.mark.parametrize(
    ("days", "words"), [(-1, "has expired"), (3, "expires in 3 days"), (90, None), (None, None)]
)
def test_a_certificate_that_runs_out_is_told(
    days: int | None, words: str | None, house: House
) -> None:
    found = house.look(certificate_days=days)
    told = [one for one in found.attention if "certificate" in one]
    assert [words in one for one in told] == ([True] if words else [])


def test_a_coordinator_that_stopped_answering_is_told(house: House) -> None:
    last = visits.LastVisit(when=datetime.now(UTC))
    (house.config.state_dir / visits.LAST_VISIT).write_text(last.model_dump_json())
    with running.running(house.config.state_dir):
        assert not any("not answered since" in one for one in house.look().attention)
        late = house.look(now=datetime.now(UTC) + timedelta(hours=1))
    assert any("not answered since" in one for one in late.attention)


# --- nothing of a patient


@pytest.fixture
def marks(house: House, mark: str) -> Iterator[list[str]]:
    """Yield what stands in the manifest, the plans, the notes and the settings alone."""
    manifest = house.config.data.manifest.read_text()
    notes = (house.config.state_dir / "studies").glob("*/notes.jsonl")
    assert mark in manifest
    assert [mark in note.read_text() for note in notes] == [True]
    yield [mark, str(house.config.data.root), "manifest", house.config.link.address]


def test_no_patient_path_description_or_note_is_in_the_status_the_page_or_the_log(
    house: House, marks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        found = house.look()
        texts = {
            "json": found.model_dump_json(),
            "page": page.render(found),
            "terminal": shown(found),
            "wide terminal": shown(found, width=120),
        }
    texts["log"] = caplog.text
    for where, text in texts.items():
        for planted in marks:
            assert planted not in text, where
    assert "opacity" in texts["page"]


def test_the_status_as_json_is_read_back_as_it_was(house: House) -> None:
    found = house.look()
    assert Status.model_validate_json(found.model_dump_json()) == found
    assert json.loads(found.model_dump_json())["lifetime"]["accountant"].startswith("dp_accounting")


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_no_line_wider_than_it_is(width: int, house: House) -> None:
    text = shown(house.look(), width=width)
    assert max(map(len, text.splitlines())) <= width
    for words in (
        "opacity",
        "withdrawn",
        "to be decided",
        "per patient, delta 0.01",
        "not running",
    ):
        assert words in " ".join(text.split())


def test_a_name_that_would_colour_or_move_the_terminal_is_plain(house: House) -> None:
    who = "\x1b[31mDr. [bold]Reed\x1b[2J"
    studies.approve(house.signed("bone-age"), house.config, key=house.key, who=who)
    (known,) = [
        one
        for one in studies.known(house.config, key=house.key, today=datetime.now(UTC).date())
        if one.plan.name == "bone-age"
    ]
    console = Console(width=100, record=True, file=StringIO())
    console.print(show.plan_in_words(known, test_floor=5))
    text = console.export_text(styles=True)
    assert "\x1b[2J" not in text
    assert "Dr. [bold]Reed" in text

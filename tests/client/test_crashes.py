"""Kill the site at every write it makes, or let its disk be full from there on, and go on.

A child process answers orders; training is a stub that notes that noise was drawn. Every write,
flush, rename and truncation the child makes is counted, and the child ends itself at one of them as
``kill -9`` would: nothing is cleaned up. That is done for each of them in turn.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import answer as answers
from client import ledger, outbox, studies
from client.answer import Site, Study, answer
from client.config import SiteConfig
from client.gate import Result
from shared_models import journal, signing
from shared_models.contracts import RoundOrder
from shared_models.plan import SignedPlan, StudyPlan, event_of
from shared_models.privacy import spent, statement
from shared_models.weights import Array, digest
from shared_models.wire import Letter, seal

KILLED = 137
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
WEIGHTS = np.ones(3, np.float32)
MOST_CHARGES = 3  # two rounds, and one that a crash cost


class House(NamedTuple):
    """A site, and beside it a file of notes on what happened."""

    config: SiteConfig
    plan: StudyPlan
    coordinator: Ed25519PrivateKey

    def start(self) -> Site:
        """Start the site's agent, as after a crash: it remembers only what is on disk."""
        site = Site(self.config, key=KEY)
        site.studies[signing.digest(self.plan)] = Study(self.plan, (("w", (3,)),))
        ledger.repair(self.config.state_dir)
        return site

    def ask(self, round_: int, site: Site, *, weights: Array = WEIGHTS) -> Letter:
        """Ask for a round, as the coordinator does, and note the answer as having left."""
        note(self.config, f"asked {round_}")
        now = datetime.now(UTC)
        order = RoundOrder(
            study=signing.digest(self.plan),
            round_=round_,
            kind="train",
            site="north",
            weights_digest=digest(weights),
            issued_at=now,
            expires_at=now + timedelta(hours=1),
        )
        said = answer(seal(order, key=self.coordinator, vector=weights), site)
        if said.kind == "reply":
            note(self.config, f"sent {round_} {signing.digest(said.document.encode())}")
        return said

    def noted(self, kind: str) -> list[list[str]]:
        file = self.config.state_dir.with_name("notes")
        words = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [rest for first, *rest in words if first == kind]

    def ledger(self) -> Path:
        return self.config.state_dir / ledger.FILE

    def torn(self) -> bytes:
        file = self.config.state_dir / ledger.TORN
        return file.read_bytes() if file.exists() else b""


REAL_OPEN = os.open


def note(config: SiteConfig, text: str) -> None:
    """Write a line to the notes, not by what is counted below."""
    file = config.state_dir.with_name("notes")
    descriptor = REAL_OPEN(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


def obey(order: RoundOrder, weights: Any, study: Study, site: Site) -> Result:
    """Stand in for training: charge, note that noise was drawn, return an update of it."""
    charge, privacy = answers._charge(order, study, site)
    note(site.config, f"trained {order.round_}")
    update = {"w": np.frombuffer(os.urandom(3), np.uint8).astype(np.float32)}
    return Result(12, 1.0, update=update, privacy=privacy, charge=charge)


@pytest.fixture(params=["private", "not private"])
def new_house(
    request: pytest.FixtureRequest,
    plan_of,
    site_of,
    coordinator_key: Ed25519PrivateKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], House]:
    """Return what makes a new site each time, which can train ``MOST_CHARGES`` times."""
    is_private = request.param == "private"
    event = event_of(plan_of(), steps=2)
    for num_charges in range(1, MOST_CHARGES + 1):  # computed here, so that no child has to
        limit = statement([event] * num_charges, delta=0.01).epsilon
    plan = plan_of({"privacy.epsilon": limit} if is_private else {"privacy": None})
    signed = SignedPlan(plan, signing.sign(plan, key=coordinator_key))
    rules = {"policy.max_epsilon_per_study": 100.0, "policy.max_epsilon_lifetime": 100.0}
    rules["policy.allow_without_privacy"] = not is_private

    def make() -> House:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        config = site_of(rules).model_copy(update={"state_dir": folder / "state"})
        studies.approve(signed, config, key=KEY, who="Dr. Reed")
        return House(config, plan, coordinator_key)

    monkeypatch.setattr(answers, "_obey", obey)
    return make


# --- a process that ends at one of its writes


class Ending:
    """Counts what is done to the disk and ends the process at the ``at``-th, 1 for the first."""

    def __init__(self, at: int, *, in_the_middle: bool) -> None:
        self.left = at
        self.in_the_middle = in_the_middle

    def step(self, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        if self.in_the_middle and half is None:
            return do()
        self.left -= 1
        if self.left == 0:
            if self.in_the_middle and half is not None:
                half()
            os._exit(KILLED)
        return do()

    def install(self, put: Callable[[Any, str, Any], None] = setattr) -> None:
        """Count every change of the disk by this process from now on, which is not for long."""
        step = self.step

        class Raw(io.FileIO):
            def write(self, data: Any) -> Any:
                write, some = super().write, bytes(data)
                return step(lambda: write(some), lambda: write(some[: len(some) // 2]))

            def truncate(self, size: int | None = None) -> int:
                truncate = super().truncate
                return int(step(lambda: truncate(size)))

        real = io.open

        def opened(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if "b" not in mode or mode == "rb":
                return real(file, mode, *rest, **more)
            raw = step(lambda: Raw(file, mode.replace("b", "")))
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

        def counted(name: str) -> Callable[..., Any]:
            original = getattr(os, name)
            return lambda *rest, **more: step(lambda: original(*rest, **more))

        for name in ("open", "fsync", "replace", "mkdir", "unlink", "truncate", "ftruncate"):
            put(os, name, counted(name))
        put(io, "open", opened)


class Full(Ending):
    """A disk that has no space left from the ``at``-th change on.

    In the middle of it: half of each write finds its place. Otherwise nothing can be changed.
    """

    num_failed = 0

    def step(self, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        if self.in_the_middle and half is None:
            return do()
        self.left -= 1
        if self.left > 0:
            return do()
        self.num_failed += 1
        if self.in_the_middle and half is not None:
            half()
        raise OSError(errno.ENOSPC, "No space left on device")


def exit_code_of(act: Callable[[], Any], ending: Ending) -> int:
    """Run ``act`` in a child process that ends where ``ending`` says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which it needs
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        ending.install()
        act()
        os._exit(0)
    finally:
        os._exit(1)


def end_everywhere(
    new_house: Callable[[], House], prepare: Callable[[House], None], act: Callable[[House], Any]
) -> list[House]:
    """Return sites at which ``act`` was ended, one at each change it made to the disk."""
    houses, num_halved = [], 0
    for in_the_middle in (False, True):
        for at in range(1, 200):
            house = new_house()
            prepare(house)
            code = exit_code_of(lambda h=house: act(h), Ending(at, in_the_middle=in_the_middle))
            if code == 0:
                break
            assert code == KILLED
            houses.append(house)
            num_halved += in_the_middle
    assert len(houses) - num_halved > 5, "the changes are not counted any more"
    assert num_halved > 0
    return houses


# --- what must hold wherever it ended


def check_journal(house: House) -> None:
    """Check that the journal is whole, says what the ledger says, and has all that was sent."""
    content = (house.config.state_dir / journal.FILE).read_bytes()
    assert journal.faults(content, key=signing.public_key(KEY), site="north") == []
    lines = journal.parse(content)
    assert list(journal.ledger_faults(lines, ledger.read(house.config.state_dir))) == []
    noted = {line.entry.digest for line in lines if line.entry.kind == "reply"}
    assert {reply for _, reply in house.noted("sent")} <= noted


def check(house: House) -> None:
    """Check that no training and no reply goes without its charge."""
    found = ledger.read(house.config.state_dir)
    is_private = house.plan.privacy is not None
    for round_ in range(2):
        charges = sum(entry.round_ == round_ for entry in found.reservations)
        trained = house.noted("trained").count([str(round_)])
        assert charges >= trained if is_private else charges == 0
        sent = {reply for number, reply in house.noted("sent") if number == str(round_)}
        assert len(sent) <= trained
        if is_private:
            assert sent <= {entry.reply for entry in found.commits if entry.round_ == round_}
    if is_private:
        assert spent(found.reservations).epsilon <= house.plan.privacy.epsilon


def test_a_process_killed_at_any_write_never_undercounts_and_comes_back(
    new_house: Callable[[], House],
) -> None:
    def two_rounds(house: House) -> None:
        site = house.start()
        for round_ in range(2):
            house.ask(round_, site)

    for house in end_everywhere(new_house, lambda _: None, two_rounds):
        site = house.start()
        check(house)
        num_trained, sent = len(house.noted("trained")), dict(house.noted("sent"))
        last = max((number for (number,) in house.noted("asked")), default="0")
        letters = [house.ask(int(last), site) for _ in range(2)]
        assert letters[0].kind == "reply"
        assert letters[0] == letters[1]
        check(house)
        check_journal(house)
        if last in sent:  # it left before the end: the same bytes, and no more training
            assert signing.digest(letters[0].document.encode()) == sent[last]
            assert len(house.noted("trained")) == num_trained
        if house.plan.privacy is not None:
            spend_the_rest(house, site, int(last))
        left = {file.name for file in (house.config.state_dir / outbox.FOLDER).iterdir()}
        assert left == {f"{signing.digest(house.plan)}.train"}


@pytest.mark.parametrize("in_the_middle", [False, True], ids=["at once", "half written"])
def test_a_disk_that_is_full_lets_nothing_leave_and_loses_nothing_and_the_site_goes_on(
    in_the_middle: bool, new_house: Callable[[], House], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_refused = 0
    for at in range(1, 200):
        house = new_house()
        site, disk = house.start(), Full(at, in_the_middle=in_the_middle)
        with monkeypatch.context() as patch:
            disk.install(patch.setattr)
            said = [house.ask(round_, site) for round_ in range(2)]
        assert disk.num_failed == 0 or said[1].kind == "refusal"
        num_refused += sum(letter.kind == "refusal" for letter in said)
        letters = [house.ask(1, site) for _ in range(2)]  # there is space again: the same agent
        assert letters[0].kind == "reply"
        assert letters[0] == letters[1]
        check(house)
        check_journal(house)
        anew = house.start()
        assert house.ask(1, anew) == letters[0]
        if disk.num_failed == 0:
            break
    assert at > 5
    assert num_refused > 5


def spend_the_rest(house: House, site: Site, round_: int) -> None:
    """Check that crashes did not win a single charge more than the budget holds."""
    for number in range(2, 9):
        said = house.ask(round_, site, weights=WEIGHTS * number)
        if said.kind == "refusal":
            break
    assert '"code":"budget"' in said.document
    assert len(house.noted("trained")) <= MOST_CHARGES
    assert len(ledger.read(house.config.state_dir).reservations) == MOST_CHARGES
    check(house)


@pytest.mark.parametrize("new_house", ["private"], indirect=True)
@pytest.mark.parametrize("lacking", [1, 60], ids=["its end", "more than its end"])
def test_a_repair_killed_at_any_write_is_done_by_the_next(
    lacking: int, new_house: Callable[[], House]
) -> None:
    def cut(house: House) -> None:
        for round_ in range(2):
            house.ask(round_, house.start())
        lines = house.ledger().read_bytes().splitlines(keepends=True)[:3]  # but the last commit
        house.ledger().write_bytes(b"".join(lines)[:-lacking])
        house.ledger().with_name("tail").write_bytes(lines[-1][:-lacking])

    def repair(house: House) -> None:
        ledger.repair(house.config.state_dir)

    for house in end_everywhere(new_house, cut, repair):
        tail = house.ledger().with_name("tail").read_bytes()
        assert tail in house.ledger().read_bytes() + house.torn()
        repair(house)
        is_whole = lacking == 1
        assert len(ledger.read(house.config.state_dir).reservations) == (2 if is_whole else 1)
        assert house.torn().splitlines()[-1:] == ([] if is_whole else [tail])

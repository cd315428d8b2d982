"""The ledger: charged before it is used, never undercounted, never shared out twice."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import ledger
from client.ledger import Budget, commit, is_committed, read, repair, reserve
from shared_models.contracts import PrivacyEvent, Reservation
from shared_models.errors import LedgerError
from shared_models.privacy import Ledger, epsilon, events_of, spent

STUDY, OTHER = "5a" * 32, "c3" * 32
DELTA = 1e-3
EVENT = PrivacyEvent(
    sample_rate=0.2, noise_multiplier=2.0, max_grad_norm=1.0, images_per_patient=2, steps=2
)
PLENTY = Budget(per_study=1e6, lifetime=1e6, delta=DELTA)


def cost(num_events: int) -> float:
    return epsilon([EVENT] * num_events, delta=DELTA)


def charge(
    state_dir: Path, *, budget: Budget = PLENTY, study: str = STUDY, round_: int = 0
) -> tuple[Reservation, ...]:
    return reserve(state_dir, study=study, round_=round_, event=EVENT, budget=budget)


def spent_in(state_dir: Path) -> float:
    return spent(read(state_dir).reservations, delta=DELTA).epsilon


def test_a_site_that_trained_nothing_has_an_empty_ledger(tmp_path: Path) -> None:
    assert read(tmp_path / "never") == Ledger()


def test_what_is_reserved_is_read_again_oldest_first(tmp_path: Path) -> None:
    for round_ in (0, 1, 1):
        charge(tmp_path, round_=round_)
    charge(tmp_path, study=OTHER, round_=7)
    entries = read(tmp_path).reservations
    assert [entry.round_ for entry in entries] == [0, 1, 1, 7]
    assert [entry.study for entry in entries] == [STUDY, STUDY, STUDY, OTHER]
    assert {entry.event for entry in entries} == {EVENT}
    assert sorted(entry.when for entry in entries) == [entry.when for entry in entries]


def test_a_reservation_returns_all_of_its_study_and_of_no_other_itself_last(
    tmp_path: Path,
) -> None:
    charge(tmp_path, study=OTHER)
    assert events_of(charge(tmp_path)) == (EVENT,)
    assert charge(tmp_path, round_=1) == read(tmp_path).reservations[1:]


def test_a_round_asked_for_again_is_charged_again(tmp_path: Path) -> None:
    for _ in range(2):
        charge(tmp_path, round_=4)
    assert spent_in(tmp_path) == cost(2) > cost(1)


def test_the_charges_of_one_round_for_one_purpose_are_numbered(tmp_path: Path) -> None:
    alone = EVENT.model_copy(update={"purpose": "alone"})
    charge(tmp_path, round_=4)
    charge(tmp_path, round_=5)
    reserve(tmp_path, study=STUDY, round_=4, event=alone, budget=PLENTY)
    charge(tmp_path, round_=4, study=OTHER)
    assert [charge(tmp_path, round_=4)[-1].attempt for _ in range(2)] == [1, 2]
    assert [entry.attempt for entry in read(tmp_path).reservations] == [0, 0, 0, 0, 1, 2]


# --- commits


def test_a_commit_names_its_reservation_and_costs_nothing(tmp_path: Path) -> None:
    charge(tmp_path)
    new = charge(tmp_path)[-1]
    commit(tmp_path, new, reply="ee" * 32)
    (found,) = read(tmp_path).commits
    assert (found.study, found.round_, found.purpose) == (STUDY, 0, "train")
    assert (found.attempt, found.reply) == (1, "ee" * 32)
    assert is_committed(tmp_path, "ee" * 32)
    assert not is_committed(tmp_path, "ef" * 32)
    assert spent_in(tmp_path) == cost(2)


def test_nothing_is_written_with_which_the_ledger_could_no_longer_be_read(tmp_path: Path) -> None:
    new = charge(tmp_path)[-1]
    commit(tmp_path, new, reply="ee" * 32)
    before = (tmp_path / ledger.FILE).read_bytes()
    with pytest.raises(LedgerError, match="committed already"):
        commit(tmp_path, new, reply="ef" * 32)
    with pytest.raises(LedgerError, match="not reserved"):
        commit(tmp_path, new.model_copy(update={"round_": 1}), reply="ef" * 32)
    assert (tmp_path / ledger.FILE).read_bytes() == before


def test_a_commit_is_on_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = charge(tmp_path)[-1]

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        commit(tmp_path, new, reply="ee" * 32)


def test_a_reservation_is_on_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    fsync = os.fsync

    def spied(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path == (tmp_path / ledger.FILE).resolve():
            synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", spied)
    for num_lines in (1, 2):
        charge(tmp_path)
        assert synced[-1] == (tmp_path / ledger.FILE).read_bytes()
        assert len(synced[-1].splitlines()) == num_lines == len(synced)


def test_a_reservation_that_cannot_reach_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        charge(tmp_path)


# --- budgets


@pytest.mark.parametrize("limit", ["per_study", "lifetime"])
def test_a_reservation_that_would_exceed_a_budget_is_refused_and_not_written(
    tmp_path: Path, limit: str
) -> None:
    budget = PLENTY._replace(**{limit: cost(2)})  # two fit exactly
    charge(tmp_path, budget=budget)
    charge(tmp_path, budget=budget)
    before = (tmp_path / ledger.FILE).read_bytes()
    with pytest.raises(LedgerError, match=f"epsilon {cost(3):g} per patient, over the {cost(2):g}"):
        charge(tmp_path, budget=budget)
    assert (tmp_path / ledger.FILE).read_bytes() == before


def test_other_studies_count_for_the_lifetime_but_not_for_the_study(tmp_path: Path) -> None:
    charge(tmp_path, study=OTHER)
    charge(tmp_path, budget=PLENTY._replace(per_study=cost(1)))
    with pytest.raises(LedgerError, match="lifetime"):
        charge(tmp_path, study="00" * 32, budget=Budget(cost(1), cost(2), DELTA))


def test_a_refused_first_reservation_leaves_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="this study"):
        charge(tmp_path, budget=PLENTY._replace(per_study=cost(1) / 2))
    assert read(tmp_path) == Ledger()


# --- a last line without its end


@settings(max_examples=60)
@given(st.data())
def test_a_line_cut_short_is_refused_by_readers_and_put_right_by_the_site(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state_dir = tmp_path_factory.mktemp("state")
    file = state_dir / ledger.FILE
    charge(state_dir)
    first = file.read_bytes()
    commit(state_dir, charge(state_dir, round_=1)[-1], reply="ee" * 32)
    whole = file.read_bytes()
    cut = data.draw(st.integers(len(first), len(whole)))
    file.write_bytes(whole[:cut])
    lines, tail = whole[:cut].splitlines(keepends=True), b""
    if not whole[:cut].endswith(b"\n"):
        tail = lines.pop()
        with pytest.raises(LedgerError, match="last line was cut short"):
            read(state_dir)
    is_whole = tail + b"\n" in whole.splitlines(keepends=True)
    kept = [*lines, tail + b"\n"] if is_whole else lines
    repair(state_dir)
    assert file.read_bytes() == b"".join(kept)
    torn = state_dir / ledger.TORN
    assert (torn.read_bytes() if torn.exists() else b"") == (
        tail + b"\n" if tail and not is_whole else b""
    )
    assert len(charge(state_dir)) == len(b"".join(kept).split(b'"reservation"'))


def test_every_line_cut_short_is_kept_for_the_auditor(tmp_path: Path) -> None:
    charge(tmp_path)
    before = (tmp_path / ledger.FILE).read_bytes()
    for tail in (b'{"kind', b"\x00\x00", b'{"kind'):
        with (tmp_path / ledger.FILE).open("ab") as handle:
            handle.write(tail)
        repair(tmp_path)
    assert (tmp_path / ledger.TORN).read_bytes() == b'{"kind\n\x00\x00\n{"kind\n'
    assert (tmp_path / ledger.FILE).read_bytes() == before


def test_a_whole_line_that_lacks_its_end_counts_even_if_it_makes_no_sense(tmp_path: Path) -> None:
    charge(tmp_path)
    file = tmp_path / ledger.FILE
    file.write_bytes(file.read_bytes() + file.read_bytes().rstrip())  # the same attempt again
    with pytest.raises(LedgerError, match="line 2 of the ledger repeats"):
        charge(tmp_path)
    assert file.read_bytes().count(b"\n") == 2
    assert not (tmp_path / ledger.TORN).exists()


def test_repairing_nothing_writes_nothing(tmp_path: Path) -> None:
    repair(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    charge(tmp_path)
    before = (tmp_path / ledger.FILE).stat()
    repair(tmp_path)
    after = (tmp_path / ledger.FILE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "commit"]),
        st.integers(0, 5),  # which round, or which reservation
        st.none() | st.floats(0, 1),  # how much of the line was written before a crash
    ),
    max_size=12,
)


@settings(max_examples=80)
@given(STEPS)
def test_no_interleaving_of_reservations_commits_and_crashes_lowers_what_is_spent(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, float | None]]
) -> None:
    state_dir = tmp_path_factory.mktemp("state")
    file = state_dir / ledger.FILE
    charged: list[Reservation] = []  # those that returned: noise may have been drawn under them
    most = 0.0
    for number, (step, which, crash) in enumerate(steps):
        before = file.read_bytes() if file.exists() else b""
        if step == "reserve":
            new = charge(state_dir, round_=which % 3)[-1]
            charged += [new] if crash is None else []
        elif charged:
            with suppress(LedgerError):  # committed before
                commit(state_dir, charged[which % len(charged)], reply=f"{number:064x}")
        if crash is not None and file.exists():
            line = file.read_bytes()[len(before) :].rstrip()
            file.write_bytes(before + line[: round(crash * len(line))])
            repair(state_dir)
        assert set(charged) <= set(read(state_dir).reservations)
        assert spent_in(state_dir) >= max(most, cost(len(charged)))
        most = spent_in(state_dir)


# --- broken ledgers


@pytest.mark.parametrize(
    "line",
    ["", "{}", "rubbish", '{"study": 1}', "\xff"],
    ids=["empty", "{}", "text", "one", "byte"],
)
def test_a_ledger_with_a_broken_line_allows_nothing(tmp_path: Path, line: str) -> None:
    charge(tmp_path)
    with (tmp_path / ledger.FILE).open("ab") as handle:
        handle.write(line.encode("latin-1") + b"\n")
    before = (tmp_path / ledger.FILE).read_bytes()
    with pytest.raises(LedgerError, match="line 2 of the ledger is neither"):
        charge(tmp_path)
    assert (tmp_path / ledger.FILE).read_bytes() == before


def test_a_reservation_with_a_changed_sampler_is_no_reservation(tmp_path: Path) -> None:
    charge(tmp_path)
    file = tmp_path / ledger.FILE
    file.write_text(file.read_text().replace("poisson", "shuffle"))
    with pytest.raises(LedgerError, match="line 1 of the ledger is neither"):
        read(tmp_path)


# --- several processes, and killed ones

CHARGING = """
import sys
from pathlib import Path
from client.ledger import Budget, reserve
from shared_models.contracts import PrivacyEvent
from shared_models.errors import LedgerError

state_dir, event = Path(sys.argv[1]), PrivacyEvent.model_validate_json(sys.argv[2])
budget = Budget(float(sys.argv[3]), 1e9, 1e-3)
try:
    for round_ in range(int(sys.argv[4]), 1000000):
        reserve(state_dir, study="5a" * 32, round_=round_, event=event, budget=budget)
        sys.stdout.write(f"{round_}\\n")
        sys.stdout.flush()
except LedgerError:
    sys.exit(7)
"""


def charging(state_dir: Path, *, limit: float, first: int = 0) -> subprocess.Popen[str]:
    arguments = [str(state_dir), EVENT.model_dump_json(), str(limit), str(first)]
    return subprocess.Popen(
        [sys.executable, "-c", CHARGING, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_a_process_killed_at_any_moment_never_undercounts(tmp_path: Path) -> None:
    reported: list[int] = []
    for num_killed, num_read in enumerate((1, 2, 5, 11), start=1):
        first = 1000 * num_read
        with charging(tmp_path, limit=1e9, first=first) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(num_read)]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        assert process.returncode == -signal.SIGKILL
        reported += [int(line) for line in lines if line.endswith("\n")]
        repair(tmp_path)
        in_ledger = [entry.round_ for entry in read(tmp_path).reservations]
        assert set(reported) <= set(in_ledger)
        assert len(in_ledger) == len(set(in_ledger)) <= len(reported) + num_killed
    assert len(reported) >= 1 + 2 + 5 + 11
    assert charge(tmp_path) == read(tmp_path).reservations  # no lock outlived its process


def test_two_processes_at_once_do_not_exceed_a_budget(tmp_path: Path) -> None:
    most = 12
    processes = [charging(tmp_path, limit=cost(most)) for _ in range(2)]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [7, 7]
    assert sum(map(len, outputs)) == len(read(tmp_path).reservations) == most
    assert spent_in(tmp_path) <= cost(most)


def test_the_ledger_is_locked_until_the_reservation_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_locked: list[bool] = []
    fsync = os.fsync

    def spied(descriptor: int) -> None:
        fsync(descriptor)
        was_locked.append(is_locked())

    def is_locked() -> bool:
        with (tmp_path / f"{ledger.FILE}.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    monkeypatch.setattr(os, "fsync", spied)
    charge(tmp_path)
    assert was_locked
    assert all(was_locked)
    assert not is_locked()

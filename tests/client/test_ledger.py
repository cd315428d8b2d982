"""The ledger: charged before it is used, never undercounted, never shared out twice."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import ledger
from client.ledger import Budget, read, reserve
from shared_models.contracts import PrivacyEvent
from shared_models.errors import LedgerError
from shared_models.privacy import epsilon, spent

STUDY, OTHER = "5a" * 32, "c3" * 32
DELTA = 1e-3
EVENT = PrivacyEvent(
    sample_rate=0.2, noise_multiplier=2.0, max_grad_norm=1.0, images_per_patient=2, steps=2
)
PLENTY = Budget(per_study=1e6, lifetime=1e6, delta=DELTA)


def cost(num_events: int) -> float:
    return epsilon([EVENT] * num_events, delta=DELTA)


def charge(state_dir: Path, *, budget: Budget = PLENTY, study: str = STUDY, round_: int = 0):
    return reserve(state_dir, study=study, round_=round_, event=EVENT, budget=budget)


def test_a_site_that_trained_nothing_has_an_empty_ledger(tmp_path: Path) -> None:
    assert read(tmp_path / "never") == ()


def test_what_is_reserved_is_read_again_oldest_first(tmp_path: Path) -> None:
    for round_ in (0, 1, 1):
        charge(tmp_path, round_=round_)
    charge(tmp_path, study=OTHER, round_=7)
    entries = read(tmp_path)
    assert [entry.round_ for entry in entries] == [0, 1, 1, 7]
    assert [entry.study for entry in entries] == [STUDY, STUDY, STUDY, OTHER]
    assert {entry.event for entry in entries} == {EVENT}
    assert sorted(entry.when for entry in entries) == [entry.when for entry in entries]


def test_a_reservation_returns_every_event_of_its_study_and_of_no_other(tmp_path: Path) -> None:
    charge(tmp_path, study=OTHER)
    assert charge(tmp_path) == (EVENT,)
    assert charge(tmp_path) == (EVENT, EVENT)


def test_a_round_asked_for_again_is_charged_again(tmp_path: Path) -> None:
    for _ in range(2):
        charge(tmp_path, round_=4)
    assert spent(read(tmp_path), delta=DELTA).epsilon == cost(2) > cost(1)


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
    assert read(tmp_path) == ()


# --- broken ledgers


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_a_ledger_cut_anywhere_but_between_lines_allows_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state_dir = tmp_path_factory.mktemp("state")
    for round_ in range(2):
        charge(state_dir, round_=round_)
    whole = (state_dir / ledger.FILE).read_bytes()
    line_ends = {0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))}
    cut = data.draw(st.sampled_from([n for n in range(len(whole)) if n not in line_ends]))
    (state_dir / ledger.FILE).write_bytes(whole[:cut])
    with pytest.raises(LedgerError, match="last line was cut short"):
        read(state_dir)
    with pytest.raises(LedgerError, match="last line was cut short"):
        charge(state_dir)
    assert (state_dir / ledger.FILE).read_bytes() == whole[:cut]


@pytest.mark.parametrize(
    "line",
    ["", "{}", "rubbish", '{"study": 1}', "\xff"],
    ids=["empty", "{}", "text", "one", "byte"],
)
def test_a_ledger_with_a_broken_line_allows_nothing(tmp_path: Path, line: str) -> None:
    charge(tmp_path)
    with (tmp_path / ledger.FILE).open("ab") as handle:
        handle.write(line.encode("latin-1") + b"\n")
    with pytest.raises(LedgerError, match="a line that is no reservation"):
        charge(tmp_path)


def test_a_reservation_with_a_changed_sampler_is_no_reservation(tmp_path: Path) -> None:
    charge(tmp_path)
    file = tmp_path / ledger.FILE
    file.write_text(file.read_text().replace("poisson", "shuffle"))
    with pytest.raises(LedgerError, match="a line that is no reservation"):
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
        in_ledger = [entry.round_ for entry in read(tmp_path)]
        assert set(reported) <= set(in_ledger)
        assert len(in_ledger) == len(set(in_ledger)) <= len(reported) + num_killed
    assert len(reported) >= 1 + 2 + 5 + 11
    assert len(charge(tmp_path)) == len(read(tmp_path))  # no lock outlived its process


def test_two_processes_at_once_do_not_exceed_a_budget(tmp_path: Path) -> None:
    most = 12
    processes = [charging(tmp_path, limit=cost(most)) for _ in range(2)]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [7, 7]
    assert sum(map(len, outputs)) == len(read(tmp_path)) == most
    assert spent(read(tmp_path), delta=DELTA).epsilon <= cost(most)


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

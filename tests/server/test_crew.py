"""The processes of a demonstration end with the block they run in, whatever ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import crew as crews
from server.crew import Crew, crew, said, undisturbed
from shared_models.errors import RunError

SLEEP = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def _any_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let processes run small programs written for the test."""
    for name, program in {
        "sleeps": SLEEP,
        "fails": "import sys; print('no such image'); sys.exit(3)",
        "deaf": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP,
    }.items():
        (tmp_path / f"{name}.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield


def waited_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(hired: Crew) -> list[int]:
    return [process.pid for process, _ in hired.running.values()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError, None])
def test_no_process_is_left_however_the_block_is_left(
    error: type[BaseException] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "STOP_S", 0.3)
    left = []
    try:
        with crew() as hired:
            for name in ("sleeps", "sleeps-too"):
                hired.start(name, "sleeps", log_file=tmp_path / "log")
            hired.start("deaf", "deaf", log_file=tmp_path / "deaf.log")
            waited_for(tmp_path / "deaf.log")
            left = [*pids(hired), hired.command("sleeps").pid]
            if error is not None:
                raise error("over")
    except (KeyboardInterrupt, RunError) as caught:
        assert type(caught) is error
    assert len(left) == 4
    assert not any(is_running(pid) for pid in left)


def test_what_was_started_first_is_ended_last(tmp_path: Path) -> None:
    hired = Crew()
    for name in ("first", "second"):
        hired.start(name, "sleeps", log_file=tmp_path / f"{name}.log")
    ended = list[str]()
    for name, (process, _) in hired.running.items():
        real = process.wait

        def wait(timeout: float, name: str = name, real: object = real) -> int:
            ended.append(name)
            return real(timeout)  # type: ignore[operator, no-any-return]

        process.wait = wait  # type: ignore[method-assign, assignment]
    hired.dismiss()
    assert ended == ["second", "first"]


def test_what_has_ended_is_named_with_its_last_words(tmp_path: Path) -> None:
    with crew() as hired:
        hired.start("the agent of north", "fails", log_file=tmp_path / "log")
        with pytest.raises(RunError) as caught:
            hired.until(lambda: False, "nothing", patience_s=30)
    assert caught.value.objections == (
        f"the agent of north ended; see {tmp_path / 'log'}",
        "no such image",
    )


def test_a_command_that_fails_is_told_in_its_own_words() -> None:
    with crew() as hired, pytest.raises(RunError) as caught:
        said(hired.command("fails"), "north")
    assert caught.value.objections == ("north: no such image",)


def test_waiting_ends_when_it_takes_too_long() -> None:
    with crew() as hired, pytest.raises(RunError, match="waited 0 s in vain: north asks"):
        hired.until(lambda: False, "north asks", patience_s=0.0)


def test_ctrl_c_waits_until_a_block_that_must_be_finished_is() -> None:
    done = list[str]()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with undisturbed():
                signal.raise_signal(signal.SIGINT)
                done.append("finished")
            done.append("never")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["finished"]

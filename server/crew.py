"""The processes of a demonstration: each has a name, and none outlives the block it runs in.

Guarantees:
    However the block of ``crew`` is left, no process that it started is left running.
    Ctrl-C while a process is started, or while all are stopped, waits until that is done.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shared_models.errors import RunError

POLL_S = 0.05
STOP_S = 10.0  # for a process with nothing below it; the first one may have to stop a SuperLink
STOP_FIRST_S = 75.0  # which it may be starting just then
LAST_LINES = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Process = subprocess.Popen[str]


class Crew:
    """What runs on until all are dismissed, the first one last; and commands, which end."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[Process, Path]] = {}
        self.commands: list[Process] = []

    def start(self, name: str, module: str, *arguments: str | Path, log_file: Path) -> None:
        """Start a process that is to run on."""
        with log_file.open("ab") as log, undisturbed():
            self.running[name] = _started(module, arguments, output=log), log_file

    def command(self, module: str, *arguments: str | Path) -> Process:
        """Start a command; ``said`` waits for its end."""
        with undisturbed():
            self.commands.append(_started(module, arguments, output=subprocess.PIPE))
        return self.commands[-1]

    def insist(self) -> None:
        """Insist that what is to run on does.

        Raises:
            RunError: with the last words of what has ended.
        """
        for name, (process, log_file) in self.running.items():
            if process.poll() is not None:
                told = _last(log_file.read_text(encoding="utf-8", errors="replace"))
                raise RunError([f"{name} ended; see {log_file}", *told])

    def until(self, holds: Callable[[], bool], what: str, *, patience_s: float) -> None:
        """Wait until ``holds``, while what is to run on does.

        Raises:
            RunError: if something has ended, or it takes longer than ``patience_s``.
        """
        end = time.monotonic() + patience_s
        while not holds():
            self.insist()
            if time.monotonic() > end:
                raise RunError(f"waited {patience_s:.0f} s in vain: {what}")
            time.sleep(POLL_S)

    def dismiss(self) -> None:
        """End all: commands and what runs on together, and then what was started first."""
        running = [process for process, _ in self.running.values()]
        with undisturbed():
            _end([*self.commands, *running[1:]], patience_s=STOP_S)
            _end(running[:1], patience_s=STOP_FIRST_S)


@contextmanager
def crew() -> Iterator[Crew]:
    """Have processes run; none is left when the block is."""
    hired = Crew()
    try:
        yield hired
    finally:
        hired.dismiss()


def said(process: Process, who: str) -> str:
    """Return what a command has printed, once it has ended.

    Raises:
        RunError: with its last words, if it did not succeed.
    """
    printed, _ = process.communicate()
    if process.returncode != 0:
        raise RunError([f"{who}: {line}" for line in _last(printed)] or [f"{who}: it failed"])
    return printed


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and its like wait until the block is left."""
    heard = list[int]()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number in SIGNALS if callable(before[number])]
    try:
        for number in heeded:
            signal.signal(number, lambda number, _: heard.append(number))
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
    if heard:
        signal.raise_signal(heard[0])


def _started(module: str, arguments: Sequence[str | Path], *, output: IO[bytes] | int) -> Process:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C on the terminal is for the demonstration to act upon
    )


def _end(processes: Sequence[Process], *, patience_s: float) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _last(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]

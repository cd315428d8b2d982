"""Whether this site's agent runs: the agent holds a lock, and whoever wants to know tries it.

Guarantees:
    A site has one agent at a time.
    A killed agent counts as running no longer.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared_models.errors import MachineError

LOCK = "agent.lock"
WAIT_S = 2.0


@contextmanager
def running(state_dir: Path) -> Iterator[None]:
    """Hold the place of this site's one agent, as long as the process lives.

    Raises:
        MachineError: if another agent holds it.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / LOCK).open("a") as handle:
        until = time.monotonic() + WAIT_S  # whoever looks at the status holds it for a moment
        while not _locks(handle.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise MachineError("another agent of this site is running; stop that one first")
            time.sleep(0.05)
        yield


def is_running(state_dir: Path) -> bool:
    """Tell whether an agent holds this site's place."""
    try:
        descriptor = os.open(state_dir / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _locks(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _locks(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

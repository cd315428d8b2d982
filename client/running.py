"""Whether this site's agent runs: the agent holds a lock, and whoever wants to know tries it.

Guarantees:
    A site has one agent at a time.
    A killed agent counts as running no longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared_models.files import is_locked, locked

LOCK = "agent.lock"
WAIT_S = 2.0  # whoever looks at the status holds it for a moment


@contextmanager
def running(state_dir: Path) -> Iterator[None]:
    """Hold the place of this site's one agent, as long as the process lives.

    Raises:
        MachineError: if another agent holds it.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    refusal = "another agent of this site is running; stop that one first"
    with locked(state_dir / LOCK, refusal=refusal, patience_s=WAIT_S):
        yield


def is_running(state_dir: Path) -> bool:
    """Tell whether an agent holds this site's place."""
    try:
        return is_locked(state_dir / LOCK)
    except OSError:
        return False

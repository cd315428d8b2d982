"""What the machine offers: a folder that keeps what is written, disk, memory, and the records."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from client import ledger
from client.preflight.base import MIB, Case, Finding, duration, several, size
from shared_models import journal
from shared_models.errors import ConsiliaError, MachineError
from shared_models.files import replace
from shared_models.signing import load_key, public_key

SLOW_S = 1.0  # to write a line durably; each order writes about six
SPARE_BYTES = 256 * MIB
ORDER_BYTES = 8 * 1024  # of journal and ledger, for each round


def state_folder(case: Case) -> Iterator[Finding]:
    """Yield whether what is written in the state folder is kept."""
    what, folder = "state folder", _existing(case.config.state_dir)
    probe = folder / f".check-{uuid4().hex}"
    start = time.monotonic()
    try:
        replace(probe, b"Consilia was here\n")
        seconds = time.monotonic() - start
        is_kept = probe.read_bytes() == b"Consilia was here\n"
    except OSError as error:
        said = f"cannot be written: {error.strerror or type(error).__name__}"
        cure = "give the agent's user the right to write in state_dir, or make room there"
        yield Finding(what, False, said, "this machine", cure)
        return
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    if not is_kept:
        said, cure = "what was written is not what is read", "move state_dir to a local disk"
        yield Finding(what, False, said, "this machine", cure)
        return
    said = f"writable; a durable write takes {duration(seconds)}"
    cure = "move state_dir to a faster local disk"
    is_fast = True if seconds < SLOW_S else None
    yield Finding(what, is_fast, said, "this machine", cure, {"fsync_s": round(seconds, 4)})


def disk(case: Case) -> Iterator[Finding]:
    """Yield whether there is room for the replies that are kept, and for ledger and journal."""
    from client.policy import update_bytes

    policy, plan = case.config.policy, case.plan
    update, rounds = policy.max_update_mb * MIB, policy.max_rounds
    if plan is not None:
        update, rounds = update_bytes(plan, plugins=policy.plugins), plan.training.num_rounds
    # the newest reply is kept, and stands there twice while a newer one takes its place
    needed = int(2 * update + rounds * ORDER_BYTES + SPARE_BYTES)
    free = shutil.disk_usage(_existing(case.config.state_dir)).free
    said = f"{size(free)} free, {size(needed)} needed"
    figures = {"free_mb": free // MIB, "needed_mb": needed // MIB}
    cure = "make room on the disk of state_dir, or move it to another"
    yield Finding("disk", free >= needed, said, "this machine", cure, figures)


def worker(case: Case) -> Iterator[Finding]:
    """Yield what the process that reads images can give up on this machine, by starting one."""
    from client.confinement import STEPS
    from client.supervisor import confinement_of, exposed

    what = "worker"
    try:
        lacking = confinement_of(case.config).lacking
    except MachineError as error:
        cure = "see whether python -m client.worker can be started by the agent's user"
        yield Finding(what, False, str(error), "this machine", cure)
        return
    done = ", ".join(sentence for step, (sentence, _) in STEPS.items() if step not in lacking)
    if not lacking:
        yield Finding(what, True, done, "this machine")
    for step, why in lacking.items():
        said = f"this machine does not let it be confined in its {step} ({why})"
        said += f"; otherwise {done}" if done else ""
        yield Finding(what, None, said, "this machine", STEPS[step][1])
    for secret in exposed(case.config):
        said = f"it may read {secret.name}, which lies in a folder that it is given"
        cure = "move the keys and state_dir out of data.root and of limits.readable"
        yield Finding(what, False, said, "settings", cure)


def records(case: Case) -> Iterator[Finding]:
    """Yield whether ledger and journal can be read whole, and say the same."""
    what, folder = "ledger, journal", case.config.state_dir
    if not (folder / ledger.FILE).exists() and not (folder / journal.FILE).exists():
        yield Finding(what, True, "none yet; the site has not done anything", "this machine")
        return
    try:
        faults = _faults(case)
    except (ConsiliaError, OSError) as error:
        faults = [str(error) if isinstance(error, ConsiliaError) else type(error).__name__]
    if faults:
        said = f"{several(len(faults), 'fault')}, the first: {faults[0]}"
        cure = "stop the agent, keep a copy of state_dir, and see: consilia-audit verify"
        yield Finding(what, False, said, "this machine", cure)
        return
    charges = len(ledger.read(folder).reservations)
    said = f"whole and alike; {several(charges, 'charge')}"
    yield Finding(what, True, said, "this machine", figures={"charges": charges})


def memory(case: Case) -> Iterator[Finding]:
    """Yield whether there is memory for the cohort and a training step, as the dry batch took.

    What the worker may hold counts too: it is ended once it holds more (``limits.max_memory_gb``).
    """
    from client.supervisor import most_memory_bytes

    stated = case.config.limits.max_memory_gb
    free, allowed = available_bytes(), int(most_memory_bytes(stated))
    figures = {"free_mb": free // MIB, "allowed_mb": allowed // MIB}
    said = f"{size(free)} free, {size(allowed)} allowed"
    if case.dry is None or not case.dry.peak_bytes:
        said = f"{said}; how much is needed shows only a dry batch of a plan"
        yield Finding("memory", None, said, "this machine", figures=figures)
        return
    needed = case.dry.peak_bytes + case.dry.cohort_bytes
    said, figures = f"{said}, about {size(needed)} needed", figures | {"needed_mb": needed // MIB}
    if free < needed:
        cure = "lower performance.most_images, end other programs, or give the machine more memory"
        yield Finding("memory", False, said, "this machine", cure, figures)
        return
    cure = "lower performance.most_images, or raise limits.max_memory_gb"
    cure += "" if stated else ", which is a share of the machine's while it is 0"
    yield Finding("memory", allowed >= needed, said, "settings", cure, figures)


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that can be had: the machine's, or less where a container is limited."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError):
        lines = (proc / "meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    with suppress(OSError, ValueError):  # no such limit, or "max"
        limit, used = (int((cgroup / f"memory.{n}").read_text()) for n in ("max", "current"))
        found.append(max(limit - used, 0))
    return min(found)


def _faults(case: Case) -> list[str]:
    folder, key = case.config.state_dir, public_key(load_key(case.config.signing_key))
    charges = ledger.read(folder)
    if not (folder / journal.FILE).exists():
        return []
    chain = journal.follow((folder / journal.FILE).read_bytes(), key=key, site=case.config.name)
    found = [] if chain.fault is None else [chain.fault]
    return found or list(journal.ledger_faults(chain.lines, charges))


def _existing(folder: Path) -> Path:
    """Return ``folder``, or the nearest above it that there is."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())

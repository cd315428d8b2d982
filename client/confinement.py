"""What a worker process gives up before it sees an image: network, files, programs, privileges.

Each step is tried, and what came of it is told: what a kernel lacks is for the site to know, not a
reason to train nothing. Only the standard library is imported here, because a process that has
threads can no longer leave its network.

Guarantees, each where ``Confinement`` says so:
    A worker reaches no network, not even this machine's own.
    A worker opens no file but those it was given to read, and writes only to its scratch folder and
    the cache of prepared images.
    A worker starts no other program, looks into no other process, and gains no privilege.
    A worker ends with its parent, and leaves no image of its memory on disk.

Design: Landlock rather than a change of root or of user, because it needs no privilege and no
preparation: what is not listed is denied, so keys and ledger are out of reach wherever they lie,
unless they lie within a folder that is listed. Prepared images must outlive the process, or
every start would prepare them anew: so the cache's folder may be written too, and nobody but
workers opens it. What a worker gone wrong leaves there can mislead a later worker of the same
site, which reads the same images anyway; it cannot leave the hospital by it.

References:
    The Linux kernel's user-space API guide, Landlock, and include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

NEW_USER, NEW_NET = 0x10000000, 0x40000000  # sched.h
PARENT_DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38  # sys/prctl.h
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
PATH_BENEATH = 1
CAPABILITIES_VERSION, READ_OF_OTHERS = 0x20080522, 0b110  # linux/capability.h
READ = 0b1100  # of files and folders; not their execution
WRITE_DEVICE = 0b110 | 1 << 15
OF_A_FILE = 0b111 | 1 << 14 | 1 << 15
#: Kinds of access to files that each version of Landlock knows.
NUM_ACCESSES = {1: 13, 2: 14, 3: 15, 4: 15}
TCP, SIGNALS_AND_SOCKETS = 0b11, 0b11

SYSTEM = ("/usr", "/lib", "/lib64", "/proc", "/sys")
SYSTEM_FILES = (
    "/etc/group",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/passwd",
)
DEVICES = ("null", "zero", "full", "random", "urandom", "nvidia*", "dri", "kfd")


#: What a worker has done with each step, and what makes a machine allow it.
STEPS: dict[str, tuple[str, str]] = {
    "network": (
        "it reaches no network",
        "allow user namespaces to the agent's user (sysctl user.max_user_namespaces over 0; on "
        "Ubuntu kernel.apparmor_restrict_unprivileged_userns = 0, or an AppArmor profile that "
        "grants userns; under systemd no RestrictNamespaces), or run the agent in a container "
        "that may make network namespaces",
    ),
    "files": (
        "it opens no file but those it is given",
        "use Linux 5.13 or later with Landlock among its security modules (lsm=landlock,... at "
        "boot; see /sys/kernel/security/lsm), and let a container's seccomp profile pass the "
        "landlock calls",
    ),
    "privileges": (
        "it gains no privilege and keeps none",
        "let the agent's user call prctl, capget and capset, as seccomp profiles do by default",
    ),
    "memory": (
        "it leaves no image of its memory on disk",
        "mount /proc so that a process may write its own oom_score_adj",
    ),
    "parent": ("it ends with the agent", "let the agent's user call prctl"),
}


class Confines(NamedTuple):
    """What a worker may read, and what it may write to: a scratch folder, and what lasts."""

    readable: tuple[str, ...]
    scratch: str
    lasting: tuple[str, ...] = ()


class Confinement(NamedTuple):
    """What became of each step: None if it was done, else the system's name for what went wrong."""

    parent: str | None
    memory: str | None
    network: str | None
    privileges: str | None
    files: str | None

    @property
    def lacking(self) -> dict[str, str]:
        """The steps that this machine did not allow, the gravest first, and why."""
        told: dict[str, str | None] = self._asdict()
        return {step: why for step in STEPS if (why := told[step]) is not None}

    def sentence(self) -> str:
        """Say it for the site's log."""
        if not self.lacking:
            return "the worker is confined: no network, no files but its own"
        failed = ", ".join(f"{step} ({why})" for step, why in self.lacking.items())
        return f"the worker is not confined in everything; this system lacks: {failed}"


def readable_by_default() -> tuple[str, ...]:
    """Return what Python, this program and its libraries need to read."""
    python = (sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(None, sys.path))
    return (*SYSTEM, *SYSTEM_FILES, *dict.fromkeys(python))


def confine(confines: Confines) -> Confinement:
    """Give up everything but ``confines``, for good; call it before any thread is started."""
    libc = ctypes.CDLL(None, use_errno=True)
    return Confinement(
        parent=_tried(lambda: _prctl(libc, PARENT_DEATH_SIGNAL, signal.SIGKILL)),
        memory=_tried(_leave_memory),
        network=_tried(lambda: _leave_network(libc)),
        privileges=_tried(lambda: _leave_privileges(libc)),
        files=_tried(lambda: _leave_files(libc, confines)),
    )


def _tried(step: Callable[[], None]) -> str | None:
    try:
        step()
    except (OSError, ValueError, AttributeError) as error:  # the last: a system without the call
        number = error.errno if isinstance(error, OSError) else None
        return errno.errorcode.get(number or 0, type(error).__name__)
    return None


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    _checked(libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3))


def _leave_memory() -> None:
    """Leave no image of memory on disk, and be the first to go when the machine has none left."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/oom_score_adj").write_text("1000")


def _leave_network(libc: ctypes.CDLL) -> None:
    """Move to a network without interfaces, in a user namespace where one is needed for that."""
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(NEW_NET) == 0:
        return
    _checked(libc.unshare(NEW_USER | NEW_NET))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)


def _leave_privileges(libc: ctypes.CDLL) -> None:
    """Gain none any more, and keep of root's, if it is root, only to read what others own."""
    _prctl(libc, NO_NEW_PRIVILEGES, 1)
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    _checked(libc.capget(header, sets))
    effective, permitted, *_ = sets
    kept = (effective & READ_OF_OTHERS, permitted & READ_OF_OTHERS)
    _checked(libc.capset(header, (ctypes.c_uint32 * 6)(*kept)))


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("folder", ctypes.c_int32))


def _leave_files(libc: ctypes.CDLL, confines: Confines) -> None:
    version = _checked(_call(libc, CREATE_RULESET, None, 0, 1))
    everything = (1 << NUM_ACCESSES.get(version, 16)) - 1
    ruleset = _Ruleset(everything, TCP, SIGNALS_AND_SOCKETS)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _checked(_call(libc, CREATE_RULESET, ctypes.byref(ruleset), size, 0))
    for access, paths in (
        (READ, map(Path, confines.readable)),
        (WRITE_DEVICE, _devices()),
        (everything & ~1, map(Path, (confines.scratch, *confines.lasting))),
    ):
        _allow(libc, rules, access & everything, paths)
    _checked(_call(libc, RESTRICT_SELF, rules, 0))
    os.close(rules)


def _allow(libc: ctypes.CDLL, rules: int, access: int, paths: Iterable[Path]) -> None:
    for path in paths:
        if not path.exists():
            continue
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = access if path.is_dir() else access & OF_A_FILE
        rule = _Beneath(allowed, folder)
        _checked(_call(libc, ADD_RULE, rules, PATH_BENEATH, ctypes.byref(rule), 0))
        os.close(folder)


def _devices() -> list[Path]:
    return [path for name in DEVICES for path in Path("/dev").glob(name)]


def _call(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    words = [ctypes.c_size_t(a) if isinstance(a, int) else a for a in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *words)
    return result

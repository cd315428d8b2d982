"""Write files so that a crash leaves the old content or the new, never half of either.

Guarantees:
    What ``replace`` or ``append_line`` wrote is on disk when it returns.
    A crash during ``replace`` leaves the old content.
    A line cut short by a crash is never glued to the next one.
    What a process has ``locked`` is free again when the process ends, however it ends.
    What ``create`` made is whole, and took no other file's place.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple
from uuid import uuid4

from shared_models.errors import MachineError

BLOCK_BYTES = 2**16


class Tail(NamedTuple):
    """A file's last whole line, without its end, and what stands after it; empty if none does."""

    line: bytes
    torn: bytes


def replace(
    file: Path, content: bytes | Iterable[bytes | memoryview], *, mode: int = 0o666
) -> None:
    """Make ``content``, whole or in pieces, the content of ``file``, atomically and durably.

    The content goes to a temporary sibling, reaches the disk, and takes the name in one step; then
    the folder reaches the disk too. A new file gets ``mode``, less what the umask takes; an
    existing file keeps its permissions.

    Raises:
        OSError: if the folder is missing, full or not writable; ``file`` is then as it was.
    """
    temporary = file.with_name(f".{file.name[:100]}.{uuid4().hex}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            if file.exists():
                os.fchmod(stream.fileno(), file.stat().st_mode & 0o777)
            for piece in (content,) if isinstance(content, bytes) else content:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def create(file: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Make a new file with ``content``, atomically and durably.

    Raises:
        FileExistsError: if ``file`` exists; it is left as it is.
        OSError: if the folder is missing, full or not writable.
    """
    temporary = file.with_name(f".{file.name[:100]}.{uuid4().hex}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(file.parent)


def append_line(file: Path, line: str) -> None:
    """Add ``line`` and a line end to ``file``, durably; the file is made if there is none.

    A last line without its end was cut short by a crash, so nobody was told that it was written:
    it is taken off first. Who must know of it reads the file before. One writer at a time.

    Raises:
        ValueError: if ``line`` holds a line end.
        OSError: if the file cannot be written.
    """
    if "\n" in line or "\r" in line:
        raise ValueError("expected one line, got a line end in it")
    is_new = not file.exists()
    with file.open("a+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        end = _after_line_end(stream, size)
        if end < size:
            stream.truncate(end)
        stream.write(line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    if is_new:
        _sync_folder(file.parent)


def read_tail(file: Path) -> Tail:
    """Return how ``file`` ends, reading no more of it than that.

    Raises:
        OSError: if the file cannot be read.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        end = _after_line_end(stream, size)
        start = _after_line_end(stream, max(end - 1, 0))
        stream.seek(start)
        tail = stream.read(size - start)
    return Tail(tail[: max(end - 1 - start, 0)], tail[end - start :])


@contextmanager
def locked(file: Path, *, refusal: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold ``file``, which is made if there is none, for this process alone.

    Raises:
        MachineError: with ``refusal`` and the holder's number, if another process holds it and
            does not let go of it within ``patience_s``.
        OSError: if the file cannot be written.
    """
    until = time.monotonic() + patience_s
    with file.open("a+b") as handle:
        while not _is_taken(handle):
            if time.monotonic() >= until:
                handle.seek(0)
                holder = handle.read(20).decode("ascii", errors="replace").strip()
                raise MachineError(f"{refusal} (process {holder})")
            time.sleep(0.05)
        handle.truncate(0)
        handle.write(str(os.getpid()).encode())
        handle.flush()
        yield


def is_locked(file: Path) -> bool:
    """Return whether a process holds ``file``; whoever else only looks is not taken for one."""
    try:
        with file.open("rb") as handle:
            return not _is_taken(handle, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Hold ``file``, which is made if there is none, once nobody else who asks for it does.

    Raises:
        OSError: if the file cannot be written.
    """
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is_taken(handle: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _after_line_end(stream: BinaryIO, size: int) -> int:
    """Return where the last line end within the first ``size`` bytes ends; 0 if there is none."""
    while size > 0:
        start = max(0, size - BLOCK_BYTES)
        stream.seek(start)
        found = stream.read(size - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

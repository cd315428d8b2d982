"""Write files so that a crash leaves the old content or the new, never half of either.

Guarantees:
    What ``replace`` or ``append_line`` wrote is on disk when it returns.
    A crash during ``replace`` leaves the old content.
    A line cut short by a crash is never glued to the next one.
    What ``create`` made is whole, and took no other file's place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple
from uuid import uuid4

BLOCK_BYTES = 2**16


class Tail(NamedTuple):
    """A file's last whole line, without its end, and what stands after it; empty if none does."""

    line: bytes
    torn: bytes


def replace(file: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Make ``content`` the content of ``file``, atomically and durably.

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
            stream.write(content)
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

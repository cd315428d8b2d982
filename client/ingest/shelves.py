"""The files of a site's store: de-identified objects that wait, and volumes that are whole.

Guarantees:
    A volume's folder is whole or not there, whenever the process is killed.
    What the catalogue does not know of is removed at the next run.
    Nothing in a file's or a folder's name is anybody's but the site's key's.

Design: a volume's folder is named by the digest of its files. A series that has grown gets another
folder; the old one goes once the catalogue names the new one. Files are linked, not copied, where
the disk can do that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from client.config import IngestSettings
from client.ingest import catalogue
from client.ingest.catalogue import Instance

KEY, REGISTER, CATALOGUE, LOCK = "key", "register", "catalogue.sqlite", "lock"
MAPS, NEW = "maps", ".new-"
#: So many files are flushed one by one.
FEW = 4
LIBC = ctypes.CDLL(None, use_errno=True)


def make_folders(settings: IngestSettings) -> None:
    """Make the folders, readable by their owner only.

    Raises:
        OSError: if they cannot be made.
    """
    for folder in (settings.folder, settings.private, settings.store, _pending(settings)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    inbox(settings).mkdir(exist_ok=True, mode=0o700)


def inbox(settings: IngestSettings) -> Path:
    """Return where a PACS's images are received."""
    return settings.private / "inbox"


def pending_file(settings: IngestSettings, *, series: str, uid: str, digest: str) -> Path:
    """Return where a de-identified object waits until its series is judged."""
    return _pending(settings) / series / f"{uid}-{digest[:16]}.dcm"


def file_of(settings: IngestSettings, instance: Instance, *, folder: str | None) -> Path:
    """Return where an instance's file lies: waiting, or in its volume's ``folder``."""
    waiting = pending_file(
        settings, series=instance.series, uid=instance.uid, digest=instance.digest or ""
    )
    if folder is None or waiting.exists():
        return waiting
    return settings.store / folder / f"{instance.uid}.dcm"


def digest_of(series: str, instances: Iterable[Instance]) -> str:
    """Return what tells a volume's files from any others."""
    told = "\n".join([series, *(f"{one.uid} {one.digest}" for one in instances)])
    return hashlib.sha256(told.encode()).hexdigest()


def publish(
    settings: IngestSettings, files: Mapping[str, Path], *, patient: str, digest: str
) -> str:
    """Make a volume's folder of ``files``, by their names there, and return it below the store.

    Raises:
        OSError: if it cannot be made.
    """
    folder = f"{patient}/{digest[:32]}"
    final = settings.store / folder
    if final.is_dir():  # made by a run that was killed before it could say so
        return folder
    new = settings.store / f"{NEW}{uuid4().hex}"
    new.mkdir(mode=0o700)
    for name, file in files.items():
        _link(file, new / name)
    sync(new)
    final.parent.mkdir(exist_ok=True, mode=0o700)
    sync(settings.store)
    new.rename(final)
    sync(final.parent)
    return folder


def take_back(settings: IngestSettings, instances: Iterable[Instance], *, folder: str) -> None:
    """Have the files of a volume that is none any more wait again; its folder stays for now."""
    for one in instances:
        waiting = pending_file(settings, series=one.series, uid=one.uid, digest=one.digest or "")
        stored = settings.store / folder / f"{one.uid}.dcm"
        waiting.parent.mkdir(exist_ok=True, mode=0o700)
        if not waiting.exists() and stored.exists():
            _link(stored, waiting)
    with suppress(FileNotFoundError):
        sync(_pending(settings))


def clear_pending(settings: IngestSettings, series: str) -> None:
    """Remove what waits of a series."""
    shutil.rmtree(_pending(settings) / series, ignore_errors=True)


def remove(settings: IngestSettings, folder: str) -> None:
    """Remove a volume's folder, in one step as far as others see."""
    gone = settings.store / f"{NEW}{uuid4().hex}"
    with suppress(FileNotFoundError):
        (settings.store / folder).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # the patient has others
        (settings.store / folder).parent.rmdir()


def sweep(settings: IngestSettings, connection: sqlite3.Connection) -> None:
    """Remove what a killed run left: half-made folders, and files that the catalogue lacks."""
    known = catalogue.folders(connection) | catalogue.map_files(connection)
    for left in settings.store.glob(f"{NEW}*"):
        shutil.rmtree(left, ignore_errors=True)
    for found in settings.store.glob("P-*/*"):
        if f"{found.parent.name}/{found.name}" not in known:
            shutil.rmtree(found) if found.is_dir() else found.unlink()
            with suppress(OSError):
                found.parent.rmdir()
    for waiting in _pending(settings).iterdir():
        if waiting.name != MAPS:
            _sweep_series(settings, connection, waiting)


def write(file: Path, content: bytes) -> int:
    """Write a file and return its descriptor, to be flushed to the disk and closed together.

    Raises:
        OSError: if it cannot be written.
    """
    file.parent.mkdir(exist_ok=True, mode=0o700)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    return descriptor


def flush(descriptors: Sequence[int]) -> None:
    """Have what was written reach the disk, names included, and close it.

    Many files at once go by the system's own call for a whole file system, which waits once.

    Raises:
        OSError: if it does not reach the disk.
    """
    many = len(descriptors) > FEW and hasattr(LIBC, "syncfs")
    if many and LIBC.syncfs(descriptors[0]) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for descriptor in descriptors:
        if not many:
            os.fsync(descriptor)
        os.close(descriptor)


def sync(folder: Path) -> None:
    """Have a folder's names reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pending(settings: IngestSettings) -> Path:
    return settings.private / "pending"


def _sweep_series(settings: IngestSettings, connection: sqlite3.Connection, waiting: Path) -> None:
    volume = catalogue.find_volume(connection, waiting.name)
    known = {
        f"{one.uid}-{one.digest[:16]}.dcm": one.uid
        for one in catalogue.instances(connection, waiting.name)
        if one.digest is not None
    }
    for file in waiting.iterdir():
        is_needed = file.name in known
        if is_needed and volume is not None:
            is_needed = not (settings.store / volume.folder / f"{known[file.name]}.dcm").exists()
        if not is_needed:
            file.unlink()
    with suppress(OSError):
        waiting.rmdir()


def _link(file: Path, other: Path) -> None:
    try:
        os.link(file, other)
    except FileNotFoundError:
        raise
    except OSError:  # a disk without links
        descriptor = write(other, file.read_bytes())
        os.fsync(descriptor)
        os.close(descriptor)

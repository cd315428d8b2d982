"""Prepared volumes on the hospital's disk, so that an image is read and prepared once.

An entry is named by the digest of what it was made from: the bytes of the image's files and of its
label map's, every step taken since with its parameters, and the versions of the software. Changing
a step makes new names from there on, so only what follows is computed again. Beside an image's last
state, the states before it are kept where making them took long.

Entries are images of patients: the folder is the owner's alone, and stays in the hospital. No name
in it is made from a file's name but under a key that the folder keeps to itself.

Guarantees:
    An entry is whole or not there, whenever the process is killed.
    The same volumes come out with the cache as without it, bit for bit.
    Changed files are noticed by size, inode and time of change, then told apart by content.

Design: an entry is a folder of .npy files, made under another name and renamed, so that it can be
mapped into memory. Which content a file has is remembered in SQLite, so that a second start reads
no image.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared_models.cohort import Prepare, read_pair
from shared_models.errors import DocumentError
from shared_models.files import replace
from shared_models.imaging import Pair, made
from shared_models.volume import Volume

#: A state before the last is kept if it took longer than this to make.
WORTH_KEEPING_S = 0.05
#: What is left of a process that was killed is taken away after this long.
STALE_S = 24 * 3600.0
#: Where the same bytes and steps may give other volumes from one version to the next.
SOFTWARE = ("numpy", "scipy", "torch", "scikit-image", "simpleitk", "nibabel", "pillow", "pydicom")
FORMAT = 1
ABOUT, INDEX, KEY = "about.json", "files.sqlite", "key"


class Cache(NamedTuple):
    """A folder of entries, at most ``most_bytes`` of them, and the key of its index."""

    folder: Path
    key: bytes
    most_bytes: int


class Step(NamedTuple):
    """One step of a plan: its name, its parameters and what it does."""

    name: str
    params: dict[str, Any]
    run: Callable[..., Pair]


def open_cache(folder: Path, *, most_gb: float) -> Cache:
    """Open the cache in ``folder``, or make it there, readable by its owner only.

    Raises:
        DocumentError: if it cannot be made or read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        key_file = folder / KEY
        if not key_file.exists():
            replace(key_file, secrets.token_bytes(32), mode=0o600)
        with closing(_index(folder)) as index:
            index.execute("CREATE TABLE IF NOT EXISTS files (state TEXT PRIMARY KEY, digest TEXT)")
            index.commit()
        cache = Cache(folder, key_file.read_bytes(), int(most_gb * 2**30))
    except (OSError, sqlite3.Error) as error:
        raise DocumentError(
            f"cannot use the cache {folder} ({type(error).__name__}); give it a folder that can be "
            "written, or remove a broken one: it holds copies only"
        ) from error
    for left in folder.glob(".new-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left)
    return cache


def preparer(
    cache: Cache, steps: Sequence[tuple[str, dict[str, Any]]], *, plugins: Collection[str] = ()
) -> Prepare:
    """Return what reads an image and its label map, if any, and takes the plan's steps with them.

    Raises:
        ValueError: if a step or a parameter is unknown.
    """
    runs = made(steps, plugins=plugins)
    whole = [Step(name, params, run) for (name, params), run in zip(steps, runs, strict=True)]
    extra = sorted(plugins)

    def prepare(image: Path, label: Path | None) -> Pair:
        names = list(_names(_source(cache, image, label), whole, extra))
        for done in range(len(whole), -1, -1):
            if (found := _read(cache, names[done])) is not None:
                return _finish(cache, found, whole, names, done=done)
        begun = time.monotonic()
        pair = read_pair(image, label)
        if not whole or time.monotonic() - begun > WORTH_KEEPING_S:
            _write(cache, names[0], pair, steps=[])
        return _finish(cache, pair, whole, names, done=0)

    return prepare


def trim(cache: Cache) -> int:
    """Remove the entries that were not used for longest, until the rest fits; return how many."""
    entries = sorted(_entries(cache), key=lambda entry: entry[0])
    size = sum(size for _, size, _ in entries)
    removed = 0
    for _, bytes_, entry in entries:
        if size <= cache.most_bytes:
            break
        gone = entry.with_name(f".new-{entry.name}-{secrets.token_hex(8)}")
        with suppress(OSError):
            entry.rename(gone)  # in one step, so that nobody reads half of it
            shutil.rmtree(gone)
            size, removed = size - bytes_, removed + 1
    return removed


def _finish(
    cache: Cache, pair: Pair, steps: Sequence[Step], names: Sequence[str], *, done: int
) -> Pair:
    """Take the steps that are left; keep the last state, and those that took long."""
    for number in range(done, len(steps)):
        begun = time.monotonic()
        pair = steps[number].run(*pair)
        is_last = number == len(steps) - 1
        if is_last or time.monotonic() - begun > WORTH_KEEPING_S:
            _write(cache, names[number + 1], pair, steps=steps[: number + 1])
    return pair


def _names(source: str, steps: Sequence[Step], plugins: Sequence[str]) -> Iterator[str]:
    """Yield the name of the source's entry and of that after each step."""
    software = {name: version(name) for name in SOFTWARE} | {"plugins": ",".join(plugins)}
    name = _digest({"format": FORMAT, "source": source, "software": software})
    yield name
    for step in steps:
        name = _digest({"before": name, "step": step.name, "params": step.params})
        yield name


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _source(cache: Cache, image: Path, label: Path | None) -> str:
    """Return the digest of an image's content and its label map's, whatever the files' names."""
    with closing(_index(cache.folder)) as index:
        files = [file for file in (image, label) if file is not None]
        found = [_content(cache, index, file) for file in files]
        index.commit()
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


def _content(cache: Cache, index: sqlite3.Connection, path: Path) -> str:
    """Return the digest of a file's bytes; of a folder's, the digests of its files in order."""
    if path.is_dir():
        inside = sorted(_content(cache, index, file) for file in path.iterdir() if file.is_file())
        return hashlib.sha256("\n".join(inside).encode()).hexdigest()
    state = _state(cache, path)
    row = index.execute("SELECT digest FROM files WHERE state = ?", (state,)).fetchone()
    if row is not None:
        return str(row[0])
    with path.open("rb") as stream:
        # the name's ending decides which reader opens the file
        ending = "".join(path.suffixes[-2:]).lower().encode()
        digest = hashlib.file_digest(stream, "sha256")
        digest.update(b"\0" + ending)
    index.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (state, digest.hexdigest()))
    return digest.hexdigest()


def _state(cache: Cache, file: Path) -> str:
    """Return a keyed digest of a file's place, size and times, which tells nothing without it."""
    stat = file.stat()
    known = f"{file.absolute()}\0{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return hashlib.blake2b(known.encode(errors="surrogateescape"), key=cache.key).hexdigest()


def _index(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / INDEX, timeout=60)


def _read(cache: Cache, name: str) -> Pair | None:
    entry = cache.folder / name[:2] / name
    try:
        about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
        pair = tuple(_load(entry, part, about[part]) for part in ("image", "label"))
        os.utime(entry / ABOUT)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pair if pair[0] is not None else None  # type: ignore[return-value]


def _load(entry: Path, part: str, about: dict[str, Any] | None) -> Volume | None:
    if about is None:
        return None
    data = np.load(entry / f"{part}.npy", mmap_mode="c", allow_pickle=False)
    if list(data.shape) != about["shape"] or data.dtype != np.float32:
        raise ValueError("not the array that was kept")
    return Volume(data, np.array(about["affine"]), about["modality"])


def _write(cache: Cache, name: str, pair: Pair, *, steps: Sequence[Step]) -> None:
    """Keep a state, if the disk allows; a cache that cannot be written costs time only."""
    entry = cache.folder / name[:2] / name
    new = cache.folder / f".new-{secrets.token_hex(8)}"
    about = {
        "steps": [{"name": step.name, "params": step.params} for step in steps],
        "software": {package: version(package) for package in SOFTWARE},
        **{
            part: volume
            and {
                "shape": list(volume.data.shape),
                "affine": volume.affine.tolist(),
                "modality": volume.modality,
            }
            for part, volume in zip(("image", "label"), pair, strict=True)
        },
    }
    try:
        new.mkdir(mode=0o700)
        for part, volume in zip(("image", "label"), pair, strict=True):
            if volume is not None:
                with (new / f"{part}.npy").open("wb") as stream:
                    np.save(stream, volume.data)
                    stream.flush()
                    os.fsync(stream.fileno())
        replace(new / ABOUT, json.dumps(about).encode())
        entry.parent.mkdir(exist_ok=True, mode=0o700)
        new.rename(entry)
    except OSError:  # a full disk, or another process was first
        shutil.rmtree(new, ignore_errors=True)


def _entries(cache: Cache) -> Iterator[tuple[float, int, Path]]:
    """Yield (when it was last used, its size in bytes, the folder) of every entry."""
    for about in cache.folder.glob(f"??/*/{ABOUT}"):
        with suppress(OSError):
            size = sum(file.stat().st_size for file in about.parent.iterdir())
            yield about.stat().st_mtime, size, about.parent

"""Where images come from: a folder, and the inbox that a PACS sends to.

A source yields arrivals, one file at a time and in no order that means anything. What an arrival
is, is told by its content: names and folders are not looked at. A PACS that is asked stands in
``web.py`` and ``dimse.py``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from shared_models.errors import DataError, DocumentError
from shared_models.files import replace

#: A file that was touched so recently may still be being written.
QUIET_S = 3.0
#: Files that say what they are by their name, and are no images.
NO_IMAGES = {"DICOMDIR", "Thumbs.db", ".DS_Store", "desktop.ini"}


class Arrival(NamedTuple):
    """One file: ``read`` gives its content, ``done`` says that it was kept or refused for good.

    ``file`` is where it lies, if it lies on a disk of the hospital's.
    """

    read: Callable[[], Dataset]
    done: Callable[[], None] = lambda: None
    file: Path | None = None


def folder(root: Path, *, quiet_s: float = 0.0) -> Iterator[Arrival]:
    """Yield every file under ``root``, which is left as it is; links are not followed.

    Files younger than ``quiet_s`` are left for another time.

    Raises:
        DocumentError: if there is no such folder.
    """
    if not root.is_dir():
        raise DocumentError(f"expected a folder at {root}; there is none")
    for file in files_in(root):
        if quiet_s <= 0 or _is_quiet(file, quiet_s):
            yield Arrival(lambda file=file: read_file(file), file=file)  # type: ignore[misc]


def inbox(root: Path) -> Iterator[Arrival]:
    """Yield what was received into ``root``; an arrival that is done is removed."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for file in sorted(root.glob("*.dcm")):

        def done(file: Path = file) -> None:
            file.unlink(missing_ok=True)

        yield Arrival(lambda file=file: read_file(file), done, file)  # type: ignore[misc]


def put(root: Path, content: bytes) -> None:
    """Put a received file into an inbox, under a name that tells nothing; durably, whole or not.

    Raises:
        OSError: if it cannot be written.
    """
    replace(root / f"{uuid4().hex}.dcm", content, mode=0o600)


def read_file(file: Path) -> Dataset:
    """Read a DICOM file; one without a preamble only if it says what kind of object it is.

    Raises:
        DataError: if it is none, or is broken; never with its name.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(file)
    except InvalidDicomError:
        return _headless(file)
    except Exception as error:
        raise DataError(f"cannot be read as DICOM ({type(error).__name__})") from None


def _headless(file: Path) -> Dataset:
    import pydicom

    try:
        found: Any = pydicom.dcmread(file, force=True)
        is_object = str(found.get("SOPClassUID", "")).startswith("1.2.840.10008.5.1.4.")
        if "TransferSyntaxUID" not in found.file_meta:
            is_implicit, _ = found.original_encoding
            found.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
            )
    except Exception:
        is_object = False
    if not is_object:
        raise DataError("no DICOM file")
    return found  # type: ignore[no-any-return]


def files_in(root: Path) -> Iterator[Path]:
    """Yield the files under ``root`` that may be images, in the order of their names."""
    for where, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            file = Path(where, name)
            if name not in NO_IMAGES and not file.is_symlink():
                yield file


def _is_quiet(file: Path, quiet_s: float) -> bool:
    try:
        return time.time() - file.stat().st_mtime >= quiet_s
    except OSError:  # it went away
        return False

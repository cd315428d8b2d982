"""A hospital's rehearsal of taking in images, before there is a patient's among them.

Made-up archives are written (``shared_models.phantoms``), taken in as real ones will be, and what
the take-in said of each series is held to the archives' answer key.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from shared_models.errors import DocumentError

ANSWERS = "answers.json"
ACCEPTED = "accepted"
BURNED_IN = "burned-in"


class Difference(NamedTuple):
    """How many series should have got a verdict, and how many did."""

    verdict: str
    expected: int
    found: int


def write(
    folder: Path,
    *,
    seed: int,
    num_patients: int = 4,
    num_slices: int = 24,
    size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write the archives of four made-up hospitals, each with its answer key; the same each time.

    Raises:
        DocumentError: if the folder holds some already, or cannot be written.
    """
    from shared_models.phantoms import write_archives

    try:
        return write_archives(
            folder,
            seed,
            num_patients=num_patients,
            num_slices=num_slices,
            size=size,
            progress=progress,
        )
    except FileExistsError as error:
        raise DocumentError(str(error)) from error
    except OSError as error:
        raise DocumentError(
            f"cannot write {folder} ({type(error).__name__}); choose a folder that can be written, "
            "on a disk with room"
        ) from error


def expected(folder: Path) -> Counter[str]:
    """Return how many series of the archives below ``folder`` must get which verdict.

    A verdict is "accepted" or the reason of a refusal, as reading and de-identification give it.

    Raises:
        DocumentError: if there is no answer key, or one that cannot be read.
    """
    keys = sorted(folder.rglob(ANSWERS))
    if not keys:
        raise DocumentError(f"there is no {ANSWERS} in {folder}; expected what rehearse wrote")
    try:
        series = [one for key in keys for one in json.loads(key.read_text("utf-8"))["series"]]
        return Counter(
            BURNED_IN if one.get("burned_in") else one["reason"] or ACCEPTED for one in series
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(
            f"an {ANSWERS} cannot be read ({type(error).__name__}); write the archives anew"
        ) from error


def read_verdicts(file: Path) -> dict[str, int]:
    """Read the counts of series by verdict, JSON.

    Raises:
        DocumentError: if it is no object of counts.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot read {file} as JSON: {type(error).__name__}") from error
    if not isinstance(found, dict) or not all(type(v) is int and v >= 0 for v in found.values()):
        raise DocumentError(f'{file}: expected counts by verdict, such as {{"{ACCEPTED}": 12}}')
    return found


def compare(key: Mapping[str, int], verdicts: Mapping[str, int]) -> list[Difference]:
    """Return every verdict that was given more or less often than the key says."""
    return [
        Difference(verdict, key.get(verdict, 0), verdicts.get(verdict, 0))
        for verdict in sorted({*key, *verdicts})
        if key.get(verdict, 0) != verdicts.get(verdict, 0)
    ]

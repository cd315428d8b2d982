"""Boxes as a manifest lists them, and where they lie once the image has been prepared.

A label reads ``name x1 y1 x2 y2; name x1 y1 x2 y2``, or ``none`` for an image without a box. A name
may hold spaces. Corners are in pixels of the image as it is stored, counted from its edges: the
whole of a picture of 640 x 480 pixels is ``0 0 640 480``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shared_models.errors import DataError
from shared_models.tasks.base import Box
from shared_models.volume import Volume

#: What stands for an image without a box.
NONE = "none"
CURE = "correct the box or remove it"


def read(text: str) -> list[Box]:
    """Return the boxes that a label lists.

    Raises:
        DataError: with the reason and never the text, if it lists something else.
    """
    if text.strip().lower() == NONE:
        return []
    return [_read(part) for part in text.split(";")]


def write(boxes: Sequence[Box]) -> str:
    """Return the label that lists ``boxes``."""
    lines = (" ".join([b.name, *(f"{c:.10g}" for c in (*b.low, *b.high))]) for b in boxes)
    return "; ".join(lines) or NONE


def prepared(boxes: Sequence[Box], *, before: Volume, after: Volume) -> list[Box]:
    """Return where boxes of an image lie in what the plan's steps made of it, by their affines.

    A box whose centre was cut away is left out; one that is cut through ends at the image's edge.

    Raises:
        DataError: if there is more than one slice, or a box is not inside its image.
    """
    if before.data.shape[0] != 1 or after.data.shape[0] != 1:
        raise DataError("expected a single picture, got slices: boxes have no depth; list pictures")
    height, width = before.data.shape[1:]
    for box in boxes:
        if min(box.low) < 0 or box.high[0] > width or box.high[1] > height:
            raise DataError(f"a box reaches outside its image; {CURE}")
    to_after = np.linalg.inv(after.affine) @ before.affine
    limit = np.array(after.data.shape[:0:-1], dtype=np.float64)  # (x, y)
    found = []
    for box in boxes:
        corners = np.array([[*p, 0.5, 1.0] for p in (box.low, box.high)]) - [0.5, 0.5, 0.5, 0.0]
        moved = (corners @ to_after.T)[:, :2] + 0.5
        low, high = moved.min(axis=0), moved.max(axis=0)
        centre = (low + high) / 2
        if (centre >= 0).all() and (centre < limit).all():
            low, high = low.clip(0, limit), high.clip(0, limit)
            found.append(Box(box.name, (low[0], low[1]), (high[0], high[1])))
    return found


def _read(part: str) -> Box:
    words = part.split()
    try:
        corners = [float(word) for word in words[-4:]]
    except ValueError:
        corners = []
    if len(words) < 5 or not all(map(math.isfinite, corners)) or not corners:
        raise DataError(
            "expected boxes as 'name x1 y1 x2 y2; name x1 y1 x2 y2', or 'none'; " + CURE
        )
    x1, y1, x2, y2 = corners
    if not (x1 < x2 and y1 < y2):
        raise DataError(f"a box of no size, or its corners change places; {CURE}")
    return Box(" ".join(words[:-4]), (x1, y1), (x2, y2))

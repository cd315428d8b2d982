"""Boxes follow their images through every step that moves them, and bad ones are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models import boxes
from shared_models.errors import DataError
from shared_models.imaging import pipeline
from shared_models.tasks import Box
from shared_models.volume import Volume

MARK = "MARKED-7731"
CELL = Box("red cell", (3.0, 4.5), (10.25, 9.0))


def picture(height: int, width: int, box: Box | None = None) -> Volume:
    """Return a dark picture in which the box, if any, is bright."""
    data = np.zeros((1, height, width), np.float32)
    if box is not None:
        (x1, y1), (x2, y2) = box.low, box.high
        data[0, round(y1) : round(y2), round(x1) : round(x2)] = 1.0
    return Volume(data, np.eye(4))


def test_a_label_lists_boxes_whose_names_may_have_spaces() -> None:
    text = " red cell 3 4.5 10.25 9;white  cell 0 0 1e1 20 "
    assert boxes.read(text) == [CELL, Box("white cell", (0, 0), (10, 20))]
    assert boxes.read("none") == boxes.read(" None ") == []


corner = st.floats(0, 5000).map(lambda value: float(f"{value:.6g}"))


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "red cell", "2 3"]), corner, corner, corner, corner)
        .map(lambda p: Box(p[0], (min(p[1:3]), min(p[3:])), (max(p[1:3]), max(p[3:]))))
        .filter(lambda b: b.low[0] < b.high[0] and b.low[1] < b.high[1]),
        max_size=4,
    )
)
def test_what_is_written_is_read_again(listed: list[Box]) -> None:
    assert boxes.read(boxes.write(listed)) == listed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected boxes as"),
        (MARK, "expected boxes as"),
        (f"{MARK} 1 2 3", "expected boxes as"),
        ("1 2 3 4", "expected boxes as"),
        (f"{MARK} 1 2 3 four", "expected boxes as"),
        (f"{MARK} 1 2 nan 4", "expected boxes as"),
        (f"{MARK} 1 2 3 inf", "expected boxes as"),
        (f"{MARK} 1 2 3 4;", "expected boxes as"),
        (f"{MARK} 5 5 5 9", "of no size"),
        (f"{MARK} 5 9 7 5", "of no size"),
        (f"a 1 2 3 4; {MARK} 5 9 7 9", "of no size"),
    ],
)
def test_what_is_no_box_is_refused_with_the_reason_and_never_the_value(
    text: str, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        boxes.read(text)
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("low", [(-0.5, 0.0), (0.0, -0.5)])
@pytest.mark.parametrize("high", [(20.5, 10.0), (10.0, 16.5)])
def test_a_box_outside_its_image_is_refused(
    low: tuple[float, float], high: tuple[float, float]
) -> None:
    image = picture(16, 20)
    for box in (Box("a", low, (10.0, 10.0)), Box("a", (0.0, 0.0), high)):
        with pytest.raises(DataError, match="a box reaches outside its image; correct the box"):
            boxes.prepared([box], before=image, after=image)
    whole = Box("a", (0.0, 0.0), (20.0, 16.0))
    assert boxes.prepared([whole], before=image, after=image) == [whole]


STEPS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "resize": [("resize", {"size": [48, 80]})],
    "resample": [("resample", {"spacing_mm": [0.5, 0.25]})],
    "pad": [("crop-or-pad", {"size": [48, 50]})],
    "crop": [("crop-or-pad", {"size": [25, 31]})],
    "cut": [("crop-box", {"low": [0.1, 0.05], "high": [0.9, 0.95]})],
    "turn": [("orient", {"axes": "RPS"})],
    "foreground": [("crop-foreground", {"margin_mm": 3.0})],
    "all": [
        ("orient", {"axes": "LAS"}),
        ("crop-or-pad", {"size": [36, 40]}),
        ("resample", {"spacing_mm": [0.5, 0.7]}),
        ("standardize", {}),
        ("resize", {"size": [64, 64]}),
    ],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("box", [Box("a", (9, 8), (17, 20)), Box("a", (20, 15), (32, 27))])
def test_a_box_stays_around_what_it_was_drawn_around(
    steps: Sequence[tuple[str, dict[str, Any]]], box: Box
) -> None:
    before = picture(32, 40, box)
    after, _ = pipeline(steps)(before)
    (found,) = boxes.prepared([box], before=before, after=after)
    plane = after.data[0]
    y, x = np.nonzero(plane > (plane.max() + plane.min()) / 2)
    seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert np.allclose([*found.low, *found.high], seen, atol=0.75)


def test_what_is_cut_away_goes_and_what_is_cut_through_ends_at_the_edge() -> None:
    before = picture(20, 20)
    after, _ = pipeline([("crop-box", {"low": [0.5, 0.0], "high": [1.0, 1.0]})])(before)
    gone, through = Box("a", (2, 2), (8, 14)), Box("b", (2, 8), (8, 18))
    (found,) = boxes.prepared([gone, through], before=before, after=after)
    assert (found.name, found.low, found.high) == ("b", (2, 0), (8, 8))


def test_slices_have_no_boxes() -> None:
    volume = Volume(np.zeros((3, 20, 20), np.float32), np.eye(4))
    with pytest.raises(DataError, match="expected a single picture, got slices"):
        boxes.prepared([CELL], before=volume, after=volume)

"""DICOM files to volumes: which files form a series, whether it is one volume, and that volume.

``scan`` sorts files into series by what their headers say, ``verdict`` judges a series without
touching a pixel, ``read`` returns the volume or refuses. What cannot be shown to be a straight,
evenly spaced, complete stack of one acquisition is refused with a reason from a closed list.

Guarantees:
    Every file given to ``scan`` is in exactly one of the series it returns.
    Slices are ordered by their position; names, numbers and times of files decide nothing.
    A volume's affine puts every slice where its header says, to 0.05 mm.
    A voxel is the modality's own value, computed exactly and rounded once to float32.
    Nothing of a header, and no file's name, is in any message.

Design: one series is judged as a whole. To split it by orientation or size and take each part for
itself would turn a series with one odd slice into a shorter volume that nobody asked for; so a
series that is not uniform is refused. Localizers, captures and objects that are no slices are set
aside. Projection films and the files of enhanced images are each a series of their own. A slice
missing at either end of a stack leaves no trace in the headers and cannot be noticed.

References:
    DICOM PS3.3 C.7.6.2.1.1 (equation C.7.6.2.1-1), C.8.2.1.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import DataError
from shared_models.reasons import REASONS, Fault, Reason
from shared_models.slices import SAME, Slice, inspect
from shared_models.stored import load
from shared_models.volume import Header, Volume

__all__ = ["REASONS", "Reason", "Series", "SeriesRefused", "Slice", "Verdict"]
__all__ += ["header", "ordered", "read", "scan", "the_one_in", "verdict"]

#: A slice may lie this far from where even spacing puts it, in mm and as a share of the spacing.
POSITION_TOLERANCE_MM = 0.05
POSITION_TOLERANCE_SHARE = 0.1
#: Direction cosines are written with few digits; unit vectors may be wrong by this much.
COSINE_TOLERANCE = 1e-3
#: The stack's direction may lean from the slices' normal by this much, in radians (0.1 degree).
LEAN_TOLERANCE = 1.75e-3
TILT_TOLERANCE_DEGREES = 0.2
SPACING_TOLERANCE_SHARE = 1e-4
ECHO_TOLERANCE_MS = 0.05
MOST_VOXELS = 2**30


class Series(NamedTuple):
    """Files that belong together; ``aside`` says why they are no slices, if they are none."""

    files: tuple[Path, ...]
    slices: tuple[Slice, ...] = ()
    aside: Reason | None = None


class Verdict(NamedTuple):
    """``reason`` is None if the series is one volume, else why it is refused."""

    reason: Reason | None

    @property
    def is_ok(self) -> bool:
        """Whether the series can be read."""
        return self.reason is None

    @property
    def sentence(self) -> str:
        """What the verdict means, for people."""
        return "one volume" if self.reason is None else REASONS[self.reason]


class SeriesRefused(DataError):
    """A series that is not one volume, and why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason


class _Stack(NamedTuple):
    slices: tuple[Slice, ...]
    affine: NDArray[np.float64]


def scan(files: Iterable[Path]) -> list[Series]:
    """Return the series in ``files``, by their headers alone, in the order of first appearance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote header values
        return gather((file, inspect(file)) for file in files)


def gather(inspected: Iterable[tuple[Path, list[Slice] | Reason]]) -> list[Series]:
    """Return the series in files that were inspected, in the order of first appearance."""
    found: dict[tuple[str, ...], list[Slice]] = {}
    aside: list[Series] = []
    for file, slices in inspected:
        if isinstance(slices, str):
            aside.append(Series((file,), aside=slices))
            continue
        first = slices[0]
        own = first.is_multiframe or first.is_film or not first.series
        key = (first.series, str(file)) if own else (first.series,)
        found.setdefault(key, []).extend(slices)
    series = [Series(tuple(dict.fromkeys(s.file for s in g)), tuple(g)) for g in found.values()]
    return series + aside


def verdict(series: Series) -> Verdict:
    """Judge whether ``series`` is one volume, from its headers alone.

    Damage that only the pixels show (a broken compressed stream) is left to ``read``.
    """
    try:
        _stack(series)
    except Fault as fault:
        return Verdict(fault.reason)
    return Verdict(None)


def read(series: Series) -> Volume:
    """Return the volume ``series`` is.

    Raises:
        SeriesRefused: it is not one volume; ``reason`` says why.
    """
    try:
        stack = _stack(series)
        layout = stack.slices[0].layout
        assert layout is not None
        data = np.empty((len(stack.slices), layout.rows, layout.columns), np.float32)
        load(stack.slices, data)
    except Fault as fault:
        raise SeriesRefused(fault.reason) from None
    return Volume(data, stack.affine, stack.slices[0].modality)


def ordered(series: Series) -> tuple[Slice, ...]:
    """Return the slices in the order in which ``read`` stacks them.

    Raises:
        SeriesRefused: the series is not one volume; ``reason`` says why.
    """
    try:
        return _stack(series).slices
    except Fault as fault:
        raise SeriesRefused(fault.reason) from None


def header(series: Series) -> Header:
    """Return the shape, affine and modality of the volume ``series`` is; no pixel is read.

    Raises:
        SeriesRefused: its headers say that it is not one volume.
    """
    try:
        stack = _stack(series)
    except Fault as fault:
        raise SeriesRefused(fault.reason) from None
    layout = stack.slices[0].layout
    assert layout is not None
    shape = (len(stack.slices), layout.rows, layout.columns)
    return Header(shape, stack.affine, stack.slices[0].modality)


def read_files(files: Iterable[Path]) -> Volume:
    """Return the one volume in ``files``; localizers, captures and reports beside it are left out.

    Raises:
        SeriesRefused: there is none, there are several, or a file may be a broken part of it.
    """
    return read(the_one_in(files))


def the_one_in(files: Iterable[Path]) -> Series:
    """Return the one series of images in ``files``, judged by their headers alone.

    Raises:
        SeriesRefused: there is none, there are several, or a file may be a broken part of it.
    """
    found = scan(files)
    images = [series for series in found if series.aside is None]
    aside = [series.aside for series in found if series.aside is not None]
    if "not-dicom" in aside:
        raise SeriesRefused("not-dicom")
    if len(images) > 1:
        raise SeriesRefused("several-series")
    if not images:
        raise SeriesRefused(aside[0] if aside else "empty")
    return images[0]


def _stack(series: Series) -> _Stack:
    """Return the slices from the bottom up, and their affine; a Fault if they are no volume."""
    slices = series.slices
    if not slices:
        raise Fault(series.aside or "empty")
    for one in slices:
        if one.fault is not None:
            raise Fault(one.fault)
    _check_uniform(slices)
    layout = slices[0].layout
    assert layout is not None
    if len(slices) * layout.rows * layout.columns > MOST_VOXELS:
        raise Fault("too-large")
    return _film(slices) if slices[0].is_film else _volume(slices)


def _check_uniform(slices: tuple[Slice, ...]) -> None:
    first = slices[0]
    reasons: tuple[Reason, ...] = (*SAME, "mixed-contrasts")
    for one in slices[1:]:
        if one.same != first.same:
            pairs = zip(reasons, one.same, first.same, strict=False)
            raise Fault(next(reason for reason, a, b in pairs if a != b))
        if one.layout != first.layout:
            raise Fault("mixed-sizes")
    echoes = [s.echo_ms for s in slices if s.echo_ms is not None]
    if echoes and (len(echoes) < len(slices) or max(echoes) - min(echoes) > ECHO_TOLERANCE_MS):
        raise Fault("mixed-contrasts")


def _film(slices: tuple[Slice, ...]) -> _Stack:
    """A projection has no place in the patient: one slice, in the detector's plane."""
    spacing = slices[0].spacing_mm
    if len(slices) != 1:
        raise Fault("several-series")
    if len(spacing) != 2 or min(spacing) <= 0:
        raise Fault("bad-geometry")
    return _Stack(slices, np.diag([spacing[1], spacing[0], 1.0, 1.0]))


def _volume(slices: tuple[Slice, ...]) -> _Stack:
    across, down, normal = _directions(slices)
    positions = np.array([s.position for s in slices], np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    ordered = tuple(slices[i] for i in order)
    affine = np.eye(4)
    row_mm, column_mm = slices[0].spacing_mm
    affine[:3, 0], affine[:3, 1] = across * column_mm, down * row_mm
    affine[:3, 2] = _step(ordered, positions[order], normal)
    affine[:3, 3] = positions[order[0]]
    return _Stack(ordered, affine)


def _directions(slices: tuple[Slice, ...]) -> tuple[NDArray[np.float64], ...]:
    """Return the unit vectors along a row, along a column and across the slices."""
    for one in slices:
        if (len(one.position), len(one.orientation), len(one.spacing_mm)) != (3, 6, 2):
            raise Fault("no-position")
    numbers = [(*s.orientation, *s.position, *s.spacing_mm) for s in slices]
    if not np.isfinite(numbers).all():
        raise Fault("bad-geometry")
    cosines = np.array([s.orientation for s in slices], np.float64)
    spacings = np.array([s.spacing_mm for s in slices], np.float64)
    if np.ptp(cosines, axis=0).max() > COSINE_TOLERANCE / 10:
        raise Fault("mixed-orientations")
    if spacings.min() <= 0:
        raise Fault("bad-geometry")
    if (np.ptp(spacings, axis=0) > SPACING_TOLERANCE_SHARE * spacings[0]).any():
        raise Fault("mixed-sizes")
    across, down = cosines[0].reshape(2, 3)
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(across @ down)) > COSINE_TOLERANCE:
        raise Fault("bad-geometry")
    normal = np.cross(across, down)
    return across, down, normal / np.linalg.norm(normal)


def _step(
    slices: tuple[Slice, ...], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the vector from a slice to the next; a Fault if they are not evenly spaced."""
    if len(slices) == 1:
        thickness = slices[0].thickness_mm or 1.0
        if thickness < 0:
            raise Fault("bad-geometry")
        return normal * thickness
    heights = positions @ normal
    steps = np.diff(heights)
    typical = float(np.median(steps))
    tolerance = min(POSITION_TOLERANCE_MM, POSITION_TOLERANCE_SHARE * typical)
    if steps.min() <= min(POSITION_TOLERANCE_MM, POSITION_TOLERANCE_SHARE * steps.max()):
        raise Fault("same-position")
    _check_acquisitions(slices)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    away = positions - (positions[0] + np.arange(len(slices))[:, None] * step)
    if np.abs(away @ normal).max() > tolerance:
        multiples = steps / steps.min()
        is_gap = np.abs(multiples - np.rint(multiples)).max() < POSITION_TOLERANCE_SHARE
        raise Fault("missing-slice" if is_gap else "uneven")
    _check_straight(slices, step=step, away=away, normal=normal)
    _check_complete(slices, float(np.linalg.norm(step)))
    return np.asarray(step, np.float64)


def _check_straight(
    slices: tuple[Slice, ...],
    *,
    step: NDArray[np.float64],
    away: NDArray[np.float64],
    normal: NDArray[np.float64],
) -> None:
    if np.linalg.norm(away, axis=1).max() > POSITION_TOLERANCE_MM:
        raise Fault("off-line")
    length = float(np.linalg.norm(step))
    if np.linalg.norm(step - normal * (step @ normal)) > LEAN_TOLERANCE * length:
        raise Fault("tilted")
    told = max(abs(s.tilt_degrees or 0.0) for s in slices)
    leaning = np.degrees(np.arccos(min(1.0, float(np.abs(normal).max()))))
    if told > TILT_TOLERANCE_DEGREES and leaning < TILT_TOLERANCE_DEGREES:
        raise Fault("tilted")  # the header tells a tilt that its directions do not show


def _check_acquisitions(slices: tuple[Slice, ...]) -> None:
    """Refuse acquisitions whose slices lie between one another; side by side they may."""
    numbers = [s.acquisition for s in slices]
    runs = 1 + sum(a != b for a, b in pairwise(numbers))
    if runs > len(set(numbers)):
        raise Fault("mixed-times")


def _check_complete(slices: tuple[Slice, ...], step_mm: float) -> None:
    """Refuse a stack of which every second (third, ...) slice is gone, and the numbers say so."""
    told, numbers = slices[0].between_mm, [s.number for s in slices]
    if not told or told < 0 or None in numbers:
        return
    times = round(step_mm / told)
    gaps = {abs(int(b or 0) - int(a or 0)) for a, b in pairwise(numbers)}
    if times > 1 and abs(step_mm / told - times) < POSITION_TOLERANCE_SHARE and gaps == {times}:
        raise Fault("missing-slice")

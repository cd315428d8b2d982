"""Geometry of the report's drawings: from figures to places on a canvas, as plain values.

The template draws what stands here; nothing here knows HTML. Curves and bars have a fixed canvas,
small enough to be read on a telephone; whiskers are placed in per cent of whatever width there is.

References:
    M. Okabe, K. Ito, Color Universal Design, 2008, https://jfly.uni-koeln.de/color/: the palette.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
INK = "#1d2b36"

WIDTH = 520
LEFT = 52
LABELS = 148
TOP = 14
FOOT = 40
LINE_HEIGHT = 17
LONGEST_LABEL = 16


class Series(NamedTuple):
    """One curve: a value per round, and how it looks."""

    label: str
    points: Mapping[int, float]
    colour: str
    dash: str = ""
    is_bold: bool = False


class Tick(NamedTuple):
    """A mark on an axis: its place and what stands there."""

    at: float
    text: str


class Curve(NamedTuple):
    """A series on the canvas. A round without a figure interrupts ``path``."""

    series: Series
    path: str
    dots: tuple[tuple[float, float], ...]
    label: str
    label_y: float


class Bar(NamedTuple):
    """One rectangle of a stack."""

    x: float
    y: float
    width: float
    height: float
    colour: str


class Chart(NamedTuple):
    """Everything the template needs to draw curves or bars."""

    title: str
    spoken: str
    height: float
    right: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...] = ()
    bars: tuple[Bar, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()


class Whisker(NamedTuple):
    """A value with its interval, in per cent of the track's width."""

    at: float
    low: float
    high: float


def curves(series: Sequence[Series], *, title: str) -> Chart:
    """Place curves over rounds, each labelled at its end. Series without a point are left out."""
    drawn = [one for one in series if one.points]
    height = max(250, TOP + FOOT + LINE_HEIGHT * len(drawn))
    bottom, right = height - FOOT, WIDTH - LABELS
    rounds = sorted({x for one in drawn for x in one.points})
    values = [y for one in drawn for y in one.points.values()]
    y_values = _ticks(min(values), max(values), around=True)
    across = _scale(rounds[0], rounds[-1], start=LEFT, end=right)
    up = _scale(y_values[0], y_values[-1], start=bottom, end=TOP)
    ends = [up(one.points[max(one.points)]) for one in drawn]
    labels = _spread(ends, low=TOP, high=bottom)
    return Chart(
        title,
        spoken=f"{title}. " + "; ".join(_spoken(one) for one in drawn),
        height=height,
        right=right,
        bottom=bottom,
        x_ticks=_round_axis(rounds, across),
        y_ticks=_axis(y_values, up),
        curves=tuple(
            _curve(one, rounds=rounds, across=across, up=up, label_y=label_y)
            for one, label_y in zip(drawn, labels, strict=True)
        ),
    )


def stacks(parts: Sequence[Series], *, title: str) -> Chart:
    """Place one bar per round, the parts upon each other."""
    height, right = 250.0, float(WIDTH - 12)
    bottom = height - FOOT
    rounds = sorted({x for part in parts for x in part.points})
    totals = [sum(part.points.get(x, 0.0) for part in parts) for x in rounds]
    y_values = _ticks(0.0, max(totals) or 1.0)
    slot = (right - LEFT) / len(rounds)
    centres = {x: LEFT + slot * (i + 0.5) for i, x in enumerate(rounds)}
    up = _scale(y_values[0], y_values[-1], start=bottom, end=TOP)
    return Chart(
        title,
        spoken=f"{title}. " + "; ".join(_spoken(part) for part in parts),
        height=height,
        right=right,
        bottom=bottom,
        x_ticks=_round_axis(rounds, lambda x: centres[int(x)]),
        y_ticks=_axis(y_values, up),
        bars=tuple(_bars(parts, centres=centres, up=up, width=min(28.0, slot * 0.72))),
        keys=tuple((part.label, part.colour) for part in parts),
    )


def track(bounds: Sequence[float]) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """Return the scale in per cent that holds ``bounds``, and its ticks."""
    values = _ticks(min(bounds), max(bounds), most=7, around=True)
    across = _scale(values[0], values[-1], start=3.0, end=97.0)
    return across, _axis(values, across)


def whisker(
    value: float, bounds: tuple[float, float] | None, across: Callable[[float], float]
) -> Whisker:
    """Place a value and its interval on a track; without an interval it is a point."""
    low, high = bounds or (value, value)
    return Whisker(across(value), across(low), across(high))


def shorten(label: str) -> str:
    """Cut the middle out of a label that would not fit beside a curve: endings tell apart."""
    if len(label) <= LONGEST_LABEL:
        return label
    half = LONGEST_LABEL // 2
    return f"{label[:half]}\N{HORIZONTAL ELLIPSIS}{label[half + 1 - LONGEST_LABEL :]}"


def site_style(index: int) -> tuple[str, str]:
    """Return a hospital's colour and dash; both together differ for 24 hospitals."""
    return PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]


def _curve(
    series: Series,
    *,
    rounds: Sequence[int],
    across: Callable[[float], float],
    up: Callable[[float], float],
    label_y: float,
) -> Curve:
    path, pen = [], "M"
    for x in rounds:
        if x not in series.points:
            pen = "M"
            continue
        path.append(f"{pen}{across(x):.1f} {up(series.points[x]):.1f}")
        pen = "L"
    dots = tuple((across(x), up(y)) for x, y in sorted(series.points.items()))
    return Curve(series, " ".join(path), dots, shorten(series.label), label_y)


def _bars(
    parts: Sequence[Series],
    *,
    centres: Mapping[int, float],
    up: Callable[[float], float],
    width: float,
) -> list[Bar]:
    bars = []
    for x, centre in centres.items():
        below = 0.0
        for part in parts:
            above = below + part.points.get(x, 0.0)
            tall = up(below) - up(above)
            bars.append(Bar(centre - width / 2, up(above), width, tall, part.colour))
            below = above
    return bars


def _scale(low: float, high: float, *, start: float, end: float) -> Callable[[float], float]:
    """Return the line from ``low..high`` to ``start..end``; a single value goes to the middle."""
    if high == low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, *, most: int = 5, around: bool = False) -> list[float]:
    """Return round values that enclose ``low..high``; ``around`` lets the axis start above 0."""
    if not around:
        low = min(low, 0.0)
    if high == low:
        low, high = low - 0.05, high + 0.05
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _axis(values: Sequence[float], place: Callable[[float], float]) -> tuple[Tick, ...]:
    texts = [f"{value:.10g}" for value in values]
    places = max(len(text.partition(".")[2]) for text in texts)
    return tuple(Tick(place(value), f"{value:.{places}f}") for value in values)


def _round_axis(rounds: Sequence[int], place: Callable[[float], float]) -> tuple[Tick, ...]:
    every = max(1, math.ceil(len(rounds) / 12))
    return tuple(Tick(place(x), str(x)) for x in rounds[::every])


def _spread(wanted: Sequence[float], *, low: float, high: float) -> list[float]:
    """Move labels apart, in their order, so that none covers another or leaves ``low..high``."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    previous = -math.inf
    for i in order:
        placed[i] = previous = max(wanted[i], previous + LINE_HEIGHT, low)
    following = high + LINE_HEIGHT
    for i in reversed(order):
        placed[i] = following = min(placed[i], following - LINE_HEIGHT)
    return placed


def _spoken(series: Series) -> str:
    first, last = min(series.points), max(series.points)
    return (
        f"{series.label}: {series.points[first]:.3g} in round {first},"
        f" {series.points[last]:.3g} in round {last}"
    )

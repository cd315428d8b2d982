"""What a metric is called, what it means to a lay reader, and how figures are written.

Used for the page and for the terminal, so that a figure looks the same in both. Everything here is
a pure function of values that stand in the report.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal
from typing import Literal, NamedTuple

Better = Literal["higher", "lower", "unknown"]

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


class Measure(NamedTuple):
    """A metric for people: its label, its unit, which direction is better, what it says."""

    label: str
    unit: str
    better: Better
    meaning: str


#: Metrics by name; ``dice_liver`` is found under ``dice`` and labelled ``Dice, liver``.
MEASURES: dict[str, Measure] = {
    "auc": Measure(
        "AUC",
        "",
        "higher",
        "How often the model ranks a patient with the finding above one without:"
        " 0.5 is a coin toss, 1 is always.",
    ),
    "accuracy": Measure("Accuracy", "", "higher", "The share of all cases it gets right."),
    "sensitivity": Measure(
        "Sensitivity", "", "higher", "Of the cases with the finding, the share it detects."
    ),
    "specificity": Measure(
        "Specificity", "", "higher", "Of the cases without the finding, the share it clears."
    ),
    "adjusted_rand": Measure(
        "Adjusted Rand index",
        "",
        "higher",
        "How well clusters and diagnoses agree: 0 is chance, 1 is exactly.",
    ),
    "silhouette": Measure(
        "Silhouette",
        "",
        "higher",
        "How much nearer pictures lie to their own cluster than to the next: from -1 to 1.",
    ),
    "ssim": Measure(
        "SSIM",
        "",
        "higher",
        "How alike a picture and what the model makes of it look: 1 is the same.",
    ),
    "probe_auc": Measure(
        "AUC of a linear probe",
        "",
        "higher",
        "How well a linear classifier tells the classes from the model's numbers alone.",
    ),
    "coverage": Measure(
        "Coverage", "", "higher", "The share of real pictures that have a made one near by."
    ),
    "frechet": Measure(
        "Fr\u00e9chet distance",
        "",
        "lower",
        "How far the made pictures as a whole lie from the real ones; less is better.",
    ),
    "auc_synthetic": Measure(
        "AUC from made pictures",
        "",
        "higher",
        "How well a classifier trained on made pictures alone ranks real patients.",
    ),
    "found": Measure(
        "Found", "", "higher", "The share of images in which it ends near enough to the landmark."
    ),
    "distance_mm": Measure(
        "Distance", "mm", "lower", "How far from the landmark it ends; less is better."
    ),
    "map50": Measure(
        "Average precision at half overlap",
        "",
        "higher",
        "How well boxes are found: how many of them, and how few that are none, at any certainty.",
    ),
    "froc": Measure(
        "FROC score",
        "",
        "higher",
        "The share of boxes found where 1/8 to 8 false ones per picture are put up with.",
    ),
    "dice": Measure(
        "Dice",
        "",
        "higher",
        "How well the outline drawn by the model overlaps the expert's: 0 not at all, 1 exactly.",
    ),
    "hd95": Measure(
        "Hausdorff distance (95th percentile)",
        "mm",
        "lower",
        "How far the model's outline strays from the expert's, but for the worst 5 % of points;"
        " less is better.",
    ),
    "psnr": Measure(
        "Peak signal-to-noise ratio",
        "dB",
        "higher",
        "How little the image differs from the true one, voxel by voxel: 3 dB more is half the"
        " squared error.",
    ),
    "cnr": Measure(
        "Contrast-to-noise ratio",
        "",
        "higher",
        "How far apart bright and dark parts are, compared with how uneven each is in itself.",
    ),
}


def measure(name: str) -> Measure:
    """Return what is known about a metric; for an unknown one, its name and no judgement."""
    if name in MEASURES:
        return MEASURES[name]
    base, _, part = name.partition("_")
    part = part.replace("_", " ")
    if part and base in MEASURES:
        known = MEASURES[base]
        return known._replace(label=f"{known.label}, {part}")
    label = name.replace("_", " ")
    meaning = "A measure of this study; which direction is better is not known here."
    return Measure(label[:1].upper() + label[1:], "", "unknown", meaning)


def figure(name: str, value: float, *, unit: bool = True) -> str:
    """Write a metric's value: shares to three decimals, millimetres to one."""
    known = measure(name)
    text = f"{value:.{decimals(name)}f}"
    return f"{text} {known.unit}" if unit and known.unit else text


def interval(name: str, bounds: tuple[float, float]) -> str:
    """Write an interval as ``0.871 to 0.942``."""
    low, high = (figure(name, bound, unit=False) for bound in bounds)
    return f"{low} to {high}"


def signed(name: str, value: float) -> str:
    """Write a difference with its sign; nothing that rounds to zero has one."""
    text = figure(name, abs(value))
    if round(abs(value), decimals(name)) == 0:
        return f"±{text}"
    return f"{'+' if value > 0 else MINUS}{text}"


def decimals(name: str) -> int:
    """Return how many decimals a metric is written with."""
    return 1 if measure(name).unit else 3


def upward(value: float, *, places: int = 4) -> str:
    """Write an epsilon rounded up, so that the page never promises more than was shown."""
    step = Decimal(1).scaleb(-places)
    return format(Decimal(repr(value)).quantize(step, rounding=ROUND_CEILING), "f")


def plain(value: float) -> str:
    """Write a small number as people do: ``1e-5``, ``0.0005``, ``1.25``."""
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")


def count(value: int) -> str:
    """Write a whole number with a thin space between thousands."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(value: float) -> str:
    """Write bytes in the decimal unit that suits them."""
    factor, unit = size_unit(value)
    return f"{value / factor:.0f} {unit}" if unit == "B" else f"{value / factor:.1f} {unit}"


def size_unit(largest: float) -> tuple[float, str]:
    """Return the factor and the name of the unit that suits the largest of some sizes."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= factor:
            return factor, unit
    return 1.0, "B"


def duration(seconds: float) -> str:
    """Write a duration in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def duration_unit(largest: float) -> tuple[float, str]:
    """Return the factor and the name of the unit that suits the largest of some durations."""
    for factor, unit in ((3600.0, "h"), (60.0, "min")):
        if largest >= 2 * factor:
            return factor, unit
    return 1.0, "s"

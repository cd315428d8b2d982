"""Figures in words, for doctors and for lay people; each function is pure.

A share of certainty says how the model divides its certainty among its classes. Unless a release
shows that it is calibrated it is no probability of disease, and no word here says that it is one.
"""

from __future__ import annotations

from math import ceil

from client.display.prediction import Classified, Outlined, Region
from shared_models.contracts import PrivacyStatement
from shared_models.terminal import upward

DASH = "\N{EN DASH}"
#: From this share on: how the model's certainty is told to a doctor, and to a lay reader.
CERTAINTY = (
    (0.95, "strongly favours", "was very sure of its choice"),
    (0.80, "favours", "was fairly sure of its choice"),
    (0.60, "leans towards", "leaned towards this, but was not sure"),
    (0.0, "does not decide; first comes", "could not really decide"),
)
LABELS = {
    "auc": (
        "AUC",
        "how often it ranks a patient with the finding above one without; 0.5 is chance",
    ),
    "accuracy": ("Accuracy", "the share of cases it gets right"),
    "sensitivity": ("Sensitivity", "of those with the finding, the share it detects"),
    "specificity": ("Specificity", "of those without the finding, the share it clears"),
    "dice": ("Dice", "overlap with the expert's outline; 0 is none, 1 is exact"),
    "hd95": ("Hausdorff distance, 95 %", "how far its outline strays from the expert's"),
    "ece": ("Calibration error", "how far its certainty is from how often it is right"),
}
SCANS = {
    "CT": "CT scan",
    "MR": "MRI scan",
    "PT": "PET scan",
    "CR": "X-ray picture",
    "DX": "X-ray picture",
}
#: Things in a kitchen, and how many ml they hold.
HOUSEHOLD = ((5.0, "teaspoon"), (15.0, "tablespoon"), (250.0, "cup"), (1000.0, "large milk bottle"))


def certainty(share: float) -> str:
    """Say to a doctor how a model stands to the class it favours."""
    return next(words for least, words, _ in CERTAINTY if share >= least)


def certainty_for_patients(share: float) -> str:
    """Say to a lay reader how sure the program was."""
    return next(words for least, _, words in CERTAINTY if share >= least)


def in_ten(share: float) -> str:
    """Write a share as people count: ``about 9 in 10``."""
    if share >= 0.95:
        return "nearly all"
    if share < 0.05:
        return "almost none"
    return f"about {round(share * 10)} in 10"


def percent(share: float) -> str:
    """Write a share of certainty; what is not certain never becomes 100 % or 0 % by rounding."""
    if 0.995 <= share < 1:
        return "> 99 %"
    if 0 < share < 0.005:
        return "< 1 %"
    return f"{100 * share:.0f} %"


def label(metric: str) -> tuple[str, str]:
    """Return what a metric is called and what it means; of an unknown one, its name."""
    if metric in LABELS:
        return LABELS[metric]
    base, _, part = metric.partition("_")
    if part and base in LABELS:
        name, meaning = LABELS[base]
        return f"{name}, {part.replace('_', ' ')}", meaning
    text = metric.replace("_", " ")
    return text[:1].upper() + text[1:], "a measure of this study"


def figure(metric: str, value: float) -> str:
    """Write a metric's value: distances to one decimal, shares to three."""
    return f"{value:.1f} mm" if metric.startswith("hd95") else f"{value:.3f}"


def between(metric: str, bounds: tuple[float, float]) -> str:
    """Write an interval."""
    low, high = (figure(metric, bound).removesuffix(" mm") for bound in bounds)
    return f"{low} to {high}"


def volume(ml: float) -> str:
    """Write a volume for a doctor."""
    return f"{ml:.0f} ml" if ml >= 100 else f"{ml:.1f} ml" if ml >= 1 else f"{ml:.2g} ml"


def volume_for_patients(ml: float) -> str:
    """Write a volume as so many of a thing in a kitchen."""
    if ml < 2.5:
        return "less than half a teaspoon"
    size, thing = next((pair for pair in HOUSEHOLD if ml <= 3 * pair[0]), HOUSEHOLD[-1])
    number = max(1, round(ml / size))
    return (
        f"about as much as {'one' if number == 1 else number} {thing}{'' if number == 1 else 's'}"
    )


def overlap(dice: float) -> str:
    """Say to a lay reader how well a program's marks cover an expert's."""
    for least, text in (
        (0.85, "its marks were very close to those of an expert"),
        (0.7, "its marks were quite close to those of an expert"),
        (0.5, "its marks were only roughly like those of an expert"),
    ):
        if dice >= least:
            return text
    return "its marks were often not like those of an expert"


def answer(found: Outlined | Classified) -> list[str]:
    """Return an answer's lines for a terminal."""
    if isinstance(found, Classified):
        first, *others = found.classes
        rest = ", ".join(f"{one.name} {percent(one.probability)}" for one in others)
        return [
            f"{certainty(first.probability)} {first.name}: {percent(first.probability)}; {rest}"
        ]
    return [f"{region.name}: {measured(region)}" for region in found.regions]


def measured(region: Region) -> str:
    """Say how large a region is, in the unit that is known."""
    if not region.num_voxels:
        return "none found"
    if region.volume_ml is not None:
        return volume(region.volume_ml)
    if region.area_cm2 is not None:
        return f"{region.area_cm2:.1f} cm\N{SUPERSCRIPT TWO}"
    return f"{100 * region.share_of_image:.1f} % of the image"


def scan(modality: str) -> str:
    """Return what a lay reader calls an image of a modality."""
    return SCANS.get(modality, "picture")


def date(text: str) -> str:
    """Write a DICOM date as 2019-03-01; what is none stays as it is."""
    is_date = len(text) == 8 and text.isdigit()
    return f"{text[:4]}-{text[4:6]}-{text[6:]}" if is_date else text


def privacy(statement: PrivacyStatement) -> str:
    """Say what a privacy statement promises, never without unit, delta and accountant."""
    return (
        f"epsilon {upward(statement.epsilon, places=4)} per {statement.unit} at delta "
        f"{statement.delta:g} ({statement.accountant})"
    )


def count(value: int) -> str:
    """Write a whole number with a thin space between thousands."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def bar(share: float) -> int:
    """Return the height of a bar, out of 40; what is not nothing is seen."""
    return max(1, ceil(40 * share))

"""From a fingerprint to imaging steps, each with its reason: nnU-Net's rules, over counts.

A pure function of the sums of all sites' histograms and the draft they were asked under. What it
gives is a proposal, to be read by people and pasted into a plan that every site approves anew.

Guarantees:
    What is proposed depends on the sums and the draft only.
    A value that lies outside the range asked for is refused, never guessed.
    The proposed size can be halved as often as the net halves it.

Design: noise fills empty cells, and in sums over many of them it outweighs the patients in a tail.
So a share is looked for only in the one stretch of cells that holds patients: that which gains most
by Akaike's criterion over taking its cells for empty ones (on real extents the 95th percentile is
then within one cell nine times in ten, where it was one in five). In it sums from one end are made
to rise, by the mean of the least rising line above and the greatest below.

References:
    Isensee et al. 2021, nnU-Net, https://doi.org/10.1038/s41592-020-01008-z, methods and
    supplementary note 2: the median spacing, the tenth percentile along an axis over three times as
    coarse as the others, intensities of CT clipped to their 0.5 and 99.5 percentiles, z-scores
    elsewhere. Akaike 1974, A new look at the statistical model identification.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from shared_models.contracts import Fingerprint
from shared_models.errors import ConsiliaError
from shared_models.fingerprint import Layout, axes_of, layouts, sensitivity, terms_of
from shared_models.plan import Choice, StudyPlan

#: An axis this many times coarser than the others, and with as many times fewer voxels, is not
#: resampled to its median (nnU-Net's ANISO_THRESHOLD).
ANISOTROPY = 3.0
#: What the size along each axis has to be a multiple of, by net; others' are not known here.
DIVISORS: dict[str, Callable[[dict[str, Any]], int]] = {
    "unet": lambda params: math.prod(int(n) for n in params.get("strides", (2, 2))),
    "densenet": lambda params: 2 ** (1 + len(params.get("block_config", (2, 2, 2)))),
}
USUAL_DIVISOR = 16


class Reasoned(NamedTuple):
    """One step to be pasted in a plan, and why it is what it is, in sentences."""

    step: Choice
    why: tuple[str, ...]


class _Along(NamedTuple):
    """One axis: the target spacing, if it was asked, and why."""

    axis: str
    spacing_mm: float | None
    why: str


def propose(
    total: Fingerprint, draft: StudyPlan, *, num_sites: int = 1, percentile: float = 95.0
) -> list[Reasoned]:
    """Return the imaging steps that follow from ``total``, the draft's own steps first.

    ``num_sites`` is how many sites' histograms, and noise, it is the sum of. ``percentile`` is of
    the patients' extents: the size that is cut or filled up to holds so many.

    Raises:
        ConsiliaError: if what is needed lies outside the range that was asked for.
        ValueError: if ``percentile`` is none, or ``total`` is not of the draft's histograms.
    """
    if not 0 < percentile < 100:
        raise ValueError(f"expected a percentile between 0 and 100, got {percentile}")
    read = _reader(total, draft, deviation(draft, num_sites=num_sites))
    found = [
        Reasoned(step, ("the draft's own; the fingerprint was taken after it",))
        for step in draft.imaging
    ]
    along = _spacings(read, draft)
    if all(one.spacing_mm is not None for one in along):
        spacing = tuple(one.spacing_mm or 0.0 for one in along)
        step = Choice(name="resample", params={"spacing_mm": spacing})
        found.append(Reasoned(step, tuple(one.why for one in along)))
    found.append(_normalization(read, draft))
    sized = _size(read, draft, along, percentile=percentile)
    return found if sized is None else [*found, sized]


def to_toml(proposal: Sequence[Reasoned]) -> str:
    """Return the steps as TOML tables, each under its reasons as comments."""
    tables = []
    for step, why in proposal:
        lines = [*(f"# {sentence}" for sentence in why), "[[imaging]]", f'name = "{step.name}"']
        # numbers, lists and texts are written in TOML as in JSON
        given = [f"{name} = {json.dumps(value)}" for name, value in step.params.items()]
        lines += [f"params = {{ {', '.join(given)} }}"] if given else []
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def deviation(draft: StudyPlan, *, num_sites: int) -> float:
    """Return the standard deviation of the noise in each cell of a sum over ``num_sites``."""
    return (terms_of(draft).noise_multiplier or 0.0) * sensitivity(draft) * math.sqrt(num_sites)


def occupied(counts: Sequence[float], *, deviation: float) -> slice:
    """Return the stretch of cells that holds patients: what of ``counts`` noise does not explain.

    A cell taken for empty costs the square of its count over twice the noise's variance, one taken
    for what it shows costs 1; the stretch with the greatest gain is the answer (Kadane's sums).
    """
    if deviation == 0:
        return slice(0, len(counts))
    found, best, gain, start = slice(0, len(counts)), 0.0, 0.0, 0
    for cell, count in enumerate(counts):
        if gain <= 0:
            gain, start = 0.0, cell
        gain += max(count / deviation, 0.0) ** 2 / 2 - 1
        if gain > best:
            best, found = gain, slice(start, cell + 1)
    return found


def cell_at(counts: Sequence[float], share: float, *, deviation: float = 0.0) -> int:
    """Return the first cell up to which ``share`` of the counts are, whatever the noise."""
    where = occupied(counts, deviation=deviation)
    rising = np.cumsum(np.asarray(counts[where], np.float64))
    upper = np.maximum.accumulate(rising)
    lower = np.minimum.accumulate(rising[::-1])[::-1]
    whole = (upper + lower) / 2
    return int(where.start + np.argmax(whole >= share * whole[-1] - 1e-9))


class _Read(NamedTuple):
    layout: Layout
    counts: tuple[float, ...]
    deviation: float

    def at(self, share: float, *, table: str) -> float:
        cell = cell_at(self.counts, share, deviation=self.deviation)
        if not 0 < cell < self.layout.num_cells - 1:
            low, high = self.layout.edges[0], self.layout.edges[-1]
            raise ConsiliaError(
                f"fingerprint.{table}: the patient at {100 * share:g} % lies outside {low:g} to "
                f"{high:g}, which were asked for; propose a fingerprint with a wider range"
            )
        return self.layout.middle(cell)


def _reader(total: Fingerprint, draft: StudyPlan, deviation: float) -> dict[str, _Read]:
    asked = layouts(draft)
    told = [(one.name, len(one.counts)) for one in total.histograms]
    if told != [(layout.name, layout.num_cells) for layout in asked]:
        raise ValueError("expected the histograms that the draft asks for")
    return {
        layout.name: _Read(layout, one.counts, deviation)
        for layout, one in zip(asked, total.histograms, strict=True)
    }


def _spacings(read: dict[str, _Read], draft: StudyPlan) -> list[_Along]:
    """Return each axis's target spacing: the median, but along a much coarser axis."""
    axes = axes_of(draft)
    if terms_of(draft).spacing is None:
        return [_Along(axis, None, "") for axis in axes]
    medians = {axis: _rounded(read[f"spacing-{axis}"].at(0.5, table="spacing")) for axis in axes}
    found = [
        _Along(axis, mm, f"{axis}: {mm:g} mm, the median spacing") for axis, mm in medians.items()
    ]
    coarse = max(axes, key=lambda axis: medians[axis])
    others = [axis for axis in axes if axis != coarse]
    widest = max(medians[axis] for axis in others)
    if len(axes) < 3 or medians[coarse] <= ANISOTROPY * widest:
        return found
    voxels = _voxels(read, draft, medians)
    if voxels and voxels[coarse] * ANISOTROPY >= min(voxels[axis] for axis in others):
        return found
    tenth = max(_rounded(read[f"spacing-{coarse}"].at(0.1, table="spacing")), widest)
    why = (
        f"{coarse}: {tenth:g} mm, the 10th percentile: its median of {medians[coarse]:g} mm is "
        f"over {ANISOTROPY:g} times the other axes'"
    )
    return [_Along(coarse, tenth, why) if one.axis == coarse else one for one in found]


def _voxels(
    read: dict[str, _Read], draft: StudyPlan, spacing_mm: dict[str, float]
) -> dict[str, float]:
    """Return the median number of voxels along each axis, as far as it was asked."""
    terms = terms_of(draft)
    if terms.size is not None:
        return {axis: read[f"size-{axis}"].at(0.5, table="size") for axis in spacing_mm}
    if terms.extent is not None:
        return {
            axis: read[f"extent-{axis}"].at(0.5, table="extent") / mm
            for axis, mm in spacing_mm.items()
        }
    return {}


def _size(
    read: dict[str, _Read], draft: StudyPlan, along: list[_Along], *, percentile: float
) -> Reasoned | None:
    """Return the step that makes all images one size, if there is anything to go by."""
    terms, share = terms_of(draft), percentile / 100
    has_spacing = terms.spacing is not None
    if (terms.extent if has_spacing else terms.size) is None:
        return None
    divisor, why_divisor = _divisor(draft)
    size, why = list[int](), list[str]()
    for axis, mm, _ in along:
        if mm is not None:
            extent = read[f"extent-{axis}"].at(share, table="extent")
            voxels, of = extent / mm, f"{extent:.4g} mm"
        else:
            voxels = read[f"size-{axis}"].at(share, table="size")
            of = f"{voxels:.4g} voxels"
        size.append(max(1, math.ceil(voxels / divisor - 1e-9)) * divisor)
        why.append(f"{axis}: {size[-1]}, for {of}, the {percentile:g}th percentile of patients")
    step = Choice(name="crop-or-pad", params={"size": tuple(size)})
    return Reasoned(step, (*why, f"rounded up to multiples of {divisor}, {why_divisor}"))


def _divisor(draft: StudyPlan) -> tuple[int, str]:
    known = DIVISORS.get(draft.net.name)
    if known is None:
        return USUAL_DIVISOR, f"the usual ones: what {draft.net.name} needs is not known here"
    return known(dict(draft.net.params)), f"which {draft.net.name} halves without a rest"


def _normalization(read: dict[str, _Read], draft: StudyPlan) -> Reasoned:
    """Return a window over agreed units for CT, and a z-score of each image elsewhere."""
    terms = terms_of(draft)
    z_score = Choice(name="standardize")
    if not terms.modalities:
        why = "no modality was asked for: each image's own mean and deviation"
        return Reasoned(z_score, (why,))
    layout, counts, _ = read["modality"]
    most = max(range(len(counts)), key=lambda cell: counts[cell])
    name, share = layout.names[most], max(0.0, counts[most]) / max(1.0, sum(counts))
    of = f"most images are {name} ({100 * min(1.0, share):.0f} %)"
    if name != "CT":
        return Reasoned(z_score, (f"{of}: each image's own mean and deviation",))
    asked = terms.intensity
    if asked is None or len(asked.percentiles) < 2:
        why = "but no low and high percentile was asked for: each image's own mean and deviation"
        return Reasoned(z_score, (of, why))
    low = read["percentile-0"].at(0.5, table="intensity")
    high = read[f"percentile-{len(asked.percentiles) - 1}"].at(0.5, table="intensity")
    if not low < high:
        raise ConsiliaError(
            "fingerprint.intensity: the low and the high percentile lie in one cell; propose a "
            "fingerprint with a narrower range or more cells"
        )
    bounds = f"{asked.percentiles[0]:g} and {asked.percentiles[-1]:g} percentiles"
    step = Choice(name="window", params={"low": round(low), "high": round(high)})
    return Reasoned(step, (f"{of}: HU between the median patient's {bounds}",))


def _rounded(value: float) -> float:
    """Return ``value`` with three digits that count: a cell is no finer."""
    return float(f"{value:.3g}")

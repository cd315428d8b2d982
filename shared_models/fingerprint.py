"""The federated fingerprint: what a plan may ask about images before anything is trained.

A plan with a table ``[fingerprint]`` asks every site for histograms of counts over its training
patients, in cells that stand in the plan, and for nothing else. From their sums the coordinator
proposes geometry and normalization (``server.geometry``), which is nnU-Net's idea; the plan that
trains is another plan, and is approved by itself.

Each patient is counted once in each histogram: by one image, or by whether a class is in its label
map. So the histograms of two cohorts of which one has a patient more differ by one count in each,
and the L2 sensitivity of all of them together is the square root of their number.

Under privacy terms Gaussian noise of that sensitivity is added to every cell, and charged. Without,
nothing here is differential privacy: counts are *gathered* instead. From the first cell to the last
small counts are carried on until ``min_cell`` patients are together, and told where they are; what
is left over at the end is told with those before. A count told is that of its cell and of the empty
ones beside it together.

Guarantees:
    Adding or removing one patient changes all histograms together by the sensitivity, never more.
    No count from one to min_cell less one is told, and none can be worked out from what is told.
    Gathering moves fewer than min_cell patients past the end of any cell.
    Every patient is counted exactly once in each histogram, whatever its images are like.

Design: gathering in place of blank cells, because the number of patients is told: a blank cell
would be what the others lack of it, and blanking more to hide that leaves a small hospital with
nothing to tell. Each histogram is protected by itself; what several of them tell together, or the
fingerprints of two plans, is what noise is for.

References:
    Isensee et al. 2021, nnU-Net: a self-configuring method for deep learning-based biomedical image
    segmentation, https://doi.org/10.1038/s41592-020-01008-z. Dwork and Roth 2014, The algorithmic
    foundations of differential privacy, section 3.5.1 (histograms) and appendix A (Gaussian noise).
    Hundepool et al. 2012, Statistical disclosure control, chapter 4 (suppression and its attacks).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from shared_models.contracts import Contract, Fingerprint, Histogram, Name, Positive, PrivacyEvent

if TYPE_CHECKING:
    from shared_models.plan import StudyPlan

MOST_CELLS = 64
MOST_HISTOGRAMS = 40
#: A cell of millimetres or voxels is at least this many times as wide as the one before it, one of
#: intensity at least this wide, in HU or grey levels: finer ones tell patients apart, not images.
LEAST_RATIO = 1.05
LEAST_WIDTH = 1.0
#: What a fingerprint may be taken after: steps that turn and cut. Others would tell of themselves.
STEPS_BEFORE = ("orient", "crop-box", "crop-foreground", "crop-lungs")
OTHER = "other"

NumCells = Annotated[int, Field(ge=2, le=MOST_CELLS)]
Percents = Annotated[
    tuple[Annotated[float, Field(ge=0, le=100)], ...], Field(min_length=1, max_length=5)
]


class LogScale(Contract):
    """Cells from ``low`` to ``high``, each as many times as wide as the one before it."""

    low: Positive
    high: Positive
    num_cells: NumCells

    @model_validator(mode="after")
    def _check_that_cells_are_wide(self) -> Self:
        if not self.low < self.high:
            raise ValueError("expected low under high")
        if (self.high / self.low) ** (1 / self.num_cells) < LEAST_RATIO:
            raise ValueError(
                f"expected cells each at least {LEAST_RATIO:g} times the one before, got finer "
                "ones; ask for fewer, or for a wider range"
            )
        return self


class IntensityTerms(Contract):
    """Cells of equal width from ``low`` to ``high``, in HU or grey levels, and what is counted.

    Of each patient's image the values at ``percentiles`` are counted, each in a histogram of its
    own: of all voxels, or of those that the label map marks (``foreground``; of all where it marks
    none), as nnU-Net does.
    """

    low: float
    high: float
    num_cells: NumCells
    percentiles: Percents = (0.5, 50.0, 99.5)
    within: Literal["image", "foreground"] = "image"

    @model_validator(mode="after")
    def _check_that_cells_are_wide(self) -> Self:
        if not self.low < self.high:
            raise ValueError("expected low under high")
        if (self.high - self.low) / self.num_cells < LEAST_WIDTH:
            raise ValueError(
                f"expected cells at least {LEAST_WIDTH:g} wide, got finer ones; ask for fewer, or "
                "for a wider range"
            )
        if any(a >= b for a, b in zip(self.percentiles, self.percentiles[1:], strict=False)):
            raise ValueError("expected rising percentiles")
        return self


class FingerprintTerms(Contract):
    """What a fingerprint asks; each part may be left out, and fewer histograms mean less noise.

    ``spacing`` (mm), ``extent`` (mm) and ``size`` (voxels) are asked along (z, y, x), or (y, x) for
    a two-dimensional net, after the plan's imaging steps. ``modalities`` are counted by name, all
    others as one. ``classes``: ``label`` counts the class of the patient's image, ``present`` for
    each class in how many patients' label maps it is. ``noise_multiplier`` is the noise's standard
    deviation over the sensitivity; it stands there under privacy terms and only then.
    ``min_cell`` is for plans without: a site's own, if larger, counts.
    """

    spacing: LogScale | None = None
    extent: LogScale | None = None
    size: LogScale | None = None
    intensity: IntensityTerms | None = None
    modalities: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Z]{2,4}$")], ...], Field(max_length=16)
    ] = ()
    classes: Literal["none", "label", "present"] = "none"
    min_cell: Annotated[int, Field(ge=3, le=10_000)] = 5
    noise_multiplier: Positive | None = None


class Layout(NamedTuple):
    """One histogram's cells: ``edges`` between them, or ``names`` of them.

    With edges there is a cell below the first and one from the last on.
    """

    name: Name
    edges: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    is_log: bool = False

    @property
    def num_cells(self) -> int:
        """How many cells there are."""
        return len(self.names) or len(self.edges) + 1

    def cell_of(self, value: float) -> int:
        """Return the cell that holds ``value``; with names, ``value`` is the cell."""
        return int(value) if self.names else bisect_right(self.edges, value)

    def middle(self, cell: int) -> float:
        """Return the middle of a cell between two edges, by the scale's own measure.

        Raises:
            ValueError: if the cell has no edge on one side.
        """
        if not 0 < cell < len(self.edges):
            raise ValueError(f"expected a cell from 1 to {len(self.edges) - 1}, got {cell}")
        low, high = self.edges[cell - 1], self.edges[cell]
        return math.sqrt(low * high) if self.is_log else (low + high) / 2


def axes_of(plan: StudyPlan) -> tuple[str, ...]:
    """Return the axes whose geometry is asked: those of the plan's net."""
    return ("z", "y", "x") if str(plan.net.params.get("spatial_dims", 2)) == "3" else ("y", "x")


def terms_of(plan: StudyPlan) -> FingerprintTerms:
    """Return what the plan asks of a fingerprint.

    Raises:
        ValueError: if it asks for none.
    """
    if plan.fingerprint is None:
        raise ValueError("expected a plan with a fingerprint")
    return plan.fingerprint


def layouts(plan: StudyPlan) -> tuple[Layout, ...]:
    """Return the histograms the plan asks for, in the order in which they travel."""
    terms, found = terms_of(plan), list[Layout]()
    for name in ("spacing", "extent", "size"):
        scale: LogScale | None = getattr(terms, name)
        if scale is not None:
            edges = _edges(scale)
            found += [Layout(f"{name}-{axis}", edges, is_log=True) for axis in axes_of(plan)]
    if (asked := terms.intensity) is not None:
        width = (asked.high - asked.low) / asked.num_cells
        edges = tuple(asked.low + n * width for n in range(asked.num_cells + 1))
        found += [Layout(f"percentile-{n}", edges) for n in range(len(asked.percentiles))]
    if terms.modalities:
        found.append(Layout("modality", names=(*terms.modalities, OTHER)))
    classes = _classes(plan)
    if terms.classes == "label" and classes:
        found.append(Layout("class", names=classes))
    if terms.classes == "present":
        found += [
            Layout(f"class-{n}", names=("absent", "present")) for n in range(1, 1 + len(classes))
        ]
    return tuple(found)


def sensitivity(plan: StudyPlan) -> float:
    """Return by how much one patient changes all histograms together, in L2, rounded up.

    One count in each of n histograms: the square root of n.
    """
    number = len(layouts(plan))
    root = math.sqrt(number)
    return root if Fraction(root) ** 2 >= number else math.nextafter(root, math.inf)


def event_of_fingerprint(plan: StudyPlan) -> PrivacyEvent:
    """Return what telling the fingerprint does to a cohort: one step in which everybody is.

    Raises:
        ValueError: if the plan's fingerprint has no noise.
    """
    noise_multiplier = terms_of(plan).noise_multiplier
    if noise_multiplier is None:
        raise ValueError("expected a fingerprint with noise")
    return PrivacyEvent(
        sampler="all",
        purpose="fingerprint",
        sample_rate=1.0,
        noise_multiplier=noise_multiplier,
        max_grad_norm=sensitivity(plan),
        images_per_patient=1,
        steps=1,
    )


def objections(plan: StudyPlan) -> Iterator[str]:
    """Yield what is wrong with what a plan asks of a fingerprint, each with its cure."""
    if plan.fingerprint is None:
        return
    terms = plan.fingerprint
    number = len(layouts(plan))
    if not number:
        yield "fingerprint: it asks for nothing; name spacing, extent, size, intensity or classes"
    if number > MOST_HISTOGRAMS:
        yield f"fingerprint: expected at most {MOST_HISTOGRAMS} histograms, got {number}"
    if plan.privacy is not None and terms.noise_multiplier is None:
        yield "fingerprint.noise_multiplier: the plan is private; say how much noise"
    if plan.privacy is None and terms.noise_multiplier is not None:
        yield (
            "fingerprint.noise_multiplier: noise is charged under privacy terms; add a [privacy] "
            "table, or leave the noise out"
        )
    if terms.classes != "none" and len(_classes(plan)) < 1:
        yield "fingerprint.classes: the plan's task names no classes; leave it out"
    names = (*terms.modalities, OTHER)
    if len(set(names)) != len(names):
        yield "fingerprint.modalities: expected each modality once"
    for number, step in enumerate(plan.imaging):
        if step.name not in STEPS_BEFORE:
            yield (
                f"imaging.{number}: a fingerprint is taken after steps that turn or cut "
                f"({', '.join(STEPS_BEFORE)}); remove the others, they are what it is to propose"
            )


def gathered(counts: Sequence[int], *, least: int) -> tuple[int, ...]:
    """Return ``counts`` with none from 1 to ``least`` less one, and the same sum.

    Small counts are carried to the next cell until ``least`` are together; what is left at the end
    goes to the last cell that has some.

    Raises:
        ValueError: if there are fewer than ``least`` in all.
    """
    told, carried, last = [0] * len(counts), 0, None
    for cell, count in enumerate(counts):
        carried += count
        if carried >= least:
            told[cell], carried, last = carried, 0, cell
    if last is None:
        raise ValueError(f"expected at least {least} counts in all, got {sum(counts)}")
    told[last] += carried
    return tuple(told)


def faults(
    found: Fingerprint, plan: StudyPlan, *, num_patients: int, min_cell: int = 0
) -> list[str]:
    """Return why ``found`` is not a fingerprint that the plan asks for and its terms allow.

    ``min_cell`` is a site's own; the plan's counts where it is larger.
    """
    asked = [(layout.name, layout.num_cells) for layout in layouts(plan)]
    if [(one.name, len(one.counts)) for one in found.histograms] != asked:
        return ["the fingerprint's histograms are not those the plan asks for"]
    if plan.privacy is not None:
        return ["the plan is private but cells were gathered"] if found.min_cell else []
    least = max(terms_of(plan).min_cell, min_cell)
    if found.min_cell < least:
        return [f"the fingerprint's cells are not gathered to the {least} patients agreed"]
    wrong = []
    counts = [count for one in found.histograms for count in one.counts]
    if any(count != int(count) or 0 < count < found.min_cell or count < 0 for count in counts):
        wrong.append("a cell of the fingerprint holds too few patients, or part of one")
    if any(sum(one.counts) != num_patients for one in found.histograms):
        wrong.append("a histogram of the fingerprint does not count every patient once")
    return wrong


def summed(found: Sequence[Fingerprint]) -> Fingerprint:
    """Return the sum of fingerprints of one plan, cell by cell.

    Raises:
        ValueError: if there is none.
    """
    if not found:
        raise ValueError("expected at least one fingerprint, got none")
    columns = zip(*(one.histograms for one in found), strict=True)
    return Fingerprint(
        min_cell=max(one.min_cell for one in found),
        histograms=tuple(
            Histogram(
                name=column[0].name,
                counts=tuple(
                    round(math.fsum(cell), 4)
                    for cell in zip(*(one.counts for one in column), strict=True)
                ),
            )
            for column in columns
        ),
    )


def _edges(scale: LogScale) -> tuple[float, ...]:
    ratio = scale.high / scale.low
    return tuple(scale.low * ratio ** (n / scale.num_cells) for n in range(scale.num_cells + 1))


def _classes(plan: StudyPlan) -> tuple[str, ...]:
    given = plan.task.params.get("classes", ())
    return tuple(str(name) for name in given) if isinstance(given, tuple) else ()

"""A site's fingerprint: its training patients' images, measured one each, told as histograms.

It runs where the images are read, in the process without keys. What it returns is noised under
privacy terms, and gathered (``shared_models.fingerprint``) without; the gate looks at it again.

Guarantees:
    One image of each training patient is measured, and which one depends on no other patient.
    Where only geometry and classes' names are asked, no pixel is read.
    The noise added to every cell has the deviation that is charged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from client.noise import secure
from shared_models.cohort import Row, plan_key, preparer, read_rows, steps_of
from shared_models.contracts import Fingerprint, Histogram
from shared_models.errors import DataError
from shared_models.fingerprint import (
    OTHER,
    IntensityTerms,
    Layout,
    gathered,
    layouts,
    sensitivity,
    terms_of,
)
from shared_models.imaging import Pair, Step, pipeline
from shared_models.plan import StudyPlan
from shared_models.randomness import Randomness
from shared_models.tasks import Task
from shared_models.volume import Volume, read_header


class Measured(NamedTuple):
    """One patient's image: ``size`` voxels and ``spacing_mm`` along (z, y, x), and the rest asked.

    ``values`` are its intensities at the plan's percentiles; ``classes`` are numbers, as the task
    counts them: the image's own, or those in its label map.
    """

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    modality: str
    values: tuple[float, ...] = ()
    classes: tuple[int, ...] = ()


def measure(
    manifest: Path, *, root: Path, plan: StudyPlan, task: Task, plugins: Collection[str] = ()
) -> list[Measured]:
    """Measure one image of each training patient of ``manifest``, after the plan's steps.

    Raises:
        DataError: with every objection at once, without a patient's name.
    """
    rows = read_rows(manifest, root=root, key=plan_key(plan))
    found, objections = list[Measured](), list[str]()
    for row in chosen([row for row in rows if row.split == "train"], key=plan_key(plan)):
        try:
            found.append(_measured(row, root=root, plan=plan, task=task, plugins=plugins))
        except (DataError, ValueError) as error:
            objections.append(f"line {row.line}: {error}")
    if objections:
        raise DataError(objections[:20])
    return found


def chosen(rows: Sequence[Row], *, key: str) -> list[Row]:
    """Return one row of each patient: that of the least hash, under ``key``, of patient and image.

    Design: a hash, so that which of a patient's images speaks is nobody's choice, and the same
    whenever it is asked.
    """
    by_patient: dict[str, list[Row]] = {}
    for row in rows:
        by_patient.setdefault(row.patient, []).append(row)
    return [
        min(of, key=lambda row: (_hash(row, key), row.line)) for _, of in sorted(by_patient.items())
    ]


def cell(layout: Layout, patient: Measured) -> int:
    """Return the one cell of ``layout`` in which ``patient`` is counted."""
    what, _, which = layout.name.partition("-")
    if what == "modality":
        names = layout.names
        return names.index(patient.modality if patient.modality in names else OTHER)
    if what == "class":
        return int(int(which) in patient.classes) if which else patient.classes[0]
    if what == "percentile":
        return layout.cell_of(patient.values[int(which)])
    axis = {"z": 0, "y": 1, "x": 2}[which]
    size, spacing_mm = patient.size[axis], patient.spacing_mm[axis]
    return layout.cell_of({"size": size, "spacing": spacing_mm, "extent": size * spacing_mm}[what])


def counted(patients: Sequence[Measured], plan: StudyPlan) -> list[list[int]]:
    """Return the plan's histograms over ``patients``, as they are: they may not leave like this."""
    found = []
    for layout in layouts(plan):
        counts = [0] * layout.num_cells
        for patient in patients:
            counts[cell(layout, patient)] += 1
        found.append(counts)
    return found


def told(
    patients: Sequence[Measured],
    plan: StudyPlan,
    *,
    noise_multiplier: float,
    min_cell: int,
    randomness: Randomness | None = None,
) -> Fingerprint:
    """Return what may leave of the plan's histograms over ``patients``.

    Args:
        patients: all of the site's, each measured once.
        plan: asks for a fingerprint.
        noise_multiplier: that of the plan under privacy terms, else 0.
        min_cell: how many patients the site gathers at least; the plan's counts if it is larger.
        randomness: of the noise; a secure source unless a test gives another.

    Raises:
        ValueError: if a plan with privacy terms is given no noise, or the reverse, or there are
            fewer patients than are to be gathered.
    """
    if (plan.privacy is not None) != (noise_multiplier > 0):
        raise ValueError("expected noise under privacy terms, and only then")
    counts = counted(patients, plan)
    if noise_multiplier > 0:
        least, cells = 0, _noised(counts, plan, noise_multiplier, randomness or secure())
    else:
        least = max(terms_of(plan).min_cell, min_cell)
        cells = [[float(n) for n in gathered(each, least=least)] for each in counts]
    return Fingerprint(
        min_cell=least,
        histograms=tuple(
            Histogram(name=layout.name, counts=tuple(each))
            for layout, each in zip(layouts(plan), cells, strict=True)
        ),
    )


def _noised(
    counts: list[list[int]], plan: StudyPlan, noise_multiplier: float, randomness: Randomness
) -> list[list[float]]:
    """Add noise to every cell; what is rounded afterwards is no patient's any more."""
    import torch

    from client.dp import add_noise

    noisy = add_noise(
        [torch.tensor(each, dtype=torch.float32) for each in counts],
        noise_multiplier=noise_multiplier,
        max_grad_norm=sensitivity(plan),
        randomness=randomness,
    )
    return [[round(float(value), 4) for value in each] for each in noisy]


def _measured(
    row: Row, *, root: Path, plan: StudyPlan, task: Task, plugins: Collection[str]
) -> Measured:
    terms = terms_of(plan)
    steps = pipeline(steps_of(plan), plugins=plugins)
    classes: tuple[int, ...] = ()
    if terms.classes == "label":
        classes = (task.encode_class(row.label),)
    needs_map = terms.classes == "present" or (
        terms.intensity is not None and terms.intensity.within == "foreground"
    )
    is_turned_only = all(step.name == "orient" for step in plan.imaging)
    if is_turned_only and not needs_map and terms.intensity is None:
        return _from_header(root / row.image, steps)._replace(classes=classes)
    read = preparer(steps_of(plan), plugins=plugins)
    image, map_ = read(root / row.image, root / row.label if needs_map else None)
    encoded = None if map_ is None else task.encode_map(map_.data)
    if terms.classes == "present" and encoded is not None:
        classes = tuple(int(number) for number in np.unique(encoded))
    return Measured(
        image.data.shape,
        image.spacing_mm,
        image.modality,
        () if terms.intensity is None else _values(image, encoded, terms.intensity),
        classes,
    )


def _from_header(image: Path, turn: Step) -> Measured:
    """Measure an image by its header, turned as the plan says.

    The steps are shown a stand-in on the image's axes, whose sizes tell them apart.
    """
    header = read_header(image)
    stand_in: Pair = turn(
        Volume(np.zeros((1, 2, 3), np.float32), header.affine, header.modality), None
    )
    turned = stand_in[0]
    size = tuple(header.shape[side - 1] for side in turned.data.shape)
    return Measured(size, turned.spacing_mm, header.modality)


def _values(image: Volume, encoded: object, terms: IntensityTerms) -> tuple[float, ...]:
    marked = image.data[np.asarray(encoded) > 0] if terms.within == "foreground" else image.data
    values = np.percentile(marked if marked.size else image.data, terms.percentiles)
    if not np.isfinite(values).all():
        raise DataError("the image holds values that are no numbers; export it again")
    return tuple(float(value) for value in values)


def _hash(row: Row, key: str) -> bytes:
    text = f"{row.patient}\0{row.image}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, key=hashlib.blake2b(key.encode()).digest()).digest()

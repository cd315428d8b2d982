"""A manifest and its images become patients: what both a site and the coordinator train or test on.

A manifest is a CSV beside (or above) the images with the columns ``image`` (a path relative to the
root), ``patient``, ``label`` (a class, the path of a label map, or boxes: see ``boxes.py``) and,
optionally, ``split`` (train, val or test; otherwise a keyed hash of the patient decides). One row
is one image; a row whose image is a folder is one DICOM series. For a two-dimensional net every
slice is an image.

Guarantees:
    A patient is in one split only, with at least one image and a label for each.
    Every objection to a manifest is told at once, without a patient's name.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models import boxes
from shared_models.errors import DataError
from shared_models.imaging import Pair, pipeline
from shared_models.plan import StudyPlan
from shared_models.splits import SPLITS, Split, split_of
from shared_models.tasks import Task
from shared_models.volume import read_volume

COLUMNS = ("image", "patient", "label")
#: At most this many objections are spelled out.
MOST_OBJECTIONS = 20


class Row(NamedTuple):
    """One line of a manifest."""

    line: int
    image: str
    patient: str
    label: str
    split: str


class Patient(NamedTuple):
    """All images of one patient.

    Attributes:
        images: float32 (n, channel, [z,] y, x).
        targets: int64 (n,) or (n, [z,] y, x); of boxes as the task encodes them.
        spacing_mm: of each image, ([z,] y, x).
        foreground: of each image where the plan asks for it, flat indices of the voxels whose label
            is not 0, in order.

    Where the plan trains on patches, an only image stays mapped into memory, and label maps,
    float32 as they were read, are encoded when they are needed (``encoded``).
    """

    images: Tensor
    targets: Tensor
    spacing_mm: tuple[tuple[float, ...], ...]
    foreground: tuple[NDArray[np.int64], ...] = ()


Cohort = dict[Split, list[Patient]]
#: From an image's file and its label map's, if it has one, to both as the plan wants them.
Prepare = Callable[[Path, Path | None], Pair]
#: From a label map to the flat indices of the voxels whose label is not 0, in order.
Foreground = Callable[[NDArray[np.float32]], NDArray[np.int64]]


class Example(NamedTuple):
    """One image of a patient, as in ``Patient``."""

    image: Tensor
    target: Tensor
    spacing_mm: tuple[float, ...]
    foreground: NDArray[np.int64] | None


def load(
    manifest: Path,
    *,
    root: Path,
    plan: StudyPlan,
    task: Task,
    splits: Sequence[str] = SPLITS,
    plugins: Collection[str] = (),
    prepare: Prepare | None = None,
    foreground: Foreground = np.flatnonzero,
    progress: Callable[[int, int], None] | None = None,
) -> Cohort:
    """Read the images of ``manifest`` that belong to ``splits``, prepared as the plan says.

    Args:
        manifest: the CSV file.
        root: what its paths are relative to.
        plan: its imaging steps, net dimensions and seed are used.
        task: how labels are understood.
        splits: images of other splits are not opened.
        plugins: distributions whose imaging steps may be used, as ``name==version``.
        prepare: what reads and prepares an image; without it each is read anew.
        foreground: what finds the foreground, where the plan asks for it.
        progress: called with images done and images in all.

    Raises:
        DataError: with every objection at once.
    """
    rows = [
        row
        for row in read_rows(
            manifest, root=root, key=plan_key(plan), has_labels=task.label_kind != "none"
        )
        if row.split in splits
    ]
    prepare = prepare or preparer(steps_of(plan), plugins=plugins)
    spatial_dims = int(str(plan.net.params.get("spatial_dims", 2)))
    terms, grouped = plan.training, dict[tuple[str, str], list[Example]]()
    objections: list[str] = []
    for done, row in enumerate(sorted(rows, key=lambda r: (r.patient, r.image))):
        try:
            pair = _pair(row, root=root, task=task, prepare=prepare)
            examples = _examples(
                row, pair, root=root, task=task, dims=spatial_dims, patch=terms.patch
            )
            if terms.patch_foreground is not None and pair[1] is not None:
                examples = _with_foreground(examples, foreground(pair[1].data))
            grouped.setdefault((row.split, row.patient), []).extend(examples)
        except (DataError, ValueError) as error:
            objections.append(f"line {row.line}: {error}")
        if progress is not None:
            progress(done + 1, len(rows))
    _refuse(objections)
    cohort: Cohort = {"train": [], "val": [], "test": []}
    for (split, _), examples in grouped.items():
        cohort[split].append(_stacked(examples))  # type: ignore[index]
    if not terms.patch:
        _refuse(_misfits(cohort))
    return cohort


def read_rows(manifest: Path, *, root: Path, key: str, has_labels: bool = True) -> list[Row]:
    """Read a manifest and check everything that can be checked without opening an image.

    Without ``has_labels`` the task wants none: the column may be missing, and lines empty there.

    Raises:
        DataError: with every objection at once.
    """
    if not manifest.is_file():
        raise DataError(
            f"there is no manifest {manifest}; expected a CSV with {', '.join(COLUMNS)}"
        )
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            wanted = COLUMNS if has_labels else COLUMNS[:2]
            missing = [c for c in wanted if c not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{manifest.name}: missing column {', '.join(missing)}")
            rows = [_row(record, reader.line_num, key=key) for record in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {manifest.name} as CSV: {type(error).__name__}") from None
    if not rows:
        raise DataError(f"{manifest.name}: no images; expected at least one line below the header")
    _refuse(_row_objections(rows, root=root, has_labels=has_labels))
    return rows


def steps_of(plan: StudyPlan) -> list[tuple[str, dict[str, object]]]:
    """Return the plan's imaging steps as names and parameters."""
    return [(step.name, dict(step.params)) for step in plan.imaging]


def preparer(
    steps: Sequence[tuple[str, dict[str, object]]], *, plugins: Collection[str] = ()
) -> Prepare:
    """Return what reads an image and its label map and takes ``steps`` with them.

    Raises:
        ValueError: if a step or a parameter is unknown.
    """
    run = pipeline(steps, plugins=plugins)
    return lambda image, label: run(*read_pair(image, label))


def read_pair(image: Path, label: Path | None) -> Pair:
    """Read an image and its label map, if it has one.

    Raises:
        DataError: if they cannot be read, or are not on one grid.
    """
    volume, map_ = read_volume(image), None if label is None else read_volume(label)
    if map_ is not None and map_.data.shape != volume.data.shape:
        raise DataError("the label map's grid is not the image's; export both on the same grid")
    return volume, map_


def plan_key(plan: StudyPlan) -> str:
    """Return the key of the study's splits: its name, so that a new round of it keeps them."""
    return f"consilia split {plan.name}"


def _row(record: dict[str, str | None], line: int, *, key: str) -> Row:
    image, patient, label = ((record.get(c) or "").strip() for c in COLUMNS)
    split = (record.get("split") or "").strip() or split_of(patient, key=key)
    return Row(line, image, patient, label, split)


def _row_objections(rows: Sequence[Row], *, root: Path, has_labels: bool) -> Iterator[str]:
    split_by_patient: dict[str, str] = {}
    seen: set[str] = set()
    for row in rows:
        where = f"line {row.line}"
        if not row.image or not row.patient:
            yield f"{where}: expected an image and a patient; fill them in or remove the line"
            continue
        if has_labels and not row.label:
            yield f"{where}: an image without a label; add the label or remove the line"
        if row.image in seen:
            yield f"{where}: the image is listed twice; keep one line"
        seen.add(row.image)
        if row.split not in SPLITS:
            yield f"{where}: expected a split that is one of {', '.join(SPLITS)}"
        elif split_by_patient.setdefault(row.patient, row.split) != row.split:
            yield f"{where}: a patient is in two splits; give all their images the same one"
        if not _exists(root / row.image):
            yield (
                f"{where}: a label without an image: the file the manifest names is missing; "
                "restore it or remove the line"
            )


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a name too long, a folder that may not be read; the message names the file
        return False


def _pair(row: Row, *, root: Path, task: Task, prepare: Prepare) -> Pair:
    pair = prepare(root / row.image, root / row.label if task.label_kind == "map" else None)
    if not pair[0].data.size:
        raise DataError(
            "nothing is left of the image after the plan's imaging steps, and a patient needs at "
            "least one; export it again or remove the line"
        )
    return pair


def _examples(
    row: Row, pair: Pair, *, root: Path, task: Task, dims: int, patch: tuple[int, ...]
) -> list[Example]:
    """Return each image of a row: slices if ``dims`` is 2."""
    volume, map_ = pair
    image = torch.from_numpy(volume.data)[None]
    if any(long < short for long, short in zip(image.shape[-dims:], patch, strict=False)):
        raise DataError(
            "the image is smaller than the plan's patch after its imaging steps; end them with "
            "'pad' or 'crop-or-pad', or plan smaller patches"
        )
    if task.label_kind == "boxes":
        if dims == 3:
            raise DataError("boxes are for nets of two dimensions; ask for a plan with one")
        if patch:
            raise DataError("boxes are not cut with patches; ask for a plan without training.patch")
        listed, before = boxes.read(row.label), read_volume(root / row.image)
        found = boxes.prepared(listed, before=before, after=volume)
        target = task.encode_boxes(found, (volume.data.shape[1], volume.data.shape[2]))
        return [Example(image[:, 0], target, volume.spacing_mm[1:], None)]
    if map_ is not None:
        codes = task.encode_map(map_.data)  # also where only patches of it will be needed: a check
        target = torch.from_numpy(map_.data if patch else codes)
    elif task.label_kind == "none":
        target = torch.tensor(0)
    else:
        target = torch.tensor(task.encode_class(row.label))
    if dims == 3:
        return [Example(image, target, volume.spacing_mm, None)]
    return [
        Example(image[:, z], target[z] if target.ndim else target, volume.spacing_mm[1:], None)
        for z in range(image.shape[1])
    ]


def _with_foreground(examples: list[Example], found: NDArray[np.int64]) -> list[Example]:
    """Add where each image's foreground is, of that of the volume they are or are slices of."""
    size = examples[0].target.numel()
    ends = np.searchsorted(found, size * np.arange(len(examples) + 1))
    return [
        example._replace(
            foreground=found[ends[z] : ends[z + 1]] - size * z if z else found[: ends[1]]
        )
        for z, example in enumerate(examples)
    ]


def encoded(target: Tensor, task: Task) -> Tensor:
    """Return a target as the task wants it: a label map left as it was read is encoded."""
    if task.label_kind != "map" or not target.is_floating_point():
        return target
    return torch.from_numpy(task.encode_map(target.numpy()))


def _stacked(examples: Sequence[Example]) -> Patient:
    images, targets, spacings, foreground = zip(*examples, strict=True)
    if len({image.shape for image in images}) > 1:
        raise DataError(
            "images of one patient have different sizes; end the plan's imaging steps with "
            "'resize' or 'crop-or-pad'"
        )
    found = tuple(one for one in foreground if one is not None)
    if len(images) == 1 and targets[0].is_floating_point():
        return Patient(images[0][None], targets[0][None], tuple(spacings), found)
    stacked = torch.stack(images).contiguous(), torch.stack(targets)
    return Patient(*stacked, tuple(spacings), found)


def _misfits(cohort: Cohort) -> Iterator[str]:
    sizes = {tuple(p.images.shape[1:]) for patients in cohort.values() for p in patients}
    if len(sizes) > 1:
        yield (
            "the images have different sizes after the plan's imaging steps; end them with "
            "'resize' or 'crop-or-pad'"
        )


def _refuse(objections: Iterator[str] | Sequence[str]) -> None:
    found = list(objections)
    if len(found) > MOST_OBJECTIONS:
        found = [*found[:MOST_OBJECTIONS], f"and {len(found) - MOST_OBJECTIONS} more of the kind"]
    if found:
        raise DataError(found)

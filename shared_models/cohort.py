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

import torch
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
    """

    images: Tensor
    targets: Tensor
    spacing_mm: tuple[tuple[float, ...], ...]


Cohort = dict[Split, list[Patient]]
#: From an image's file and its label map's, if it has one, to both as the plan wants them.
Prepare = Callable[[Path, Path | None], Pair]


def load(
    manifest: Path,
    *,
    root: Path,
    plan: StudyPlan,
    task: Task,
    splits: Sequence[str] = SPLITS,
    plugins: Collection[str] = (),
    prepare: Prepare | None = None,
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
    grouped: dict[tuple[str, str], list[tuple[Tensor, Tensor, tuple[float, ...]]]] = {}
    objections: list[str] = []
    for done, row in enumerate(sorted(rows, key=lambda r: (r.patient, r.image))):
        try:
            examples = _examples(row, root=root, task=task, prepare=prepare, dims=spatial_dims)
            grouped.setdefault((row.split, row.patient), []).extend(examples)
        except (DataError, ValueError) as error:
            objections.append(f"line {row.line}: {error}")
        if progress is not None:
            progress(done + 1, len(rows))
    _refuse(objections)
    cohort: Cohort = {"train": [], "val": [], "test": []}
    for (split, _), examples in grouped.items():
        cohort[split].append(_stacked(examples))  # type: ignore[index]
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


def _examples(
    row: Row, *, root: Path, task: Task, prepare: Prepare, dims: int
) -> list[tuple[Tensor, Tensor, tuple[float, ...]]]:
    """Return (image, target, spacing) for each image of a row: slices if ``dims`` is 2."""
    label_file = root / row.label if task.label_kind == "map" else None
    volume, map_ = prepare(root / row.image, label_file)
    image = torch.from_numpy(volume.data)[None]
    if not image.numel():
        raise DataError(
            "nothing is left of the image after the plan's imaging steps, and a patient needs at "
            "least one; export it again or remove the line"
        )
    if task.label_kind == "boxes":
        if dims == 3:
            raise DataError("boxes are for nets of two dimensions; ask for a plan with one")
        listed, before = boxes.read(row.label), read_volume(root / row.image)
        found = boxes.prepared(listed, before=before, after=volume)
        target = task.encode_boxes(found, (volume.data.shape[1], volume.data.shape[2]))
        return [(image[:, 0], target, volume.spacing_mm[1:])]
    if map_ is not None:
        target = torch.from_numpy(task.encode_map(map_.data))
    elif task.label_kind == "none":
        target = torch.tensor(0)
    else:
        target = torch.tensor(task.encode_class(row.label))
    if dims == 3:
        return [(image, target, volume.spacing_mm)]
    return [
        (image[:, z], target[z] if target.ndim else target, volume.spacing_mm[1:])
        for z in range(image.shape[1])
    ]


def _stacked(examples: Sequence[tuple[Tensor, Tensor, tuple[float, ...]]]) -> Patient:
    images, targets, spacings = zip(*examples, strict=True)
    if len({image.shape for image in images}) > 1:
        raise DataError(
            "images of one patient have different sizes; end the plan's imaging steps with "
            "'resize' or 'crop-or-pad'"
        )
    return Patient(torch.stack(images).contiguous(), torch.stack(targets), tuple(spacings))


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

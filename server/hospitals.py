"""A data set with a ``site`` column becomes hospitals for a demonstration.

Reads ``manifest.csv`` of a folder and writes one manifest per site plus one for the coordinator's
validation set, whose patients no site gets. Images stay where they are. Where boxes are wanted and
there is no manifest, ``boxes.csv`` will do, which has a line for each box; an image for which it
names no patient is its own.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from shared_models import boxes
from shared_models.errors import DataError
from shared_models.splits import SPLITS, split_of
from shared_models.volume import PICTURES

IMAGE_COLUMNS = ("image", "file")
PATIENT_COLUMNS = ("patient", "patient_id", "source_id")
SITE_COLUMNS = ("site", "block")
CLASS_COLUMNS = ("class", "finding")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MANIFEST, BOXES = "manifest.csv", "boxes.csv"
MAP_COLUMNS = ("label", "mask")
#: Label maps with higher values are of no demonstration, or number objects.
MOST_CLASSES = 19
#: As a task's ``label_kind``.
Labels = Literal["class", "map", "boxes", "none"]
SITE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")


class DataSet(NamedTuple):
    """Rows (image, patient, label, split, site) for manifests, and what the labels mean.

    Where ``has_instances``, label maps number the objects of the one class.
    """

    root: Path
    rows: tuple[dict[str, str], ...]
    classes: tuple[str, ...]
    has_instances: bool = False

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the hospitals, sorted."""
        return tuple(sorted({row["site"] for row in self.rows}))

    def smallest_training_set(self) -> int:
        """Training patients at the smallest hospital."""
        return min(self.training_patients().values(), default=0)

    def training_patients(self) -> Mapping[str, int]:
        """Training patients at each hospital."""
        pairs = {(r["site"], r["patient"]) for r in self.rows if r["split"] == "train"}
        return Counter(site for site, _ in pairs)


def join(folder: Path) -> Path:
    """Write ``manifest.csv`` for all hospitals whose folders lie in ``folder``; return it."""
    rows: list[dict[str, str]] = []
    for manifest in sorted(folder.glob("*/manifest.csv")):
        with manifest.open(newline="", encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                moved = {name: f"{manifest.parent.name}/{row[name]}" for name in ("image", "mask")}
                rows.append(row | moved)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def adopt(data_dir: Path, *, labels: Labels, classes: Sequence[str] = ()) -> DataSet:
    """Read the data set in ``data_dir`` and check it before anything is started.

    Args:
        data_dir: holds ``manifest.csv``, with the columns image (or file), patient (or patient_id),
            site, labels and, if it has one, split; or ``boxes.csv``, see ``_listed``.
        labels: what is wanted for labels, which decides the column that holds them.
        classes: what to call the classes; by default they are named after the column or number.

    Raises:
        DataError: with every objection at once, without a patient's name.
    """
    manifest = listing(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"there is no folder {data_dir}")
    if labels == "boxes" and manifest.name == BOXES:
        return _named(data_dir, _listed(_records(manifest)), labels=labels, classes=classes)
    manifest = data_dir / MANIFEST
    if not manifest.is_file():
        raise DataError(f"{data_dir} holds no manifest.csv; list its images there, one a line")
    records = _records(manifest)
    image, patient = _column(records, IMAGE_COLUMNS), _column(records, PATIENT_COLUMNS)
    label = _label_column(records, labels, taken=("site", "split", image, patient))
    if "site" not in records[0]:
        raise DataError(f"{manifest}: missing column site; it says which hospital an image is of")
    rows = [_row(r, image=image, patient=patient, label=label) for r in records]
    return _named(data_dir, rows, labels=labels, classes=classes, column=label)


def listing(folder: Path) -> Path:
    """Return the file that lists a data set's images: its manifest, else its boxes."""
    is_boxes = (folder / BOXES).is_file() and not (folder / MANIFEST).exists()
    return folder / (BOXES if is_boxes else MANIFEST)


def _records(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            records = list(csv.DictReader(handle))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file} as CSV: {type(error).__name__}") from None
    if not records:
        raise DataError(f"{file} lists no images")
    return records


def _named(
    data_dir: Path,
    rows: Sequence[dict[str, str]],
    *,
    labels: Labels,
    classes: Sequence[str],
    column: str = "",
) -> DataSet:
    """Check the rows and name their classes: as the labels do, or as asked for."""
    _refuse(list(_objections(rows, data_dir, labels=labels)))
    has_instances = labels == "map" and _number_objects(rows, data_dir)
    found: tuple[str, ...] = ("object",)
    if not has_instances:
        found = _classes(rows, data_dir, labels=labels, column=column)
    if classes and len(classes) != len(found):
        raise DataError(f"expected names for {len(found)} classes, got {len(classes)}")
    if classes and labels == "boxes" and set(classes) != set(found):
        raise DataError("expected the classes that the boxes name, in any order")
    return DataSet(data_dir.resolve(), tuple(rows), tuple(classes) or found, has_instances)


def _listed(records: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return a row for each image of a ``boxes.csv``, which has a line for each box.

    Its columns: image (or file), class (or finding), xmin, ymin, xmax, ymax in pixels, site (or
    block) and, if it has them, split, patient (or patient_id) and flag. A box with a flag is left
    out, and with it an image that has no other: what is in it is not known.

    Raises:
        DataError: with every objection at once, by line.
    """
    image, name = _column(records, IMAGE_COLUMNS), _column(records, CLASS_COLUMNS)
    site = _column(records, SITE_COLUMNS)
    patient = next((column for column in PATIENT_COLUMNS if column in records[0]), image)
    missing = [corner for corner in CORNERS if corner not in records[0]]
    if missing:
        raise DataError(f"{BOXES}: missing column {', '.join(missing)}")
    rows: dict[str, dict[str, str]] = {}
    objections = []
    for line, record in enumerate(records, start=2):
        if (record.get("flag") or "").strip():
            continue
        row = _row(record, image=image, patient=patient, label="") | {
            "site": (record[site] or "").strip(),
            "line": str(line),
        }
        first = rows.setdefault(row["image"], row)
        if any(first[part] != row[part] for part in ("patient", "site", "split")):
            objections.append(f"line {line}: an image's boxes differ in patient, site or split")
        box = " ".join((record[column] or "").strip() for column in (name, *CORNERS))
        try:
            boxes.read(box)
        except DataError as error:
            objections.append(f"line {line}: {error}")
        first["label"] += "; " * bool(first["label"]) + box
    _refuse(objections)
    return list(rows.values())


def write_manifests(
    data: DataSet, *, site_dirs: Mapping[str, Path], validation: Path, start: Path | None = None
) -> None:
    """Write each site's ``manifest.csv`` (train and test) and the coordinator's (val).

    Where there is to be a warm start, every other of the coordinator's patients is for that.
    """
    for site, folder in site_dirs.items():
        _write(
            folder / "manifest.csv",
            [r for r in data.rows if r["site"] == site and r["split"] != "val"],
        )
    own = [r for r in data.rows if r["split"] == "val"]
    for_start = set[tuple[str, str]]()
    if start is not None:
        for_start = set(sorted({(r["site"], r["patient"]) for r in own})[::2])
        _write(start, [r for r in own if (r["site"], r["patient"]) in for_start])
    _write(validation, [r for r in own if (r["site"], r["patient"]) not in for_start])


def _write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(
            handle,
            ("image", "patient", "label", "split"),
            extrasaction="ignore",
            lineterminator="\n",
        )
        writer.writeheader()
        writer.writerows(rows)


def _row(record: Mapping[str, str], *, image: str, patient: str, label: str) -> dict[str, str]:
    name = (record[patient] or "").strip()
    split = (record.get("split") or "").strip()
    return {
        "image": (record[image] or "").strip(),
        "patient": name,
        "label": (record.get(label) or "").strip(),
        "split": split or split_of(name, key="consilia demo", test=0.2, val=0.1),
        "site": (record.get("site") or "").strip(),
    }


def _column(records: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    found = next((name for name in names if name in records[0]), None)
    if found is None:
        raise DataError(f"{MANIFEST}: missing column {names[0]}; looked for {', '.join(names)}")
    return found


def _label_column(
    records: Sequence[Mapping[str, str]], labels: Labels, *, taken: Collection[str]
) -> str:
    """Maps: the column that holds them. Classes: the first whose every value is a small number."""
    if labels == "none":
        return ""
    if labels == "boxes":
        return _column(records, ("label", "boxes"))
    if labels == "map":
        names = [n for n in MAP_COLUMNS if n in records[0] and not _are_classes(records, n)]
        expected = f"a column with label maps, {' or '.join(MAP_COLUMNS)}"
    else:
        names = [n for n in records[0] if n not in taken and _are_classes(records, n)]
        expected = "a column of class numbers (0, 1, ...)"
    if not names:
        raise DataError(f"manifest.csv: expected {expected}")
    return names[0]


def _are_classes(records: Sequence[Mapping[str, str]], name: str) -> bool:
    values = {(record[name] or "").strip() for record in records} - {""}
    numbers = {int(v) for v in values if v.isascii() and v.isdigit()}
    return (
        len(numbers) == len(values) > 1
        and numbers == set(range(len(numbers)))
        and len(numbers) < 100
    )


def _objections(rows: Sequence[Mapping[str, str]], root: Path, *, labels: Labels) -> Iterator[str]:
    splits: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        line = row.get("line", number)
        if not row["image"] or not row["patient"]:
            yield f"line {line}: expected an image and a patient"
        elif splits.setdefault(row["patient"], row["split"]) != row["split"]:
            yield f"line {line}: a patient is in two splits; give all their images the same one"
        elif not (root / row["image"]).exists():
            yield f"line {line}: the image is missing; restore it or remove the line"
        if labels != "none" and not row["label"]:
            yield f"line {line}: an image without a label"
        elif labels == "map" and not (root / row["label"]).exists():
            yield f"line {line}: the label map is missing from the folder"
        elif labels == "boxes" and (said := _objection_to_boxes(row["label"])):
            yield f"line {line}: {said}"
        if not SITE_NAME.match(row["site"]):
            yield f"line {line}: expected a site name of letters, digits, - and _"
        if row["split"] not in SPLITS:
            yield f"line {line}: expected a split that is one of {', '.join(SPLITS)}"
    sites = {row["site"] for row in rows}
    if len(sites) < 2:
        yield f"expected two or more sites, got {len(sites)}"
    for site in sorted(filter(SITE_NAME.match, sites)):
        for split in ("train", "test"):
            if not any(r["site"] == site and r["split"] == split for r in rows):
                yield f"site {site}: no patients in split {split}"
    if not any(row["split"] == "val" for row in rows):
        yield "no patients in split val; the coordinator validates on them"


def _objection_to_boxes(label: str) -> str:
    try:
        boxes.read(label)
    except DataError as error:
        return str(error)
    return ""


def _classes(
    rows: Sequence[Mapping[str, str]], root: Path, *, labels: Labels, column: str
) -> tuple[str, ...]:
    """Return the classes' names; none where there are no labels."""
    if labels == "none":
        return ()
    if labels == "boxes":
        return tuple(sorted({box.name for row in rows for box in boxes.read(row["label"])}))
    if labels == "class":
        numbers = sorted({int(row["label"]) for row in rows})
        return (
            (f"no {column}", column) if len(numbers) == 2 else tuple(f"class {n}" for n in numbers)
        )
    largest = _largest(rows, root)
    if not 0 < largest <= MOST_CLASSES:
        raise DataError(
            f"expected label maps with values from 1 to {MOST_CLASSES}, got up to {largest}"
        )
    return tuple(f"label {n}" for n in range(1, largest + 1))


def _number_objects(rows: Sequence[Mapping[str, str]], root: Path) -> bool:
    """Return whether the label maps of pictures have more values than there can be classes.

    Volumes' maps may well name more classes, and are not guessed at.
    """
    are_pictures = all(Path(row["image"]).suffix.lower() in PICTURES for row in rows)
    return are_pictures and _largest(rows, root) > MOST_CLASSES


def _largest(rows: Sequence[Mapping[str, str]], root: Path) -> int:
    from shared_models.volume import read_volume

    return max(int(read_volume(root / row["label"]).data.max()) for row in rows[:40])


def _refuse(objections: Sequence[str]) -> None:
    if len(objections) > 20:
        objections = [*objections[:20], f"and {len(objections) - 20} more of the kind"]
    if objections:
        raise DataError(objections)

"""Writes what a hospital's archive exports: many series of many visits, good ones and bad ones.

Four vendors, CT and MR; patients who come once or twice, whose lesions have grown; several series
and a localizer per visit; patients without labels, and hospitals that label the organ only; broken
series planted between the good ones; series with a name drawn into their pixels; invented names and
numbers in every header. ``answers.json`` beside each hospital's files is the key: what every series
is, and which identifiers it carries, in its headers and in its pixels.

Guarantees:
    The same seed writes the same bytes. A failure leaves nothing half-written.
    Nothing about a series can be learnt from a folder's or a file's name.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom import Dataset

from shared_models.phantoms import bulk
from shared_models.phantoms.anatomy import LESION, ORGAN, Grid, Scan
from shared_models.phantoms.bulk import Stored
from shared_models.phantoms.files import describe_series, write_labels
from shared_models.phantoms.hard import CASES, write_hard_cases
from shared_models.phantoms.lettering import Lettering, invent_line, letter
from shared_models.phantoms.profiles import VENDORS, HospitalProfile
from shared_models.phantoms.seeds import digest, make_generator, make_uid

FIRST_VISIT = datetime.date(2019, 3, 1)
DAYS_BETWEEN = (60, 240)
LESION_GROWTH = 1.25
#: The second series of a visit, by modality: another kernel, another contrast.
SECOND_KERNEL = {"CT": "B60f", "MR": "T2"}
UNLABELLED_SHARE = 4  # one patient in so many
ORGAN_ONLY = ("north_clinic",)
#: Letters of the series with text in their pixels, and from how many pixels of a slice's width.
LETTERED = (
    (Lettering("sharp", 12, "white", "top left"), 0),
    (Lettering("sharp", 16, "box", "bottom right"), 200),
    (Lettering("dots", 22, "grey", "top right"), 200),
    (Lettering("smooth", 24, "rim", "bottom left"), 200),
)
PLANTED = tuple(name for name, (reason, _) in CASES.items() if reason)
GIVEN = ("ADA", "BRUNO", "CHIARA", "DARIO", "ELKE", "FARID", "GRETA", "HUGO", "IDA", "JOSIP")
FAMILY = ("AMSEL", "BIRNBAUM", "CASTAGNO", "DRAGOMIR", "EICHENLAUB", "FELDMOHN", "GROSSBACH")


class Visit(NamedTuple):
    """One patient's visit to one hospital; ``time`` counts from 0."""

    profile: HospitalProfile
    patient: str
    time: int
    day: datetime.date
    has_lesion: bool
    identifiers: dict[str, str]


def write_archives(
    root: Path,
    seed: int,
    *,
    num_patients: int = 4,
    num_slices: int = 24,
    size: int = 96,
    num_planted: int = 6,
    num_lettered: int = 1,
    profiles: Iterable[HospitalProfile] = VENDORS,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write one folder per hospital, with ``dicom/``, ``labels/`` and ``answers.json``.

    Args:
        root: Created if need be; must not yet hold a folder of a hospital's name.
        seed: Decides everything.
        num_patients: Patients in each hospital; every second one comes twice.
        num_slices: Slices of a series.
        size: Rows and columns of a slice.
        num_planted: Broken series planted in each hospital, other ones in each.
        num_lettered: Patients in each hospital whose one series has text in its pixels.
        profiles: The hospitals.
        progress: Called after each patient with the number of patients written so far.

    Raises:
        ValueError: a number is too small.
        FileExistsError: a hospital's folder is already there.
    """
    if min(num_patients, num_slices) < 1 or size < 16:
        raise ValueError("expected at least one patient, one slice and 16 pixels")
    profiles = list(profiles)
    taken = [p.name for p in profiles if (root / p.name).exists()]
    if taken:
        raise FileExistsError(f"the folder already holds {', '.join(taken)}; choose an empty one")
    root.mkdir(parents=True, exist_ok=True)
    num_written = 0
    with tempfile.TemporaryDirectory(prefix=".archives-", dir=root) as unfinished:
        for place, profile in enumerate(profiles):
            folder = Path(unfinished) / profile.name
            (folder / "labels").mkdir(parents=True)
            answers: list[dict[str, Any]] = []
            for index in range(num_patients):
                for visit in _visits(profile, index, seed=seed):
                    answers += _write_visit(
                        folder, visit, seed, _grid(visit, seed, num_slices, size)
                    )
                num_written += 1
                if progress is not None:
                    progress(num_written)
            for index in range(num_patients, num_patients + num_lettered):
                visit = next(_visits(profile, index, seed=seed))
                grid = _grid(visit, seed, num_slices, size)
                answers.append(_write_lettered(folder, visit, seed, grid, number=place + index))
            names = [
                PLANTED[(place + n * len(profiles)) % len(PLANTED)] for n in range(num_planted)
            ]
            answers += _plant(folder, seed, names)
            answers.sort(key=lambda answer: str(answer["folder"]))
            text = json.dumps({"schema_version": 1, "series": answers}, indent=1)
            (folder / "answers.json").write_text(text + "\n", encoding="utf-8")
        return [(Path(unfinished) / p.name).rename(root / p.name) for p in profiles]


def _visits(profile: HospitalProfile, index: int, *, seed: int) -> Iterator[Visit]:
    patient = f"{profile.name}-{index + 1:04d}"
    rng = make_generator(seed, patient, "visits")
    has_lesion = bool(rng.random() < profile.lesion_fraction)
    day = FIRST_VISIT + datetime.timedelta(days=int(rng.integers(0, 1500)))
    identifiers = _identifiers(rng)
    for time in range(1 + index % 2):
        yield Visit(profile, patient, time, day, has_lesion, identifiers)
        day += datetime.timedelta(days=int(rng.integers(*DAYS_BETWEEN)))


def _grid(visit: Visit, seed: int, num_slices: int, size: int) -> Grid:
    """Return the voxels of a visit's series: the table stands differently each time."""
    rng = make_generator(seed, visit.patient, visit.time, "table")
    spacing_mm = round(visit.profile.field_of_view_mm / size, 3)
    corner_mm = -spacing_mm * (size - 1) / 2
    x, y, z = (round(float(v), 3) for v in rng.uniform(-20, 20, 3))
    thickness_mm = round(visit.profile.slice_thickness_mm / 4, 2)
    return Grid(num_slices, size, spacing_mm, thickness_mm, (corner_mm + x, corner_mm + y, z - 200))


def _write_visit(folder: Path, visit: Visit, seed: int, grid: Grid) -> list[dict[str, Any]]:
    """Write a visit's series and labels; return their answers."""
    profile = visit.profile
    scan = bulk.draw_long(
        profile,
        grid,
        person=(seed, visit.patient),
        has_lesion=visit.has_lesion,
        lesion_growth=LESION_GROWTH**visit.time,
    )
    label = _write_label(folder, visit, seed, scan, grid)
    second = profile._replace(ConvolutionKernel=SECOND_KERNEL[profile.Modality])
    if profile.Modality == "CT":
        second = second._replace(kernel_weight=-0.05, noise_hu=1.6 * profile.noise_hu)
    answers = []
    for number, variant in enumerate((profile, second), start=2):
        names = (seed, visit.patient, visit.time, number)
        stored = bulk.make_slices(
            scan, variant, num_slices=grid.num_slices, rng=make_generator(*names, "noise")
        )
        dataset = _describe(visit, variant, grid, number=number, seed=seed)
        answers.append(_write(folder, visit, dataset, stored, grid, names) | {"label": label})
    names = (seed, visit.patient, visit.time, 1)
    dataset, one = _describe(visit, profile, grid, number=1, seed=seed), grid._replace(num_slices=1)
    _make_localizer(dataset)
    answers.append(_write(folder, visit, dataset, _localizer(scan, profile), one, names))
    return [answer | {"reason": _reason(answer)} for answer in answers]


def _write_lettered(
    folder: Path, visit: Visit, seed: int, grid: Grid, *, number: int
) -> dict[str, Any]:
    """Write a series with the same line of text in every slice; return its answer."""
    fitting = [lettering for lettering, least in LETTERED if grid.size >= least]
    lettering, names = fitting[number % len(fitting)], (seed, visit.patient, "lettered")
    text = invent_line(make_generator(*names))
    scan = bulk.draw_long(visit.profile, grid, person=(seed, visit.patient), has_lesion=False)
    drawn = bulk.make_slices(
        scan, visit.profile, num_slices=grid.num_slices, rng=make_generator(*names, "noise")
    )
    dataset = _describe(visit, visit.profile, grid, number=2, seed=seed)
    stored = (letter(frame, text, lettering) for frame in drawn)
    answer = _write(folder, visit, dataset, stored, grid, names)  # type: ignore[arg-type]
    burned_in = {"text": text} | lettering._asdict()
    return answer | {
        "kind": "lettered",
        "has_lesion": False,
        "reason": None,
        "burned_in": burned_in,
    }


def _reason(answer: dict[str, Any]) -> str | None:
    return "localizer" if answer["kind"] == "localizer" else None


def _write(
    folder: Path,
    visit: Visit,
    dataset: Dataset,
    stored: Iterator[Stored],
    grid: Grid,
    names: tuple[str | int, ...],
) -> dict[str, Any]:
    place = f"dicom/{digest(*names, 'folder') % 10**12:012d}"
    is_top_first = visit.profile.is_top_first
    bulk.write_long(
        folder / place, dataset, stored, grid=grid, names=names, is_top_first=is_top_first
    )
    is_localizer = "LOCALIZER" in dataset.ImageType
    return {
        "folder": place,
        "kind": "localizer" if is_localizer else "image",
        "modality": str(dataset.Modality),
        "patient": visit.patient,
        "time": visit.time,
        "StudyInstanceUID": str(dataset.StudyInstanceUID),
        "SeriesInstanceUID": str(dataset.SeriesInstanceUID),
        "num_files": grid.num_slices,
        "has_lesion": visit.has_lesion,
        "label": None,
        "identifiers": visit.identifiers | {k: str(dataset[k].value) for k in DERIVED},
    }


def _write_label(folder: Path, visit: Visit, seed: int, scan: Scan, grid: Grid) -> str | None:
    """Write the label map a hospital has: none for some patients, the organ only at some sites."""
    if digest(visit.patient, "label") % UNLABELLED_SHARE == 0:
        return None
    labels = bulk.labels_of(scan, grid)
    if visit.profile.name in ORGAN_ONLY:
        labels = np.where(labels == LESION, ORGAN, labels).astype(np.uint8)
    name = f"labels/{digest(seed, visit.patient, visit.time, 'label file') % 10**12:012d}.nii.gz"
    write_labels(folder / name, labels, grid=grid)
    return name


def _describe(
    visit: Visit, profile: HospitalProfile, grid: Grid, *, number: int, seed: int
) -> Dataset:
    dataset = describe_series(grid, profile, patient=visit.patient, seed=seed)
    time = str(visit.time)
    dataset.StudyInstanceUID = make_uid(seed, visit.patient, "study", time)
    dataset.SeriesInstanceUID = make_uid(seed, visit.patient, "series", time, number)
    dataset.FrameOfReferenceUID = make_uid(seed, visit.patient, "frame of reference", time)
    for kind in ("Study", "Series", "Acquisition", "Content"):
        setattr(dataset, f"{kind}Date", f"{visit.day:%Y%m%d}")
    dataset.SeriesNumber, dataset.StudyID = number, str(visit.time + 1)
    for keyword in PLAIN:
        setattr(dataset, keyword, visit.identifiers[keyword])
    dataset.ImageComments = visit.identifiers["ImageComments"]
    request = Dataset()
    request.RequestedProcedureID = visit.identifiers["RequestedProcedureID"]
    request.ScheduledProcedureStepID = "1"
    dataset.RequestAttributesSequence = [request]
    block = dataset.private_block(0x0029, "PHANTOM PRIVATE 1.0", create=True)
    block.add_new(0x10, "LO", visit.identifiers["private"])
    return dataset


#: Identifiers that stand in an attribute of their own.
PLAIN = (
    "PatientName",
    "PatientID",
    "OtherPatientNames",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "OperatorsName",
    "AccessionNumber",
    "StudyDescription",
)


#: Identifiers that follow from the visit.
DERIVED = ("PatientBirthDate", "StudyDate", "InstitutionName", "StationName")


def _identifiers(rng: np.random.Generator) -> dict[str, str]:
    """Return invented identifiers by where they are planted; no two places share one."""
    names = [
        f"{FAMILY[rng.integers(len(FAMILY))]}{rng.integers(100, 1000)}^"
        f"{GIVEN[rng.integers(len(GIVEN))]}"
        for _ in range(6)
    ]
    patient = names[0].split("^")[0]
    return {
        "PatientName": names[0],
        "PatientID": f"PID{rng.integers(10**8, 10**9)}",
        "OtherPatientNames": names[1],
        "PatientAddress": f"{rng.integers(1, 200)} {names[2].split('^')[0].title()} Lane",
        "PatientTelephoneNumbers": f"+00 555 {rng.integers(10**6, 10**7)}",
        "ReferringPhysicianName": names[3],
        "PerformingPhysicianName": names[4],
        "OperatorsName": names[5],
        "AccessionNumber": f"ACC{rng.integers(10**8, 10**9)}",
        "StudyDescription": f"Abdomen {patient.title()} follow-up",
        "ImageComments": f"seen with {patient} at bed {rng.integers(1, 400)}",
        "RequestedProcedureID": f"REQ{rng.integers(10**8, 10**9)}",
        "private": f"{patient} MRN{rng.integers(10**8, 10**9)}",
    }


def _make_localizer(dataset: Dataset) -> None:
    kind = "AXIAL" if dataset.Modality == "CT" else "M"
    dataset.ImageType = [v for v in dataset.ImageType if v != kind] + ["LOCALIZER"]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def _localizer(scan: Scan, profile: HospitalProfile) -> Iterator[Stored]:
    """Yield the body seen from the front, stretched to a square."""
    size = scan.hu.shape[1]
    front = scan.hu.mean(axis=1)[::-1]
    rows = np.arange(size) * len(front) // size
    seen = scan._replace(hu=np.ascontiguousarray(front[rows][None]))
    yield from bulk.make_slices(seen, profile, num_slices=1, rng=make_generator("localizer"))


def _plant(folder: Path, seed: int, names: list[str]) -> list[dict[str, Any]]:
    """Write broken series between the good ones, under names that say nothing."""
    answers = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for case in write_hard_cases(Path(scratch), seed, names=names):
            place = f"dicom/{digest(seed, folder.name, case.name, 'folder') % 10**12:012d}"
            (Path(scratch) / case.name).rename(folder / place)
            answers.append(
                {
                    "folder": place,
                    "kind": "planted",
                    "case": case.name,
                    "num_files": len(case.files),
                    "reason": case.reason,
                }
            )
    return answers

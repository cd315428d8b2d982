"""Writes the made-up hospitals to a disk: series, label maps and a manifest each."""

import csv
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from shared_models.phantoms.anatomy import Grid, draw_scan
from shared_models.phantoms.files import write_labels, write_series
from shared_models.phantoms.profiles import HOSPITALS, HospitalProfile
from shared_models.phantoms.seeds import digest, make_generator

NUM_SLICES = (4, 6)
BLOCK = 20  # patients within which lesions are dealt out
SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2


class ManifestRow(NamedTuple):
    """One series; `image` (a folder) and `mask` are relative to the manifest's folder."""

    image: str
    patient: str
    site: str
    split: str
    finding: int
    mask: str


def write_hospitals(
    root: Path,
    *,
    seed: int,
    profiles: Iterable[HospitalProfile] = HOSPITALS,
    num_patients: int | None = None,
    size: int = 96,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write one folder per hospital and return the folders.

    Each holds `series/<patient>/<n>.dcm`, `masks/<patient>.nii.gz` and `manifest.csv`. A hospital's
    bytes depend on the seed, its profile and the size alone, and its first patients are the same
    however many there are.

    Args:
        root: Created if need be; must not yet hold a folder of a hospital's name.
        seed: Decides everything.
        profiles: The hospitals.
        num_patients: Patients in each hospital; None takes the profiles' numbers.
        size: Rows and columns of a slice.
        progress: Called after each patient with the number of patients written so far.

    Raises:
        ValueError: There is no patient to write, or too few pixels to draw one.
        FileExistsError: A hospital's folder, or a file called `root`, is already there.

    Guarantees:
        The same seed writes the same bytes. A failure leaves nothing half-written.
    """
    profiles = list(profiles)
    _check(root, profiles, num_patients=num_patients, size=size)
    root.mkdir(parents=True, exist_ok=True)
    num_written = 0
    with tempfile.TemporaryDirectory(prefix=".phantoms-", dir=root) as unfinished:
        for profile in profiles:
            rows = []
            folder = Path(unfinished) / profile.name
            (folder / "masks").mkdir(parents=True)
            for index in range(profile.num_patients if num_patients is None else num_patients):
                rows.append(_write_patient(folder, profile, index=index, seed=seed, size=size))
                num_written += 1
                if progress is not None:
                    progress(num_written)
            _write_manifest(folder / "manifest.csv", rows)
        return [(Path(unfinished) / p.name).rename(root / p.name) for p in profiles]


def _check(
    root: Path, profiles: list[HospitalProfile], *, num_patients: int | None, size: int
) -> None:
    if num_patients is not None and num_patients < 1:
        raise ValueError(f"expected num_patients of at least 1, got {num_patients}")
    if size < 16:
        raise ValueError(f"expected size of at least 16 pixels, got {size}")
    names = [profile.name for profile in profiles]
    if len(set(names)) != len(names):
        raise ValueError(f"expected hospitals with different names, got {', '.join(names)}")
    taken = [name for name in names if (root / name).exists()]
    if taken:
        raise FileExistsError(f"{root} already holds {', '.join(taken)}; choose an empty folder")


def _write_patient(
    folder: Path, profile: HospitalProfile, *, index: int, seed: int, size: int
) -> ManifestRow:
    patient = f"{profile.name}-{index + 1:04d}"
    has_lesion = _has_lesion(profile, index, seed=seed)
    grid = _lay_grid(profile, patient, seed=seed, size=size)
    scan = draw_scan(
        profile,
        grid,
        has_lesion=has_lesion,
        rng=make_generator(seed, patient, "anatomy"),
        lesion_rng=make_generator(seed, patient, "lesion"),
    )
    row = ManifestRow(
        image=f"series/{patient}",
        patient=patient,
        site=profile.name,
        split=SPLITS[digest(patient, "split") % len(SPLITS)],
        finding=int(has_lesion),
        mask=f"masks/{patient}.nii.gz",
    )
    write_series(
        folder / row.image, scan.hu, grid=grid, profile=profile, patient=patient, seed=seed
    )
    write_labels(folder / row.mask, scan.labels, grid=grid)
    return row


def _has_lesion(profile: HospitalProfile, index: int, *, seed: int) -> bool:
    """Deal lesions like cards, so that every block of patients has the profile's share."""
    block, place = divmod(index, BLOCK)
    dealt = make_generator(seed, profile.name, "lesions", block).permutation(BLOCK)
    return bool(dealt[place] < profile.lesion_fraction * BLOCK)


def _lay_grid(profile: HospitalProfile, patient: str, *, seed: int, size: int) -> Grid:
    """Return the voxels of a patient's series; the table stands a little differently each time."""
    rng = make_generator(seed, patient, "table")
    spacing_mm = round(profile.field_of_view_mm / size, 3)
    corner_mm = -spacing_mm * (size - 1) / 2
    return Grid(
        num_slices=int(rng.integers(NUM_SLICES[0], NUM_SLICES[1] + 1)),
        size=size,
        spacing_mm=spacing_mm,
        thickness_mm=profile.slice_thickness_mm,
        origin_mm=(
            round(corner_mm + rng.uniform(-20, 20), 3),
            round(corner_mm + rng.uniform(-20, 20), 3),
            round(rng.uniform(-250, -150), 3),
        ),
    )


def _write_manifest(file: Path, rows: list[ManifestRow]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(ManifestRow._fields)
        writer.writerows(rows)

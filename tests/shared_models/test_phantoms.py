import csv
import hashlib
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from shared_models.phantoms import HOSPITALS, HospitalProfile, write_hospitals

NUM_PATIENTS = 20


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = write_hospitals(
        tmp_path_factory.mktemp("phantoms"), seed=1, num_patients=NUM_PATIENTS, size=64
    )
    return {folder.name: folder for folder in folders}


@pytest.fixture(params=HOSPITALS, ids=lambda profile: profile.name)
def profile(request: pytest.FixtureRequest) -> HospitalProfile:
    chosen: HospitalProfile = request.param
    return chosen


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def read_manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_series(folder: Path) -> list[pydicom.Dataset]:
    """Return the slices from the feet up."""
    slices = [pydicom.dcmread(file) for file in folder.iterdir()]
    return sorted(slices, key=lambda ds: ds.ImagePositionPatient[2])


def read_hu(slices: list[pydicom.Dataset]) -> np.ndarray:
    """Return the series as (z, y, x), HU."""
    return np.stack(
        [ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices]
    )


def read_labels(file: Path) -> np.ndarray:
    """Return the label map as (z, y, x), 0 / 1 organ / 2 lesion."""
    mask: Any = nib.load(file)
    return np.asarray(mask.dataobj).transpose(2, 1, 0)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("once", "again"):
        write_hospitals(tmp_path / name, seed=3, num_patients=2, size=32)
    assert fingerprint(tmp_path / "once") == fingerprint(tmp_path / "again")


def test_the_order_of_hospitals_changes_nothing(tmp_path: Path) -> None:
    write_hospitals(tmp_path / "once", seed=3, num_patients=2, size=32)
    write_hospitals(
        tmp_path / "again", seed=3, profiles=reversed(HOSPITALS), num_patients=2, size=32
    )
    assert fingerprint(tmp_path / "once") == fingerprint(tmp_path / "again")


def test_more_patients_leave_the_first_ones_as_they_were(tmp_path: Path) -> None:
    profiles = HOSPITALS[:1]
    write_hospitals(tmp_path / "few", seed=3, profiles=profiles, num_patients=2, size=32)
    write_hospitals(tmp_path / "many", seed=3, profiles=profiles, num_patients=3, size=32)
    few, many = fingerprint(tmp_path / "few"), fingerprint(tmp_path / "many")
    assert {file for file in few if few[file] != many[file]} == {"st_anna/manifest.csv"}


def test_another_seed_writes_other_pictures_and_other_uids(tmp_path: Path) -> None:
    for seed in (3, 4):
        write_hospitals(tmp_path / str(seed), seed=seed, num_patients=1, size=32)
    file = "lakeside/series/lakeside-0001/1.dcm"
    one, other = (pydicom.dcmread(tmp_path / seed / file) for seed in ("3", "4"))
    assert one.PixelData != other.PixelData
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        assert one[keyword].value != other[keyword].value


def test_every_hospital_has_its_own_number_of_patients(tmp_path: Path) -> None:
    small = tuple(p._replace(num_patients=n) for n, p in enumerate(HOSPITALS, start=1))
    folders = write_hospitals(tmp_path, seed=3, profiles=small, size=16)
    assert [folder.name for folder in folders] == [p.name for p in HOSPITALS]
    assert [len(read_manifest(folder)) for folder in folders] == [1, 2, 3]


def test_manifest_lists_every_series_and_mask(
    hospitals: dict[str, Path], profile: HospitalProfile
) -> None:
    folder = hospitals[profile.name]
    rows = read_manifest(folder)
    assert list(rows[0]) == ["image", "patient", "site", "split", "finding", "mask"]
    assert {row["site"] for row in rows} == {profile.name}
    assert {folder / row["image"] for row in rows} == set((folder / "series").iterdir())
    assert {folder / row["mask"] for row in rows} == set((folder / "masks").iterdir())


def test_every_patient_has_several_slices_at_even_distances(
    hospitals: dict[str, Path], profile: HospitalProfile
) -> None:
    for series in (hospitals[profile.name] / "series").iterdir():
        slices = read_series(series)
        heights = [ds.ImagePositionPatient[2] for ds in slices]
        assert 4 <= len(slices) <= 6
        assert np.diff(heights) == pytest.approx(profile.slice_thickness_mm)
        assert len({ds.SeriesInstanceUID for ds in slices}) == 1


def test_files_are_ct_images_of_marked_patients(
    hospitals: dict[str, Path], profile: HospitalProfile
) -> None:
    for row in read_manifest(hospitals[profile.name]):
        for ds in read_series(hospitals[profile.name] / row["image"]):
            assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == CTImageStorage
            assert ds.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
            assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
            assert ds.PatientID == row["patient"]
            assert str(ds.PatientName).startswith("PHANTOM^")
            assert ds.Manufacturer == profile.Manufacturer
            assert ds.ConvolutionKernel == profile.ConvolutionKernel
            assert ds.PixelRepresentation == profile.is_signed


def test_no_uid_is_used_twice(hospitals: dict[str, Path]) -> None:
    files = [file for folder in hospitals.values() for file in folder.rglob("*.dcm")]
    uids = Counter(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in files)
    assert uids.most_common(1)[0][1] == 1
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in uids)


def test_only_north_clinic_numbers_slices_from_the_top(hospitals: dict[str, Path]) -> None:
    for name, folder in hospitals.items():
        slices = read_series(next((folder / "series").iterdir()))
        numbers = [int(ds.InstanceNumber) for ds in slices]
        assert numbers == sorted(numbers, reverse=name == "north_clinic")


def test_slope_and_intercept_give_hounsfield_units(
    hospitals: dict[str, Path], profile: HospitalProfile
) -> None:
    folder = hospitals[profile.name]
    for row in read_manifest(folder):
        hu = read_hu(read_series(folder / row["image"]))
        labels = read_labels(folder / row["mask"])
        assert -1200 < hu.min() < -900
        assert 150 < hu.max() < 600
        assert np.median(hu[labels == 1]) == pytest.approx(profile.organ_hu, abs=15)
        assert hu[:, :3, :3].mean() == pytest.approx(-1000, abs=25)  # air


def test_noise_is_the_profiles(hospitals: dict[str, Path], profile: HospitalProfile) -> None:
    folder = hospitals[profile.name]
    deviations = []
    for row in read_manifest(folder):
        hu = read_hu(read_series(folder / row["image"]))
        labels = read_labels(folder / row["mask"])
        values = hu[labels == 1]
        deviations.append(1.4826 * np.median(np.abs(values - np.median(values))))
    assert profile.noise_hu < np.median(deviations) < 1.5 * profile.noise_hu  # texture adds some


def test_a_lesion_stands_out_and_runs_through_every_slice(
    hospitals: dict[str, Path], profile: HospitalProfile
) -> None:
    folder = hospitals[profile.name]
    for row in read_manifest(folder):
        labels = read_labels(folder / row["mask"])
        assert (labels == 1).any(axis=(1, 2)).all()
        if row["finding"] == "0":
            assert set(np.unique(labels)) == {0, 1}
            continue
        assert (labels == 2).any(axis=(1, 2)).all()
        hu = read_hu(read_series(folder / row["image"]))
        assert hu[labels == 2].mean() - hu[labels == 1].mean() > 3 * profile.noise_hu


def test_a_voxel_lies_at_the_same_point_by_dicom_and_by_nifti(
    hospitals: dict[str, Path], profile: HospitalProfile
) -> None:
    folder = hospitals[profile.name]
    for row in read_manifest(folder)[:3]:
        slices = read_series(folder / row["image"])
        mask: Any = nib.load(folder / row["mask"])
        assert mask.shape == (slices[0].Columns, slices[0].Rows, len(slices))
        assert mask.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(mask.get_qform(), mask.get_sform(), atol=1e-3)
        for x, y, z in ((0, 0, 0), (5, 40, 2), (63, 1, len(slices) - 1)):
            ds = slices[z]
            across, down = np.reshape(ds.ImageOrientationPatient, (2, 3)).astype(float)
            row_mm, column_mm = ds.PixelSpacing  # between rows, between columns: PS3.3 10.7.1.3
            lps = np.array(ds.ImagePositionPatient, float) + across * column_mm * x
            lps += down * row_mm * y
            ras = mask.affine @ (x, y, z, 1)
            np.testing.assert_allclose(ras[:3], lps * (-1, -1, 1), atol=1e-3)


def test_the_organ_lies_on_the_patients_right(hospitals: dict[str, Path]) -> None:
    for folder in hospitals.values():
        mask: Any = nib.load(next((folder / "masks").iterdir()))
        labels = np.asarray(mask.dataobj)
        middle = mask.affine @ (*(np.array(labels.shape) / 2), 1)
        organ = mask.affine @ (*np.argwhere(labels == 1).mean(axis=0), 1)
        assert organ[0] > middle[0]  # RAS: the first axis points to the patient's right


def test_findings_have_the_profiles_share(
    hospitals: dict[str, Path], profile: HospitalProfile
) -> None:
    findings = [int(row["finding"]) for row in read_manifest(hospitals[profile.name])]
    assert np.mean(findings) == pytest.approx(profile.lesion_fraction)


def test_splits_are_about_seven_one_two(hospitals: dict[str, Path]) -> None:
    splits = [row["split"] for folder in hospitals.values() for row in read_manifest(folder)]
    shares = {split: count / len(splits) for split, count in Counter(splits).items()}
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.1)


def test_a_patients_split_does_not_depend_on_the_seed(
    hospitals: dict[str, Path], tmp_path: Path
) -> None:
    other = write_hospitals(tmp_path, seed=2, num_patients=NUM_PATIENTS, size=16)
    for folder in other:
        before, after = read_manifest(hospitals[folder.name]), read_manifest(folder)
        assert [row["split"] for row in before] == [row["split"] for row in after]


def test_a_lesion_changes_nothing_else_about_a_patient(tmp_path: Path) -> None:
    scans, masks = [], []
    for fraction in (0.0, 1.0):
        profile = HOSPITALS[0]._replace(lesion_fraction=fraction)
        (folder,) = write_hospitals(
            tmp_path / str(fraction), seed=3, profiles=[profile], num_patients=1, size=64
        )
        (row,) = read_manifest(folder)
        scans.append(read_hu(read_series(folder / row["image"])))
        masks.append(read_labels(folder / row["mask"]))
    lesion = np.argwhere(masks[1] == 2)[:, 1:]
    changed = np.argwhere(scans[0] != scans[1])[:, 1:]
    assert (masks[1][masks[0] == 0] == 0).all()
    assert (changed.min(axis=0) >= lesion.min(axis=0) - 3).all()
    assert (changed.max(axis=0) <= lesion.max(axis=0) + 3).all()


def test_progress_counts_patients(tmp_path: Path) -> None:
    counts: list[int] = []
    write_hospitals(tmp_path, seed=3, num_patients=2, size=16, progress=counts.append)
    assert counts == [1, 2, 3, 4, 5, 6]


def test_a_failure_leaves_nothing_half_written(tmp_path: Path) -> None:
    def fail(num_written: int) -> None:
        if num_written == 5:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_hospitals(tmp_path, seed=3, num_patients=2, size=16, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.write_text("mine")
    with pytest.raises(FileExistsError):
        write_hospitals(root, seed=3, num_patients=1, size=16)
    assert root.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_an_unwritable_root_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        write_hospitals(tmp_path, seed=3, num_patients=1, size=16)
    assert list(tmp_path.iterdir()) == []


def test_existing_hospitals_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "lakeside").mkdir()
    with pytest.raises(FileExistsError, match="already holds lakeside; choose an empty folder"):
        write_hospitals(tmp_path, seed=3, num_patients=1, size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["lakeside"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_patients": 0}, "expected num_patients of at least 1, got 0"),
        ({"size": 8}, "expected size of at least 16 pixels, got 8"),
        ({"profiles": HOSPITALS[:1] * 2}, "different names, got st_anna, st_anna"),
    ],
)
def test_impossible_wishes_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_hospitals(tmp_path / "root", seed=3, **options)
    assert not (tmp_path / "root").exists()


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy of dicom3tools")
def test_dciodvfy_finds_no_errors(hospitals: dict[str, Path], profile: HospitalProfile) -> None:
    for series in list((hospitals[profile.name] / "series").iterdir())[:3]:
        for file in series.iterdir():
            verdict = subprocess.run(
                ["dciodvfy", "-new", str(file)], capture_output=True, text=True, check=False
            )
            assert "Error" not in verdict.stderr + verdict.stdout

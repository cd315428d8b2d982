import csv
import hashlib
import io
import json
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

from shared_models.phantoms import (
    HOSPITALS,
    VENDORS,
    HospitalProfile,
    bulk,
    write_archives,
    write_hospitals,
)
from shared_models.phantoms.anatomy import ANYWHERE, USUAL, Grid, draw_body
from shared_models.phantoms.files import describe_series
from shared_models.phantoms.profiles import MR_HOSPITAL
from shared_models.phantoms.seeds import make_generator
from shared_models.series import SeriesRefused, read_files, scan, verdict

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


# --- long series


def write_long(
    folder: Path, profile: HospitalProfile, *, num_slices: int = 23, size: int = 48
) -> Grid:
    grid = Grid(num_slices, size, 300 / size, 1.25, (-150.0, -140.5, -300.0))
    body = bulk.draw_long(profile, grid, person=(1, "p"), has_lesion=True)
    slices = bulk.make_slices(body, profile, num_slices=num_slices, rng=make_generator(1, "noise"))
    dataset = describe_series(grid, profile, patient="p", seed=1)
    top_first = profile.is_top_first
    bulk.write_long(folder, dataset, slices, grid=grid, names=(1, "p"), is_top_first=top_first)
    return grid


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda profile: profile.name)
def test_a_patched_file_is_what_pydicom_writes(tmp_path: Path, vendor: HospitalProfile) -> None:
    write_long(tmp_path / "s", vendor)
    uids = set()
    for file in (tmp_path / "s").iterdir():
        dataset, again = pydicom.dcmread(file), io.BytesIO()
        assert int(dataset.InstanceNumber) == int(file.stem)
        assert dataset.SliceLocation == dataset.ImagePositionPatient[2]
        assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID
        assert dataset.SOPInstanceUID.is_valid
        pydicom.dcmwrite(again, dataset, enforce_file_format=True)
        assert again.getvalue() == file.read_bytes()
        uids.add(dataset.SOPInstanceUID)
    assert len(uids) == 23


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda profile: profile.name)
def test_a_long_series_is_one_volume_in_the_scanners_units(
    tmp_path: Path, vendor: HospitalProfile
) -> None:
    grid = write_long(tmp_path / "s", vendor)
    volume = read_files((tmp_path / "s").iterdir())
    assert volume.data.shape == (23, 48, 48)
    assert volume.affine[:3, 3] == pytest.approx(grid.origin_mm)
    assert volume.spacing_mm == pytest.approx((1.25, 6.25, 6.25))
    if vendor.Modality == "MR":
        assert 0 <= volume.data.min() < 40 < 800 < volume.data.max()
    else:
        assert volume.data[:, :3, :3].mean() == pytest.approx(-1000, abs=20)  # air


def test_neighbours_share_their_body_but_not_their_noise(tmp_path: Path) -> None:
    write_long(tmp_path / "s", HOSPITALS[0])
    data = read_files((tmp_path / "s").iterdir()).data
    assert bulk.SLICES_PER_BODY == 10
    deviation = (data[1] - data[0]).std() / np.sqrt(2)
    assert deviation == pytest.approx(HOSPITALS[0].noise_hu, rel=0.25)


def test_the_bias_field_makes_one_edge_of_an_mr_picture_brighter(tmp_path: Path) -> None:
    rows = []
    for bias in (0.0, MR_HOSPITAL.bias_field):
        write_long(tmp_path / str(bias), MR_HOSPITAL._replace(bias_field=bias))
        rows.append(read_files((tmp_path / str(bias)).iterdir()).data.mean(axis=(0, 2)))
    field = rows[1][12:36] / rows[0][12:36]
    assert field[-1] > 1.15 * field[0]
    assert (np.diff(field) > -0.02).all()


def test_bodies_lie_anywhere_when_asked_to() -> None:
    grid = Grid(1, 64, 5.0, 5.0, (0, 0, 0))
    spread = []
    for build in (USUAL, ANYWHERE):
        rows = []
        for person in range(12):
            rng, other = make_generator(person), make_generator(person, "lesion")
            body = draw_body(
                HOSPITALS[0], grid, has_lesion=False, rng=rng, lesion_rng=other, build=build
            )
            rows.append(np.argwhere(body.labels == 1).mean(axis=0)[1:])
        spread.append(np.std(rows, axis=0))
    assert (spread[1] > 2 * spread[0]).all()


# --- archives


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("archives")
    folders = write_archives(root, 1, num_patients=2, num_slices=12, size=48, num_planted=3)
    return {folder.name: folder for folder in folders}


def answers_of(folder: Path) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = json.loads((folder / "answers.json").read_text())["series"]
    return answers


def test_the_key_says_what_a_reader_finds(archives: dict[str, Path]) -> None:
    for folder in archives.values():
        for answer in answers_of(folder):
            files = sorted((folder / answer["folder"]).iterdir())
            assert len(files) == answer["num_files"]
            if answer["reason"] is None:
                assert read_files(files).modality == answer["modality"]
                continue
            with pytest.raises(SeriesRefused) as caught:
                read_files(files)
            assert caught.value.reason == answer["reason"]


def test_all_files_of_an_archive_at_once_fall_into_its_series(archives: dict[str, Path]) -> None:
    for folder in archives.values():
        good = [a for a in answers_of(folder) if a["kind"] == "image"]
        found = scan(sorted((folder / "dicom").rglob("*.dcm")))
        read = {s.slices[0].series: s for s in found if verdict(s).is_ok}
        for answer in good:
            assert len(read[answer["SeriesInstanceUID"]].files) == answer["num_files"]


def test_four_vendors_visits_series_and_gaps_in_the_labels(archives: dict[str, Path]) -> None:
    answers = {name: answers_of(folder) for name, folder in archives.items()}
    assert [p.name for p in VENDORS] == list(answers)
    assert {a["modality"] for every in answers.values() for a in every if "modality" in a} == {
        "CT",
        "MR",
    }
    for every in answers.values():
        images = [a for a in every if a["kind"] == "image"]
        visits = Counter((a["patient"], a["time"]) for a in images)
        assert set(visits.values()) == {2}
        assert Counter(time for _, time in visits) == {0: 2, 1: 1}
    labelled = [a["label"] is not None for e in answers.values() for a in e if a["kind"] == "image"]
    assert 0 < sum(labelled) < len(labelled)


def test_labels_lie_on_their_series_and_one_site_has_the_organ_only(
    archives: dict[str, Path],
) -> None:
    seen: dict[str, set[int]] = {}
    for name, folder in archives.items():
        for answer in answers_of(folder):
            if not answer.get("label"):
                continue
            labels = read_labels(folder / answer["label"])
            volume = read_files((folder / answer["folder"]).iterdir())
            assert labels.shape == volume.data.shape
            seen.setdefault(name, set()).update(np.unique(labels).tolist())
    assert seen["north_clinic"] <= {0, 1}
    assert any(2 in values for values in seen.values())


def test_a_lesion_grows_from_visit_to_visit(tmp_path: Path) -> None:
    profile = HOSPITALS[0]._replace(lesion_fraction=1.0)
    (folder,) = write_archives(
        tmp_path, 2, num_patients=8, num_slices=10, size=64, num_planted=0, profiles=[profile]
    )
    sizes: dict[str, dict[int, int]] = {}
    for answer in answers_of(folder):
        if answer.get("label"):
            lesion = int((read_labels(folder / answer["label"]) == 2).sum())
            sizes.setdefault(answer["patient"], {})[answer["time"]] = lesion
    twice = [times for times in sizes.values() if len(times) == 2]
    assert twice
    assert all(times[1] > times[0] for times in twice)


def test_every_planted_identifier_stands_in_the_files_and_in_no_name(
    archives: dict[str, Path],
) -> None:
    for folder in archives.values():
        names = " ".join(str(file.relative_to(folder)) for file in folder.rglob("*"))
        for answer in answers_of(folder):
            for place, identifier in answer.get("identifiers", {}).items():
                assert identifier not in names, place
                for file in (folder / answer["folder"]).iterdir():
                    assert identifier.encode() in file.read_bytes(), place


def test_text_stands_in_the_pixels_of_the_lettered_series_only(tmp_path: Path) -> None:
    def drawn(name: str, **rest: int) -> dict[str, np.ndarray]:
        (folder,) = write_archives(
            tmp_path / name, 5, num_patients=1, num_slices=2, size=256, num_planted=0,
            profiles=HOSPITALS[:1], **rest,
        )  # fmt: skip
        return {
            answer["kind"] + str(answer.get("burned_in", {}).get("text", "")): read_files(
                (folder / answer["folder"]).iterdir()
            ).data
            for answer in answers_of(folder)
            if answer["reason"] is None
        }

    plain, lettered = drawn("without", num_lettered=0), drawn("with", num_lettered=2)
    assert len(lettered) == len(plain) + 2
    for name, data in lettered.items():
        if name in plain:
            assert np.array_equal(data, plain[name])
        else:
            in_both = (data[0] == data[1]) & (data[0] > data[0].min())  # letters, unlike noise
            assert in_both.sum() > 200


def test_the_same_seed_writes_the_same_archives(tmp_path: Path) -> None:
    small = {"num_patients": 1, "num_slices": 3, "size": 16, "num_planted": 2}
    for name, seed in (("once", 3), ("again", 3), ("other", 4)):
        write_archives(tmp_path / name, seed, **small)
    once, again, other = (fingerprint(tmp_path / name) for name in ("once", "again", "other"))
    assert once == again
    assert not set(once) & {file for file in other if not file.endswith("answers.json")}


def test_existing_archives_are_not_overwritten_and_none_are_half_written(tmp_path: Path) -> None:
    (tmp_path / "lakeside").mkdir()
    with pytest.raises(FileExistsError, match="already holds lakeside"):
        write_archives(tmp_path, 3, num_patients=1)
    with pytest.raises(ValueError, match="at least one patient"):
        write_archives(tmp_path, 3, num_patients=0)

    def fail(num_written: int) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_archives(tmp_path / "a", 3, num_patients=1, num_slices=2, size=16, progress=fail)
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy of dicom3tools")
def test_dciodvfy_finds_no_errors_in_an_archive(archives: dict[str, Path]) -> None:
    for folder in archives.values():
        for answer in answers_of(folder)[:6]:
            if answer["kind"] == "planted":
                continue
            file = folder / answer["folder"] / "1.dcm"
            found = subprocess.run(
                ["dciodvfy", "-new", str(file)], capture_output=True, text=True, check=False
            )
            assert "Error" not in found.stderr + found.stdout

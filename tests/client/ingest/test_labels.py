"""Labels come in under pseudonyms, whole or not at all, and a map lies on its image's grid."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.sr.codedict import codes
from typer.testing import CliRunner

from client import cli
from client import config as configs
from client.ingest import catalogue, labels, maps
from client.ingest.desk import Report, opened
from client.ingest.labels import Taken
from client.ingest.manifest import write_manifest
from shared_models.errors import DataError
from shared_models.volume import Volume, read_volume


@pytest.fixture
def source(archive: Any, tmp_path: Path) -> Path:
    """Return a folder of the archive's good series only."""
    folder = tmp_path / "source"
    for answer in archive.answers:
        if not answer["reason"]:
            shutil.copytree(archive.folder / answer["folder"], folder / answer["folder"])
    return folder


def good(archive: Any) -> list[dict[str, Any]]:
    return [answer for answer in archive.answers if not answer["reason"]]


def table(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def taken(site_dir: Path, file: Path, *, labelled: str = "words", **given: bool) -> Taken:
    settings = configs.read(site_dir / "site.toml").ingest.model_copy(update={"labels": labelled})
    with opened(settings) as (connection, key):
        found = labels.take(file, settings, connection, key, **given)
        write_manifest(settings, connection)
    return found


def manifest(site_dir: Path) -> list[dict[str, str]]:
    with (site_dir / "ingest" / "store" / "manifest.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


@contextmanager
def looking(site_dir: Path) -> Iterator[Any]:
    with catalogue.opened(site_dir / "ingest" / "private" / "catalogue.sqlite") as connection:
        yield connection


def test_labels_by_patient_study_and_series_reach_the_manifest(
    take: Callable[..., Report], site_dir: Path, archive: Any, source: Path, tmp_path: Path
) -> None:
    take(source)
    one, *rest = good(archive)
    rows = [{"patient": a["identifiers"]["PatientID"], "series": "", "split": ""} for a in rest]
    by_patient = {row["patient"]: row | {"label": "clear", "split": "test"} for row in rows}
    by_patient.pop(one["identifiers"]["PatientID"], None)
    mine = {"patient": "", "series": one["SeriesInstanceUID"], "label": "opaque", "split": ""}
    found = taken(site_dir, table(tmp_path / "labels.csv", [mine, *by_patient.values()]))
    assert found.splits == len(by_patient)
    listed = manifest(site_dir)
    assert len(listed) == found.labels
    assert {row["label"] for row in listed} == {"clear", "opaque"}
    assert {row["split"] for row in listed if row["label"] == "clear"} == {"test"}
    assert all(row["patient"].startswith("P-") for row in listed)


def test_what_is_wrong_is_told_by_line_and_nothing_is_taken(
    take: Callable[..., Report], site_dir: Path, archive: Any, source: Path, tmp_path: Path
) -> None:
    take(source)
    number = good(archive)[0]["identifiers"]["PatientID"]
    file = table(
        tmp_path / "labels.csv",
        [
            {"patient": number, "label": "MARKED-good", "split": ""},
            {"patient": "MARKED-7731", "label": "clear", "split": ""},
            {"patient": number, "label": "MARKED-other", "split": ""},
            {"patient": number, "label": "", "split": "MARKED"},
            {"patient": "", "label": "clear", "split": ""},
            {"patient": number, "label": "", "split": ""},
        ],
    )
    with pytest.raises(DataError) as caught:
        taken(site_dir, file)
    told = "\n".join(caught.value.objections)
    for line, words in (
        (3, "no image here"),
        (4, "a second, other label"),
        (5, "expected a split"),
        (6, "expected a patient"),
        (7, "expected a label"),
    ):
        assert f"line {line}: {words}" in told
    assert "MARKED" not in told
    assert number not in told
    assert manifest(site_dir) == []


def test_lines_of_unknown_patients_are_left_out_if_asked(
    take: Callable[..., Report], site_dir: Path, archive: Any, source: Path, tmp_path: Path
) -> None:
    take(source)
    number = good(archive)[0]["identifiers"]["PatientID"]
    rows = [{"patient": one, "label": "clear"} for one in (number, "MARKED-7731")]
    found = taken(site_dir, table(tmp_path / "labels.csv", rows), skip_unknown=True)
    assert found.skipped == 1
    assert found.labels >= 1


def test_a_label_map_is_kept_on_its_images_grid_without_what_else_its_file_says(
    take: Callable[..., Report], site_dir: Path, archive: Any, source: Path, tmp_path: Path
) -> None:
    take(source)
    answers = [answer for answer in good(archive) if answer.get("label")]
    rows, truths = [], {}
    for number, answer in enumerate(answers):
        image = nibabel.load(archive.folder / answer["label"])
        image.header["descrip"] = b"MARKED-7731"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"MARKED-7731"))
        if number % 2:  # as another program would have turned it
            image = image.as_reoriented([[0, -1], [1, 1], [2, -1]])
        nibabel.save(image, tmp_path / f"MARKED-{number}.nii.gz")
        rows.append({"series": answer["SeriesInstanceUID"], "map": f"MARKED-{number}.nii.gz"})
        truths[number] = read_volume(archive.folder / answer["label"]).data
    found = taken(site_dir, table(tmp_path / "maps.csv", rows), labelled="maps")
    assert found.maps == len(answers) > 2
    listed = manifest(site_dir)
    assert len(listed) == len(answers)
    store = site_dir / "ingest" / "store"
    kept = [read_volume(store / row["label"]) for row in listed]
    for row, map_ in zip(listed, kept, strict=True):
        image_volume = read_volume(store / row["image"])
        assert np.allclose(map_.affine, image_volume.affine, atol=1e-3)
        assert map_.data.shape == image_volume.data.shape
    assert sorted(m.data.tobytes() for m in kept) == sorted(t.tobytes() for t in truths.values())
    for file in store.rglob("*.nii.gz"):
        assert b"MARKED" not in nibabel.load(file).to_bytes()
        assert "MARKED" not in str(file.relative_to(site_dir))


def test_a_map_on_another_grid_is_refused_by_its_line(
    take: Callable[..., Report], site_dir: Path, archive: Any, source: Path, tmp_path: Path
) -> None:
    take(source)
    answer = next(answer for answer in good(archive) if answer.get("label"))
    image = nibabel.load(archive.folder / answer["label"])
    moved = image.affine.copy()
    moved[2, 3] += 0.4 * abs(moved[2, 2])
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), moved), tmp_path / "map.nii.gz")
    rows = [{"series": answer["SeriesInstanceUID"], "map": "map.nii.gz"}]
    with pytest.raises(DataError, match=r"line 2: the label map's grid is not the image's"):
        taken(site_dir, table(tmp_path / "maps.csv", rows), labelled="maps")


GRID = Volume(np.zeros((4, 5, 6), np.float32), np.diag([0.5, 0.75, 2.0, 1.0]))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flipped", [(), (0,), (1, 2)])
def test_a_map_is_turned_onto_its_image(axes: tuple[int, ...], flipped: tuple[int, ...]) -> None:
    truth = np.arange(120, dtype=np.float32).reshape(4, 5, 6)
    along = truth.transpose(2, 1, 0)  # x, y, z
    turn = np.eye(4)[:, [*axes, 3]]
    turned = along.transpose(axes)
    for axis in flipped:
        turned = np.flip(turned, axis)
        back = np.eye(4)
        back[axis, axis], back[axis, 3] = -1, turned.shape[axis] - 1
        turn = turn @ back
    map_ = Volume(np.ascontiguousarray(turned.transpose(2, 1, 0)), GRID.affine @ turn)
    assert np.array_equal(maps.onto(map_, GRID), truth)


def test_a_map_of_some_slices_is_filled_up() -> None:
    affine = GRID.affine.copy()
    affine[2, 3] = 2.0
    part = Volume(np.ones((2, 5, 6), np.float32), affine)
    assert maps.onto(part, GRID).sum(axis=(1, 2)).tolist() == [0, 30, 30, 0]


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan, 70_000.0])
def test_what_are_no_labels_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="expected"):
        maps.onto(GRID._replace(data=np.full((4, 5, 6), value, np.float32)), GRID)


# pydicom warns of what highdicom reads
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dicom_segmentation_becomes_the_label_map_of_its_series(
    take: Callable[..., Report], site_dir: Path, archive: Any, tmp_path: Path
) -> None:
    answer = next(answer for answer in good(archive) if answer.get("label"))
    folder = tmp_path / "one"
    shutil.copytree(archive.folder / answer["folder"], folder)
    truth = read_volume(archive.folder / answer["label"]).data.astype(np.uint8)
    images = sorted(map(dcmread, folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    segmentation(images, truth).save_as(folder / "seg.dcm")
    report = take(folder, labels="maps")
    assert (report.accepted, report.label_maps, report.refused) == (1, 1, {})
    (row,) = manifest(site_dir)
    kept = read_volume(site_dir / "ingest" / "store" / row["label"])
    assert np.array_equal(kept.data, truth)
    with looking(site_dir) as connection:
        (one,) = catalogue.listed(connection)
    assert one.map is not None
    kinds = [codes.SCT.Liver, codes.SCT.Lesion][: int(truth.max())]
    assert one.map.names == {n: kind.meaning.lower() for n, kind in enumerate(kinds, start=1)}


def segmentation(images: list[Any], truth: np.ndarray[Any, Any]) -> highdicom.seg.Segmentation:
    kinds = [codes.SCT.Liver, codes.SCT.Lesion][: int(truth.max())]
    return highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=truth,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label="MARKED-7731",
                segmented_property_category=codes.SCT.Organ,
                segmented_property_type=kind,
                algorithm_type="MANUAL",
            )
            for number, kind in enumerate(kinds, start=1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=9,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="Phantom",
        manufacturer_model_name="Phantom",
        software_versions="1",
        device_serial_number="1",
    )


def test_a_patient_who_is_forgotten_is_gone(
    take: Callable[..., Report],
    site_dir: Path,
    archive: Any,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take(source)
    monkeypatch.chdir(site_dir)
    numbers = {answer["identifiers"]["PatientID"] for answer in good(archive)}
    before = len(list((site_dir / "ingest" / "store").glob("P-*")))
    assert before == len(numbers)
    runner = CliRunner()
    gone = runner.invoke(cli.app, ["data", "forget", numbers.pop()])
    assert gone.exit_code == 0, gone.output
    assert len(list((site_dir / "ingest" / "store").glob("P-*"))) == before - 1
    assert isinstance(runner.invoke(cli.app, ["data", "forget", "MARKED"]).exception, DataError)

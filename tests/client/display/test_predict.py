"""A released model on a study, from the command line to what lies in the folder."""

from __future__ import annotations

import json
import logging
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from typer.testing import CliRunner

from client import predict as predicting
from client.cli import app
from client.display.prediction import Classified, Outlined
from client.predict import Choice, predict, read
from shared_models.errors import ConsiliaError, DataError, DocumentError, SignatureError

FILES = {"prediction.json", "doctor.html", "patient.html"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_regions_are_measured_on_the_studys_own_voxels(
    new_model: Callable[..., Any], series: Path, tmp_path: Path
) -> None:
    model = new_model()
    found = predict(model.folder, series, tmp_path / "out", coordinator=model.coordinator)
    assert isinstance(found.answer, Outlined)
    header = pydicom.dcmread(next(series.iterdir()))
    num_slices = len(list(series.iterdir()))
    y, x = (float(step) for step in header.PixelSpacing)
    segmented = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
    drawn = int(segmented.pixel_array.astype(bool).sum())
    assert sum(region.num_voxels for region in found.answer.regions) == drawn
    assert found.study.num_slices == num_slices and found.study.rows == 48
    assert found.study.spacing_mm is not None
    voxel_ml = found.study.spacing_mm[0] * y * x / 1000
    for region in found.answer.regions:
        if region.num_voxels:
            assert region.volume_ml == pytest.approx(region.num_voxels * voxel_ml, rel=1e-3)
            assert sum(region.voxels_by_slice) == region.num_voxels
            assert max(region.voxels_by_slice) == region.voxels_by_slice[region.largest_slice - 1]  # type: ignore[operator]


def test_classes_are_the_mean_over_slices_and_add_up(
    classifier: Any, series: Path, tmp_path: Path
) -> None:
    found = predict(classifier.folder, series, tmp_path / "out", coordinator=classifier.coordinator)
    answer = found.answer
    assert isinstance(answer, Classified)
    assert sum(one.probability for one in answer.classes) == pytest.approx(1, abs=2e-4)
    assert len(answer.by_slice) == len(list(series.iterdir()))
    assert np.mean(answer.by_slice) == pytest.approx(answer.classes[0].probability, abs=2e-4)
    assert any("matches how often it is right" in text for text in found.cautions)
    assert found.files == ("classes.dcm", "key-image-1.dcm")


def test_the_same_study_gives_the_same_answer(
    new_model: Callable[..., Any], series: Path, tmp_path: Path
) -> None:
    model = new_model()
    one, other = (
        predict(model.folder, series, tmp_path / name, coordinator=model.coordinator)
        for name in ("one", "other")
    )
    assert one.model_copy(update={"created": other.created}) == other
    assert read(tmp_path / "one" / "prediction.json") == one


def test_who_the_patient_is_stands_where_it_should_and_nowhere_else(
    new_model: Callable[..., Any],
    series: Path,
    tmp_path: Path,
    marks: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    model = new_model()
    for place, file in enumerate(sorted(series.iterdir())):  # identifying names, as exports give
        file.rename(series / f"QUILLFEATHER_{place}.dcm")
    arguments = ["predict", str(model.folder), str(series), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--coordinator", model.coordinator])
    assert done.exit_code == 0, done.output
    said = done.output + caplog.text + "".join(capfd.readouterr())
    names = " ".join(path.name for path in (tmp_path / "out").iterdir())
    patient = (tmp_path / "out" / "patient.html").read_text()
    assert not [mark for mark in marks if mark in said + names + patient]
    doctor = (tmp_path / "out" / "doctor.html").read_text()
    assert "QUILLFEATHER ZENOBIA" in doctor and "MRN-7731-QX" in doctor and "1947-03-13" in doctor
    assert "UMBERSLADE" not in doctor and "SERIES-OF-QUILL" not in doctor
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o077 == 0


def test_the_command_takes_the_coordinator_from_the_sites_own_settings(
    new_model: Callable[..., Any], site_text: str, series: Path, tmp_path: Path
) -> None:
    (tmp_path / "site.toml").write_text(site_text)
    arguments = ["predict", str(new_model().folder), str(series), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--config", str(tmp_path / "site.toml"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert set(told["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert told["answer"]["kind"] == "map"


@pytest.mark.parametrize("what", ["tampered", "stranger", "modality", "exists", "broken"])
def test_what_is_refused_leaves_nothing_behind(
    what: str, new_model: Callable[..., Any], series: Path, tmp_path: Path, marks: tuple[str, ...]
) -> None:
    model, out = new_model(modalities=("MR",) if what == "modality" else ("CT",)), tmp_path / "out"
    coordinator, expected = model.coordinator, ConsiliaError
    if what == "tampered":
        (model.folder / "weights.safetensors").write_bytes(b"other")
        expected = DocumentError
    if what == "stranger":
        coordinator, expected = "f" * 64, SignatureError
    if what == "modality":
        expected = DataError
    if what == "exists":
        out.mkdir()
        expected = DocumentError
    if what == "broken":
        for file in series.iterdir():
            file.write_bytes(file.read_bytes()[:-100])
        expected = DataError
    with pytest.raises(expected) as refused:
        predict(model.folder, series, out, coordinator=coordinator)
    assert not [mark for mark in marks if mark in str(refused.value)]
    assert not out.exists() or not list(out.iterdir())
    assert not list(tmp_path.glob(".*partial*"))


def test_a_write_that_fails_leaves_nothing_behind(
    new_model: Callable[..., Any],
    series: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = new_model()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predicting, "create", full)
    with pytest.raises(OSError, match="No space"):
        predict(model.folder, series, tmp_path / "out", coordinator=model.coordinator)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_release_that_says_no_modality_needs_a_persons_word(
    new_model: Callable[..., Any], series: Path, tmp_path: Path
) -> None:
    model, out = new_model(modalities=()), tmp_path / "out"
    with pytest.raises(DataError, match="state the modality it was made for with --modality"):
        predict(model.folder, series, out, coordinator=model.coordinator)
    found = predict(
        model.folder, series, out, coordinator=model.coordinator, choice=Choice(modality="CT")
    )
    assert "The release does not say which kind of images it was validated on." in found.cautions


def test_a_nifti_volume_and_a_picture_give_pages_only(
    new_model: Callable[..., Any], tmp_path: Path
) -> None:
    plain = [{"name": "standardize"}, {"name": "resize", "params": {"size": [16, 16]}}]
    model = new_model(modalities=("MR", "OT"), imaging=plain)
    data = np.random.Generator(np.random.PCG64(0)).random((12, 14, 5)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "v.nii.gz")
    Image.fromarray((255 * data[..., 0]).astype(np.uint8)).save(tmp_path / "p.png")
    for name, kind in (("v.nii.gz", "NIfTI volume"), ("p.png", "picture")):
        out = tmp_path / kind
        found = predict(model.folder, tmp_path / name, out, coordinator=model.coordinator)
        assert {path.name for path in out.iterdir()} == FILES and found.files == ()
        assert found.study.kind == kind and found.study.patient_name == ""
        assert any("no DICOM answer" in text for text in found.cautions)
        assert isinstance(found.answer, Outlined)
        has_volume = [
            region.volume_ml is not None for region in found.answer.regions if region.num_voxels
        ]
        assert has_volume and set(has_volume) == {kind == "NIfTI volume"}


def test_a_volume_is_given_whole_to_a_net_of_three_dimensions(
    new_model: Callable[..., Any], tmp_path: Path
) -> None:
    net = {"name": "unet", "params": {"spatial_dims": 3, "channels": [4, 8], "strides": [2]}}
    steps = [{"name": "standardize"}, {"name": "crop-or-pad", "params": {"size": [8, 8, 8]}}]
    model = new_model(modalities=("MR",), net=net, imaging=steps)
    data = np.random.Generator(np.random.PCG64(0)).random((10, 12, 9)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "v.nii.gz")
    out = tmp_path / "out"
    found = predict(model.folder, tmp_path / "v.nii.gz", out, coordinator=model.coordinator)
    assert (found.study.num_slices, found.study.rows, found.study.columns) == (9, 12, 10)
    assert any("The model saw 47 % of the image" in text for text in found.cautions)

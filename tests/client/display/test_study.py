"""The one series a model is for is found; everything else is refused without an identifier."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from client.display.study import directions, headers, open_study
from shared_models.errors import DataError


def other_series(series: Path, **changes: object) -> None:
    """Put a second series into the study."""
    uid = generate_uid()
    for file in sorted(series.iterdir()):
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID = uid
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        for keyword, value in changes.items():
            setattr(dataset, keyword, value)
        dataset.save_as(series / f"other-{file.name}")


def test_a_series_is_read_in_the_order_of_its_headers(series: Path) -> None:
    found = open_study(series, modalities=("CT",))
    heights = [float(header.ImagePositionPatient[2]) for header in headers(found)]
    assert heights == sorted(heights) and len(heights) == found.volume.data.shape[0]
    assert found.kind == "DICOM series" and found.shown is found.volume
    assert found.identity.name == "QUILLFEATHER ZENOBIA"
    for header, plane in zip(headers(found), found.volume.data, strict=True):
        stored = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
        np.testing.assert_array_equal(plane, stored.astype(np.float32))


def test_the_wrong_modality_is_refused_by_name(series: Path) -> None:
    with pytest.raises(DataError, match="the model reads MR") as refused:
        open_study(series, modalities=("MR",))
    assert "1 series of modality CT" in str(refused.value)


def test_several_series_are_refused_until_one_is_chosen(
    series: Path, marks: tuple[str, ...]
) -> None:
    other_series(series)
    with pytest.raises(DataError) as refused:
        open_study(series, modalities=("CT",))
    assert "choose one with --series" in str(refused.value)
    assert "--series 2: CT, " in str(refused.value)
    assert not [mark for mark in marks if mark in str(refused.value)]
    found = [open_study(series, modalities=("CT",), number=n) for n in (1, 2)]
    assert len({one.slices[0].series for one in found}) == 2
    with pytest.raises(DataError, match="expected --series from 1 to 2, got 3"):
        open_study(series, modalities=("CT",), number=3)


def test_of_two_series_the_one_of_the_models_modality_is_taken(series: Path) -> None:
    other_series(series, Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    assert open_study(series, modalities=("CT",)).volume.modality == "CT"


def test_a_series_that_is_no_volume_is_refused_with_the_reason(series: Path) -> None:
    sorted(series.iterdir())[2].unlink()
    with pytest.raises(DataError, match=r"1 refused: .*missing"):
        open_study(series, modalities=("CT",))


def test_what_may_be_a_broken_slice_is_refused_and_what_is_none_is_not(series: Path) -> None:
    (series / "LICENSE.txt").write_text("free")
    open_study(series, modalities=("CT",))
    (series / "slice-7").write_bytes(b"torn")
    with pytest.raises(DataError, match="may be a broken slice"):
        open_study(series, modalities=("CT",))


def test_a_study_that_is_not_there_is_refused_without_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        open_study(tmp_path / "quill", modalities=("CT",))
    assert "quill" not in str(refused.value)


def test_a_nifti_volume_is_shown_from_the_feet_up_with_the_patients_left_on_the_right(
    tmp_path: Path,
) -> None:
    data = np.zeros((4, 6, 8), np.float32)
    data[1, 2, 3] = 1  # (x, y, z), x to the left, y to the front
    nibabel.save(nibabel.Nifti1Image(data, np.diag([-1.0, 2.0, 3.0, 1.0])), tmp_path / "v.nii.gz")
    found = open_study(tmp_path / "v.nii.gz", modalities=("MR",))
    assert found.slices == () and found.kind == "NIfTI volume"
    assert directions(found.shown.affine) == ("R", "L", "A", "P")
    assert np.argwhere(found.shown.data).tolist() == [[3, 3, 1]]
    with pytest.raises(DataError, match="state it with --modality"):
        open_study(tmp_path / "v.nii.gz", modalities=("CT",))
    stated = open_study(tmp_path / "v.nii.gz", modalities=("CT",), stated="CT")
    assert stated.volume.modality == "CT"


def test_a_picture_goes_with_models_for_films_only(tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "film.png")
    assert open_study(tmp_path / "film.png", modalities=("DX",)).kind == "picture"
    with pytest.raises(DataError, match="counts as OT, the model reads CT"):
        open_study(tmp_path / "film.png", modalities=("CT",))
    with pytest.raises(DataError, match="greys are no CT values"):
        open_study(tmp_path / "film.png", modalities=("CT",), stated="CT")


def test_the_real_chest_is_chosen_and_the_head_phantoms_scouts_are_not(
    data_dir: Path, tmp_path: Path
) -> None:
    chest = open_study(data_dir / "dicom" / "ct_siemens_sensation10_chest", modalities=("CT",))
    assert chest.volume.data.shape == (30, 512, 512)
    assert directions(chest.shown.affine) == ("R", "L", "A", "P")
    source = data_dir / "dicom" / "mr_ge_signa_hdxt_deidentified"
    shutil.copytree(source, tmp_path / "fruit")
    fruit = open_study(tmp_path / "fruit", modalities=("MR",))
    assert directions(fruit.shown.affine) == ("A", "P", "H", "F")  # sagittal

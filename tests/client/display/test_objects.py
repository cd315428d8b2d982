"""DICOM answers say what the model said, of the right voxels, and validators accept them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.sr import _concepts_dict as concepts

from client.display import codes, maps, objects
from client.display.objects import Origin
from client.display.prediction import ClassShare, Region
from client.display.release import open_release
from client.display.study import headers, open_study
from client.predict import predict
from shared_models.errors import DataError

Labels = NDArray[np.uint8]
VALIDATOR = shutil.which("dciodvfy")


@pytest.fixture
def origin_of(new_model: Callable[..., Any]) -> Callable[[Path], Origin]:
    """Return what takes a folder of DICOM files for the study of a model's answer."""

    def make(folder: Path, number: int | None = None) -> Origin:
        model = new_model(modalities=("CT", "MR"))
        released = open_release(model.folder, coordinator=model.coordinator)
        study = open_study(folder, modalities=("CT", "MR"), number=number)
        return Origin(study, released, datetime(2026, 3, 1, tzinfo=UTC))

    return make


def drawn(shape: tuple[int, ...]) -> Labels:
    """Return two regions, each in some slices only, with no symmetry to hide a mistake behind."""
    labels = np.zeros(shape, np.uint8)
    labels[1 : shape[0] // 2 + 1, 3:9, 5 : shape[2] // 2] = 1
    labels[shape[0] // 2 :, shape[1] // 2 :: 2, 2:7] = 2
    return labels


def regions_of(labels: Labels) -> tuple[Region, ...]:
    return tuple(
        Region(
            name=name,
            colour="#e69f00",
            num_voxels=int((labels == number).sum()),
            share_of_image=0.1,
            volume_ml=1.5 * number,
        )
        for number, name in enumerate(("organ", "lesion"), 1)
    )


def written(dataset: Any, file: Path) -> Any:
    """Return a data set as it is read from a disk."""
    dataset.save_as(file, enforce_file_format=True)
    return pydicom.dcmread(file)


def read_back(segmented: Any, origin: Origin) -> Labels:
    """Return the label map a reader finds, by the source instance (and frame) each frame names."""
    places = {(one.instance, one.frame + 1): z for z, one in enumerate(origin.study.slices)}
    found = np.zeros(origin.study.shown.data.shape, np.uint8)
    frames = np.atleast_3d(segmented.pixel_array)
    for mask, groups in zip(frames, segmented.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        key = (str(source.ReferencedSOPInstanceUID), int(source.get("ReferencedFrameNumber", 1)))
        if "SegmentIdentificationSequence" not in groups:  # there is one segment only
            groups = segmented.SharedFunctionalGroupsSequence[0]
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[places[key]][mask > 0] = number
    return found


REAL = {
    "a CT of a chest": ("ct_siemens_sensation10_chest", None),
    "a sagittal MR": ("mr_ge_signa_hdxt_deidentified", None),
    "an enhanced MR": ("mr_siemens_vida_enhanced_multiframe", 1),
}


@pytest.mark.parametrize("what", ["a phantom", *REAL])
def test_every_voxel_of_a_segmentation_is_read_back_where_it_was(
    what: str,
    origin_of: Callable[..., Origin],
    series: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if what == "a phantom":
        origin = origin_of(series)
    else:
        name, number = REAL[what]
        origin = origin_of(request.getfixturevalue("data_dir") / "dicom" / name, number)
    labels = drawn(origin.study.shown.data.shape)
    made = objects.segmentation(labels, regions_of(labels), headers(origin.study), origin)
    segmented = written(made, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_back(segmented, origin), labels)
    volume = highdicom.seg.Segmentation.from_dataset(segmented).get_volume(combine_segments=True)
    np.testing.assert_array_equal(in_place(volume, origin), labels)


def in_place(volume: Any, origin: Origin) -> Labels:
    """Return highdicom's volume on the study's voxels, by where in the patient each lies."""
    (z, y, x) = np.nonzero(volume.array)
    there = volume.affine @ np.stack([z, y, x, np.ones_like(z)])
    back = np.linalg.inv(origin.study.shown.affine) @ there
    column, row, slice_ = np.rint(back[:3]).astype(int)
    assert np.abs(back[:3] - np.rint(back[:3])).max() < 0.02
    found = np.zeros(origin.study.shown.data.shape, np.uint8)
    found[slice_, row, column] = volume.array[z, y, x]
    return found


def test_a_region_without_a_voxel_is_left_out_and_the_others_keep_their_names(
    origin_of: Callable[..., Origin], series: Path, tmp_path: Path
) -> None:
    origin = origin_of(series)
    labels = drawn(origin.study.shown.data.shape)
    labels[labels == 1] = 0
    made = objects.segmentation(labels, regions_of(labels), headers(origin.study), origin)
    segmented = written(made, tmp_path / "seg.dcm")
    (segment,) = segmented.SegmentSequence
    assert (segment.SegmentNumber, segment.SegmentLabel) == (1, "lesion")
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    np.testing.assert_array_equal(read_back(segmented, origin), labels // 2)


def numbers(item: Any) -> Iterator[tuple[str, float, str]]:
    """Yield (what, value, unit) of every number in a report."""
    if item.get("ValueType") == "NUM":
        value = item.MeasuredValueSequence[0]
        unit = value.MeasurementUnitsCodeSequence[0].CodeValue
        yield item.ConceptNameCodeSequence[0].CodeMeaning, float(value.NumericValue), unit
    for child in item.get("ContentSequence", ()):
        yield from numbers(child)


def test_a_report_tells_each_regions_volume_and_which_segment_it_is(
    origin_of: Callable[..., Origin], series: Path, tmp_path: Path
) -> None:
    origin = origin_of(series)
    labels, sources = drawn(origin.study.shown.data.shape), headers(origin.study)
    segmented = objects.segmentation(labels, regions_of(labels), sources, origin)
    made = objects.measured_regions(regions_of(labels), segmented, sources, origin)
    report = written(made, tmp_path / "sr.dcm")
    assert list(numbers(report)) == [("Volume", 1.5, "ml"), ("Volume", 3.0, "ml")]
    assert report.CompletionFlag == "PARTIAL" and report.VerificationFlag == "UNVERIFIED"
    groups = highdicom.sr.srread(tmp_path / "sr.dcm").content
    found = groups.get_volumetric_roi_measurement_groups()
    assert [group.reference_type.meaning for group in found] == ["Referenced Segment"] * 2
    assert segmented.SOPInstanceUID in str(report)


def test_a_report_tells_the_certainty_of_each_class_in_percent(
    origin_of: Callable[..., Origin], series: Path, tmp_path: Path
) -> None:
    origin = origin_of(series)
    shares = [
        ClassShare(name="lesion", probability=0.75),
        ClassShare(name="organ", probability=0.25),
    ]
    report = written(objects.classes(shares, headers(origin.study), origin), tmp_path / "sr.dcm")
    assert list(numbers(report)) == [
        ("Certainty of Finding", 75.0, "%"),
        ("Certainty of Finding", 25.0, "%"),
    ]


def test_a_key_image_names_its_source_and_its_directions(
    origin_of: Callable[..., Origin], series: Path, tmp_path: Path
) -> None:
    origin = origin_of(series)
    sources, pixels = headers(origin.study), np.zeros((20, 30, 3), np.uint8)
    pixels[4, 5] = (255, 128, 0)
    made = objects.key_image(pixels, 2, sources, origin, number=1)
    found = written(made, tmp_path / "sc.dcm")
    (reference,) = found.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == sources[2].SOPInstanceUID
    assert list(found.PatientOrientation) == ["L", "P"]
    np.testing.assert_array_equal(found.pixel_array, pixels)


@pytest.mark.skipif(VALIDATOR is None, reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("what", ["segmentation", "classification", "a film"])
def test_a_validator_finds_no_error_in_any_object(
    what: str,
    new_model: Callable[..., Any],
    classifier: Any,
    series: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model, study = classifier, series
    if what == "segmentation":
        model = new_model(name="unet")
    if what == "a film":
        model = new_model(name="film", modalities=("DX",), imaging=FILM)
        study = request.getfixturevalue("data_dir") / "dicom" / "pseudo_phi_headers_and_pixels"
    folder = tmp_path / "out"
    found = predict(model.folder, study, folder, coordinator=model.coordinator)
    assert len(found.files) >= 2
    for name in found.files:
        done = subprocess.run([str(VALIDATOR), folder / name], capture_output=True, text=True)
        errors = [line for line in done.stderr.splitlines() if line.startswith("Error")]
        assert errors == [], name


FILM = [{"name": "standardize"}, {"name": "resize", "params": {"size": [32, 32]}}]


def test_objects_are_of_the_sources_patient_and_study_and_say_what_they_are(
    new_model: Callable[..., Any], series: Path, tmp_path: Path
) -> None:
    model = new_model()
    found = predict(model.folder, series, tmp_path / "out", coordinator=model.coordinator)
    source = pydicom.dcmread(next(series.iterdir()))
    seen = []
    for name in found.files:
        dataset = pydicom.dcmread(tmp_path / "out" / name)
        for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "AccessionNumber"):
            assert dataset[keyword] == source[keyword]
        assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
        assert "not for diagnosis" in dataset.SeriesDescription
        seen.append((dataset.Modality, dataset.SeriesInstanceUID, dataset.SOPInstanceUID))
    assert len({uid for *_, uid in seen}) == len(seen)
    assert len({pair[:2] for pair in seen}) == 3  # the key images are one series


def test_what_a_header_breaks_is_refused_without_its_words(
    origin_of: Callable[..., Origin], series: Path, marks: tuple[str, ...]
) -> None:
    origin = origin_of(series)
    labels, sources = drawn(origin.study.shown.data.shape), headers(origin.study)
    for source in sources:
        del source.StudyInstanceUID
    with pytest.raises(DataError, match="--no-dicom") as refused:
        objects.segmentation(labels, regions_of(labels), sources, origin)
    assert refused.value.__cause__ is None
    assert not [mark for mark in marks if mark in str(refused.value)]


def test_every_code_means_what_the_standard_says() -> None:
    known: dict[str, set[str]] = {}
    for entries in concepts.concepts["SCT"].values():
        for code, (meaning, _) in entries.items():
            known.setdefault(code, set()).add(meaning.lower())
    for category, types in codes.KNOWN.items():
        for value, meaning in (category, *types.values(), codes.TISSUE):
            assert meaning.lower() in known[value]


def test_an_unknown_class_is_told_by_a_private_code() -> None:
    category, type_ = codes.coded("Ground glass \\ opacity" * 5, number=7)
    assert category.value == codes.TISSUE[0]
    assert (type_.value, type_.scheme_designator) == ("CLASS-7", "99CONSILIA")
    assert len(type_.meaning) == 64 and "\\" not in type_.meaning


def test_colours_are_those_of_the_study_report() -> None:
    from shared_models.tasks.segmentation import COLOURS

    expected = ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in COLOURS.values()]
    assert list(maps.COLOURS) == expected

"""What the reader promises, on made-up series, on real ones and beside other readers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, uid

from shared_models import series, stored
from shared_models.phantoms.hard import CASES, write_hard_cases
from shared_models.reasons import REASONS, Fault, Reason
from shared_models.series import SeriesRefused, read, read_files, scan, verdict
from shared_models.slices import Layout

TWELVE = Layout(2, 3, 16, 12, 11, False, False, False)
SET_ASIDE = ("localizer", "secondary-capture", "not-image")


def test_every_reason_has_its_sentence_and_a_cure_or_a_cause() -> None:
    assert set(REASONS) == set(get_args(Reason))
    assert all(len(sentence) > 20 for sentence in REASONS.values())


def test_every_reason_a_file_can_give_is_tried() -> None:
    tried = {reason for reason, _ in CASES.values()} | set(SET_ASIDE)
    assert set(REASONS) - tried == {"empty", "too-large"}


def test_no_files_are_no_volume() -> None:
    with pytest.raises(SeriesRefused) as caught:
        read_files([])
    assert caught.value.reason == "empty"


def test_a_volume_of_too_many_voxels_is_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = write_hard_cases(tmp_path, 1, names=["plain"])
    monkeypatch.setattr(series, "MOST_VOXELS", 100)
    monkeypatch.setattr(series.np, "empty", None)
    with pytest.raises(SeriesRefused) as caught:
        read_files(case.files)
    assert caught.value.reason == "too-large"


def test_a_series_changed_between_scan_and_read_is_refused(tmp_path: Path) -> None:
    (case,) = write_hard_cases(tmp_path, 1, names=["plain"])
    (found,) = scan(case.files)
    case.files[3].write_bytes(case.files[3].read_bytes()[:-50])
    with pytest.raises(SeriesRefused) as caught:
        read(found)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("bits", [8, 10, 12, 13, 16])
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("shift", [0, 3])
def test_every_stored_number_is_read_as_the_standard_says(
    bits: int, is_signed: bool, shift: int
) -> None:
    """PS3.5 8.1.1: the stored bits end at HighBit, negative numbers are two's complement."""
    shift = min(shift, 16 - bits)
    layout = TWELVE._replace(bits_stored=bits, high_bit=bits - 1 + shift, is_signed=is_signed)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (0, (1 << bits) - 1)
    numbers = np.arange(low, high + 1)
    cells = ((numbers & ((1 << bits) - 1)) << shift).astype("<u2")
    kind = "<i2" if is_signed else "<u2"
    assert np.array_equal(stored._checked(cells.view(kind), layout), numbers)
    extended = (numbers << shift).astype(kind)
    assert np.array_equal(stored._checked(extended, layout), numbers)


@pytest.mark.parametrize("shift", [0, 2])
def test_a_bit_set_outside_the_stored_ones_is_noticed(shift: int) -> None:
    layout = TWELVE._replace(high_bit=11 + shift)
    for bit in {0, 1, 14, 15} - set(range(shift, 12 + shift)):
        with pytest.raises(Fault, match="stray-bits"):
            stored._checked(np.full((2, 3), (5 << shift) | (1 << bit), "<u2"), layout)


@pytest.mark.parametrize(
    ("slope", "intercept"), [(1, -1024), (2, 0), (0.5, -3), (0.1, 0.7), (1e-6, 3e4), (3, 1.25)]
)
def test_rescaling_is_exact_to_the_last_float32_bit(
    tmp_path: Path, slope: float, intercept: float
) -> None:
    (case,) = write_hard_cases(tmp_path, 1, names=["plain"])
    datasets = [pydicom.dcmread(file) for file in case.files]
    for file, dataset in zip(case.files, datasets, strict=True):
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
        dataset.save_as(file)
    datasets.sort(key=lambda d: float(d.ImagePositionPatient[2]))
    exact = np.stack([d.pixel_array.astype(np.float64) for d in datasets]) * slope + intercept
    assert np.array_equal(read_files(case.files).data, exact.astype(np.float32))


def test_modality_lut_agrees_with_pydicoms(tmp_path: Path) -> None:
    """In every encoding its words come in, with inputs below and above the table."""
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
        (case,) = write_hard_cases(tmp_path / syntax, 1, names=["plain"])
        for file in case.files:
            dataset = pydicom.dcmread(file)
            item = Dataset()
            item.add_new("LUTDescriptor", "US", [256, 1000, 16])
            item.add_new("LUTData", "US", [v * v % 4096 for v in range(256)])
            item.ModalityLUTType = "US"
            del dataset.RescaleSlope, dataset.RescaleIntercept
            dataset.ModalityLUTSequence = [item]
            dataset.file_meta.TransferSyntaxUID = syntax
            pydicom.dcmwrite(file, dataset, implicit_vr=syntax.is_implicit_VR, little_endian=True)
        volume = read_files(case.files)
        datasets = [pydicom.dcmread(file) for file in case.files]
        datasets.sort(key=lambda d: float(d.ImagePositionPatient[2]))
        for d in datasets:
            d.ModalityLUTSequence[0].add_new("LUTDescriptor", "US", [256, 1000, 16])
        theirs = [pydicom.pixels.apply_modality_lut(d.pixel_array, d) for d in datasets]
        assert np.array_equal(volume.data, np.stack(theirs))


def test_monochrome1_means_the_same_in_every_slice(tmp_path: Path) -> None:
    (case,) = write_hard_cases(tmp_path, 1, names=["mr-inverted"])
    volume = read_files(case.files)
    for file in case.files:
        dataset = pydicom.dcmread(file)
        z = int(dataset.InstanceNumber) - 1
        assert np.array_equal(volume.data[z], 4095.0 - dataset.pixel_array)


def test_what_pydicom_warns_of_a_header_reaches_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    (case,) = write_hard_cases(tmp_path, 1, names=["run-length"])
    content = case.files[0].read_bytes()
    cut = content.index(b"\x08\x00\x08\x00CS")  # before ImageType
    charset = b"\x08\x00\x05\x00CS\x0a\x00MARKED-773"
    case.files[0].write_bytes(content[:cut] + charset + content[cut:])
    read_files(case.files)
    assert "MARKED" not in caplog.text + "".join(str(w.message) for w in recwarn)


# --- compressed transfer syntaxes


@pytest.mark.parametrize("name", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
def test_compressed_series_are_read_as_uncompressed_ones(tmp_path: Path, name: str) -> None:
    needed = {"JPEGLSLossless": "jpeg_ls", "JPEG2000Lossless": "openjpeg"}
    pytest.importorskip(needed.get(name, "pydicom"))
    (case,) = write_hard_cases(tmp_path, 1, names=["plain"])
    for file in case.files:
        dataset = pydicom.dcmread(file)
        dataset.compress(getattr(uid, name), generate_instance_uid=False)
        dataset.save_as(file)
    volume = read_files(case.files)
    assert case.expected is not None
    assert np.array_equal(volume.data, case.expected.data)


@pytest.mark.parametrize("name", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.97])
def test_a_compressed_stream_cut_short_is_refused(tmp_path: Path, name: str, share: float) -> None:
    needed = {"JPEGLSLossless": "jpeg_ls", "JPEG2000Lossless": "openjpeg"}
    pytest.importorskip(needed.get(name, "pydicom"))
    (case,) = write_hard_cases(tmp_path, 1, names=["plain"])
    dataset = pydicom.dcmread(case.files[4])
    dataset.compress(getattr(uid, name), generate_instance_uid=False)
    (stream,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = pydicom.encaps.encapsulate([stream[: int(len(stream) * share) & ~1]])
    dataset.save_as(case.files[4])
    with pytest.raises(SeriesRefused) as caught:
        read_files(case.files)
    assert caught.value.reason == "damaged"


# --- real images

Real = Callable[[str], list[Path]]
#: folder: for each series, in order of its first file's name: how many files, and its verdict
EXPECTED: dict[str, list[tuple[int, str | None]]] = {
    "ct_philips_burned_in_summary": [(1, "secondary-capture")] * 3,
    "ct_philips_ingenuity_phantom": [(1, "localizer"), (15, None)],
    "ct_siemens_sensation10_chest": [(30, None)],
    "mr_ge_mr750_epi": [(150, "same-position")],  # ten time points
    "mr_ge_signa_hdxt_deidentified": [(56, None)],
    "mr_siemens_skyra_epi": [(2, "mosaic"), (2, "mosaic")],
    "mr_siemens_trio_9_transfer_syntaxes": [(9, "mosaic")],
    "mr_siemens_vida_enhanced_multiframe": [(1, None)] * 8,
    "mr_toshiba_galan_dwi": [(40, None)],
    "mr_uih_umr770_dwi": [(17, "no-position")],  # many slices tiled into one picture
    "pseudo_phi_headers_and_pixels": [
        (1, None),  # a film
        (1, "no-pixels"),
        (1, "localizer"),
        (1, "secondary-capture"),
    ],
}


@pytest.fixture
def real(data_dir: Path) -> Real:
    def files(folder: str) -> list[Path]:
        if not (data_dir / "dicom" / folder).exists():
            pytest.skip(f"no {folder} among the real images")
        found = sorted((data_dir / "dicom" / folder).rglob("*"))
        return [f for f in found if f.is_file() and f.suffix not in (".txt", ".csv", ".xml", ".md")]

    return files


@pytest.mark.parametrize("folder", EXPECTED)
def test_real_series_are_read_or_rightly_refused(real: Real, folder: str) -> None:
    found = sorted(scan(real(folder)), key=lambda s: s.files[0])
    assert [(len(s.files), verdict(s).reason) for s in found] == EXPECTED[folder]
    for one in found:
        if verdict(one).is_ok:
            assert np.isfinite(read(one).data).all()


@pytest.mark.parametrize("folder", [f for f, v in EXPECTED.items() if (1, None) not in v])
def test_real_volumes_are_bit_equal_to_simpleitks(real: Real, folder: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    for one in scan(real(folder)):
        if not verdict(one).is_ok:
            continue
        volume = read(one)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(s.file) for s in series._stack(one).slices])
        image = reader.Execute()
        assert np.array_equal(volume.data, sitk.GetArrayFromImage(image).astype(np.float32))
        corners = itertools.product(*((0, size - 1) for size in image.GetSize()))
        for index in corners:
            theirs = image.TransformIndexToPhysicalPoint(index)
            assert np.allclose((volume.affine @ [*index, 1])[:3], theirs, atol=0.1)


def test_real_multi_frame_volumes_are_bit_equal_to_highdicoms(real: Real) -> None:
    highdicom = pytest.importorskip("highdicom")
    for file in real("mr_siemens_vida_enhanced_multiframe"):
        volume = read_files([file])
        theirs = highdicom.imread(file).get_volume(apply_real_world_transform=False)
        ours, both = volume.data, theirs.affine[:3, 0] @ volume.affine[:3, 2]
        assert np.array_equal(ours, theirs.array if both > 0 else theirs.array[::-1])


def test_nine_real_transfer_syntaxes_give_the_same_slice(real: Real, tmp_path: Path) -> None:
    """The slice is a mosaic; told to be none, so that only its decoding is judged."""
    pytest.importorskip("gdcm")
    read_slices = []
    for file in real("mr_siemens_trio_9_transfer_syntaxes"):
        dataset = pydicom.dcmread(file)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
        dataset.save_as(tmp_path / file.name)
        read_slices.append(read_files([tmp_path / file.name]))
    assert len(read_slices) == 9
    for volume in read_slices[1:]:
        assert np.array_equal(volume.data, read_slices[0].data)
        assert np.array_equal(volume.affine, read_slices[0].affine)


def test_no_real_header_is_told(real: Real) -> None:
    said: Any = " ".join(REASONS.values())
    for folder in EXPECTED:
        for file in real(folder)[:3]:
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            for keyword in ("PatientName", "PatientID", "SeriesDescription"):
                value = str(dataset.get(keyword, ""))
                assert len(value) < 4 or value not in said

"""An image comes with its place in the patient, or not at all, and nothing of it is ever told."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from shared_models.errors import DataError
from shared_models.volume import Volume, read_volume

MARK = "MARKED-7731"
SERIES = "1.2.826.0.1.3680043.8.498.1"
OBLIQUE = [0.8, 0.6, 0.0, -0.6, 0.8, 0.0]
GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def dicom_slice(pixels: np.ndarray, **attributes: Any) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID = SERIES
    dataset.Modality = "CT"
    dataset.PatientName = dataset.PatientID = MARK
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [0, 0, 0]
    dataset.PixelSpacing = [0.5, 0.25]
    dataset.SliceThickness = 3
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    dataset.PixelData = pixels.astype("<u2").tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def write(file: Path, dataset: Dataset) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file


def write_series(folder: Path, heights: list[float], **attributes: Any) -> Path:
    """Write a slice at each height; its pixels are its number, files are named in reverse."""
    for number, height in enumerate(heights):
        pixels = np.full((3, 4), number)
        place = {"ImagePositionPatient": [10, 20, height]} | attributes
        write(folder / f"{MARK}-{99 - number}.dcm", dicom_slice(pixels, **place))
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_volume(path)
    assert MARK not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def world(volume: Volume, *, z: int, y: int, x: int) -> np.ndarray:
    return np.asarray((volume.affine @ [x, y, z, 1.0])[:3])


# --- pictures


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tif", ".bmp"])
def test_a_picture_is_one_slice_of_one_millimetre_pixels(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(GREY).save(tmp_path / f"film{suffix}")
    volume = read_volume(tmp_path / f"film{suffix}")
    assert volume.data.dtype == np.float32
    assert np.array_equal(volume.data, GREY[None])
    assert volume.spacing_mm == (1.0, 1.0, 1.0)


def test_a_jpeg_is_read_as_others_read_it(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8) * 3
    Image.fromarray(smooth).save(tmp_path / "film.jpeg", quality=95)
    assert np.abs(read_volume(tmp_path / "film.jpeg").data[0] - smooth).max() <= 4


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 300
    Image.fromarray(deep).save(tmp_path / "film.png")
    assert np.array_equal(read_volume(tmp_path / "film.png").data, deep[None].astype(np.float32))


def test_fractions_and_negative_numbers_of_a_float_tiff_are_kept(tmp_path: Path) -> None:
    values = GREY.astype(np.float32) / 7 - 5
    Image.fromarray(values).save(tmp_path / "film.tif")
    assert np.array_equal(read_volume(tmp_path / "film.tif").data, values[None])


def test_a_coloured_picture_becomes_grey_by_luma(tmp_path: Path) -> None:
    """ITU-R BT.601, as Pillow documents for mode L."""
    rgb = np.zeros((2, 2, 3), np.uint8)
    rgb[0, 0], rgb[0, 1], rgb[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(rgb).save(tmp_path / "film.png")
    expected = np.round(rgb @ [0.299, 0.587, 0.114])
    assert np.abs(read_volume(tmp_path / "film.png").data[0] - expected).max() <= 1


def test_a_picture_of_several_pages_is_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(GREY + n) for n in range(3)]
    pages[0].save(tmp_path / f"{MARK}.tif", save_all=True, append_images=pages[1:])
    assert "several pages" in refusal(tmp_path / f"{MARK}.tif")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_a_truncated_png_is_refused_without_a_word_of_it(tmp_path: Path, share: float) -> None:
    text = PngInfo()
    text.add_text("PatientName", MARK)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    file = tmp_path / f"{MARK}.png"
    Image.fromarray(noise).save(file, pnginfo=text)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    assert "cannot read the image" in refusal(file)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".nii", ".nii.gz", ".dcm", ""])
def test_garbage_of_any_name_is_refused_without_a_word_of_it(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"{MARK}{suffix}"
    file.write_bytes(MARK.encode() * 100)
    assert refusal(file).startswith(("cannot read the image", "a file is no DICOM"))


def test_a_missing_file_is_told_without_its_name(tmp_path: Path) -> None:
    assert refusal(tmp_path / f"{MARK}.png").startswith("missing file")


# --- NIfTI


@pytest.mark.parametrize("name", ["brain.nii", "brain.nii.gz", "BRAIN.NII.GZ"])
def test_nifti_becomes_z_y_x_in_lps(tmp_path: Path, name: str) -> None:
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # x, y, z
    affine = nib.affines.from_matvec(
        np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ np.diag([2.0, 3.0, 4.0]), [5, 6, 7]
    )
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "brain.nii.gz")
    content = (tmp_path / "brain.nii.gz").read_bytes()
    if not name.lower().endswith(".gz"):
        nib.save(nib.Nifti1Image(data, affine), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    volume = read_volume(tmp_path / name)
    assert volume.data.shape == (4, 3, 2)
    assert volume.data.flags.c_contiguous
    for x, y, z in itertools.product(range(2), range(3), range(4)):
        assert volume.data[z, y, x] == data[x, y, z]
        right_anterior = nib.affines.apply_affine(affine, [x, y, z])
        assert np.allclose(world(volume, z=z, y=y, x=x), right_anterior * [-1, -1, 1], atol=1e-5)
    assert volume.spacing_mm == pytest.approx((4, 3, 2))


def test_the_scaling_of_a_nifti_is_applied(tmp_path: Path) -> None:
    image: Any = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(2.0, -1000.0)
    nib.save(image, tmp_path / "ct.nii.gz")
    expected = np.asarray(nib.load(tmp_path / "ct.nii.gz").get_fdata()).T
    assert np.array_equal(read_volume(tmp_path / "ct.nii.gz").data, expected.astype(np.float32))
    assert expected.min() == -1000


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 2), (4, 4, 1, 1, 3)])
def test_a_nifti_of_other_than_three_dimensions_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    file = tmp_path / f"{MARK}.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), file)
    assert f"expected three dimensions, got {len(shape)}" in refusal(file)


def test_a_truncated_nifti_is_refused(tmp_path: Path) -> None:
    file = tmp_path / f"{MARK}.nii.gz"
    noise = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, np.eye(4)), file)
    file.write_bytes(file.read_bytes()[:-200])
    assert "cannot read the image" in refusal(file)


# --- DICOM


def test_slices_are_stacked_by_position_whatever_their_names(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path / "s", [-30.0, -28.0, -26.0, -24.0]))
    assert [plane[0, 0] for plane in volume.data] == [0, 1, 2, 3]
    assert volume.spacing_mm == pytest.approx((2.0, 0.5, 0.25))
    assert volume.modality == "CT"


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], OBLIQUE, [0, 1, 0, 0, 0, -1]])
def test_every_voxel_lies_where_the_standard_says(tmp_path: Path, orientation: list[float]) -> None:
    """PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(row, column)
    origin = np.array([7.0, -3.0, 11.0])
    for number in range(3):
        place = list(origin + normal * 2.5 * number)
        write(
            tmp_path / "s" / f"{number}.dcm",
            dicom_slice(
                np.full((3, 4), number),
                ImageOrientationPatient=orientation,
                ImagePositionPatient=[round(v, 6) for v in place],
            ),
        )
    volume = read_volume(tmp_path / "s")
    for z, y, x in itertools.product(range(3), range(3), range(4)):
        standard = origin + normal * 2.5 * z + row * 0.25 * x + column * 0.5 * y
        assert np.allclose(world(volume, z=z, y=y, x=x), standard, atol=1e-4)
        assert volume.data[z, y, x] == z


def test_a_missing_slice_is_noticed(tmp_path: Path) -> None:
    folder = write_series(tmp_path / MARK, [0.0, 2.0, 4.0, 8.0, 10.0])
    assert "a slice is missing" in refusal(folder)


def test_a_duplicate_slice_is_noticed(tmp_path: Path) -> None:
    folder = write_series(tmp_path / MARK, [0.0, 2.0, 2.0, 4.0])
    assert "same position" in refusal(folder)


def test_slices_rounded_by_the_scanner_are_taken_as_even(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path / "s", [0.0, 1.33, 2.67, 4.0]))
    assert volume.spacing_mm[0] == pytest.approx(4 / 3)


def test_two_series_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / MARK, [0.0, 2.0])
    other = dicom_slice(GREY, SeriesInstanceUID=SERIES + ".2", ImagePositionPatient=[10, 20, 4])
    write(folder / "other.dcm", other)
    assert "expected one series" in refusal(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / MARK).mkdir()
    assert "holds no images" in refusal(tmp_path / MARK)


def test_slices_of_different_sizes_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / MARK, [0.0, 2.0])
    write(folder / "z.dcm", dicom_slice(np.zeros((5, 4)), ImagePositionPatient=[10, 20, 4]))
    refusal(folder)


def test_a_file_that_is_no_dicom_spoils_its_series(tmp_path: Path) -> None:
    folder = write_series(tmp_path / MARK, [0.0, 2.0])
    (folder / "notes.txt").write_text(MARK)
    refusal(folder)


def test_one_file_is_a_series_of_one(tmp_path: Path) -> None:
    volume = read_volume(write(tmp_path / "film.dcm", dicom_slice(GREY)))
    assert np.array_equal(volume.data, GREY[None])
    assert volume.spacing_mm == (3.0, 0.5, 0.25)


def test_a_film_without_a_place_in_the_patient_lies_in_the_detectors_plane(tmp_path: Path) -> None:
    film = dicom_slice(np.full((3, 4), 7), Modality="DX", ImagerPixelSpacing=[0.2, 0.1])
    for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
        delattr(film, keyword)
    volume = read_volume(write(tmp_path / "film.dcm", film))
    assert volume.data.tolist() == [[[7.0] * 4] * 3]
    assert volume.spacing_mm == (1.0, 0.2, 0.1)


def test_stored_values_become_hounsfield_units(tmp_path: Path) -> None:
    """PS3.3 C.11.1.1.2: output units = m * SV + b; here beside pydicom's own modality LUT."""
    dataset = dicom_slice(GREY, RescaleSlope="2.0", RescaleIntercept="-1024")
    volume = read_volume(write(tmp_path / "ct.dcm", dataset))
    theirs = pydicom.pixels.apply_rescale(GREY.astype(np.uint16), dataset)
    assert np.array_equal(volume.data[0], theirs.astype(np.float32))


def test_negative_stored_values_stay_negative(tmp_path: Path) -> None:
    signed = GREY.astype("<i2") - 100
    dataset = dicom_slice(GREY, PixelRepresentation=1, PixelData=signed.tobytes())
    volume = read_volume(write(tmp_path / "ct.dcm", dataset))
    assert np.array_equal(volume.data[0], signed.astype(np.float32))


@pytest.mark.parametrize("bits", [10, 16])
def test_a_monochrome1_film_is_turned_within_what_its_bits_can_hold(
    tmp_path: Path, bits: int
) -> None:
    stored = {"BitsStored": bits, "HighBit": bits - 1}
    film = dicom_slice(GREY, Modality="DX", PhotometricInterpretation="MONOCHROME1", **stored)
    volume = read_volume(write(tmp_path / "film.dcm", film))
    assert np.array_equal(volume.data[0], 2**bits - 1 - GREY.astype(np.float32))


def test_monochrome1_hounsfield_units_are_refused(tmp_path: Path) -> None:
    inverted = dicom_slice(GREY, PhotometricInterpretation="MONOCHROME1")
    assert "MONOCHROME1" in refusal(write(tmp_path / f"{MARK}.dcm", inverted))


def test_a_coloured_capture_is_refused(tmp_path: Path) -> None:
    dataset = dicom_slice(
        GREY,
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelData=np.zeros((3, 4, 3), np.uint8).tobytes(),
    )
    assert "expected one grey slice" in refusal(write(tmp_path / f"{MARK}.dcm", dataset))


@pytest.mark.parametrize(
    "missing", ["PixelData", "PixelSpacing", "ImageOrientationPatient", "SeriesInstanceUID"]
)
def test_a_dicom_file_without_what_an_image_needs_is_refused(tmp_path: Path, missing: str) -> None:
    dataset = dicom_slice(GREY)
    delattr(dataset, missing)
    refusal(write(tmp_path / f"{MARK}.dcm", dataset))


@pytest.mark.parametrize("keep", [100, 300, -7])
def test_a_truncated_dicom_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path / f"{MARK}.dcm", dicom_slice(GREY))
    file.write_bytes(file.read_bytes()[:keep])
    refusal(file)


# --- real images


@pytest.fixture
def real(data_dir: Path) -> Callable[..., Path]:
    def path(*parts: str) -> Path:
        found = data_dir.joinpath(*parts)
        if not found.exists():
            pytest.skip(f"no {'/'.join(parts)} among the real images")
        return found

    return path


def test_a_real_ct_series_is_read_in_hounsfield_units(
    real: Callable[..., Path], tmp_path: Path
) -> None:
    files = sorted(real("dicom", "ct_siemens_sensation10_chest").rglob("*.dcm"))
    datasets = [pydicom.dcmread(file) for file in files]
    for number, file in enumerate(files):
        (tmp_path / f"{number}.dcm").symlink_to(file)
    volume = read_volume(tmp_path)
    heights = sorted(float(d.ImagePositionPatient[2]) for d in datasets)
    assert volume.data.shape == (len(files), datasets[0].Rows, datasets[0].Columns)
    assert volume.spacing_mm[0] == pytest.approx(np.diff(heights).mean(), abs=1e-3)
    assert volume.spacing_mm[1:] == pytest.approx([float(v) for v in datasets[0].PixelSpacing])
    assert -1100 <= volume.data.min() < -900  # air


def test_real_nifti_labels_lie_on_the_grid_of_their_images(real: Callable[..., Path]) -> None:
    images = sorted(real("hippocampus_mr", "images").rglob("*.nii.gz"))[::40]
    assert images
    for file in images:
        image = read_volume(file)
        label = read_volume(Path(str(file).replace("/images/", "/labels/")))
        assert label.data.shape == image.data.shape
        assert set(np.unique(label.data)) <= {0.0, 1.0, 2.0}

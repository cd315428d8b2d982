"""Stores a phantom the way a hospital would: CT or MR Image Storage, and its labels as NIfTI."""

import datetime
import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

from shared_models.phantoms.anatomy import Grid, Labels, Volume
from shared_models.phantoms.profiles import HospitalProfile
from shared_models.phantoms.seeds import make_generator, make_uid

Stored = npt.NDArray[np.int16 | np.uint16]
FIRST_DAY = datetime.date(2018, 1, 1)


def write_series(
    folder: Path, hu: Volume, *, grid: Grid, profile: HospitalProfile, patient: str, seed: int
) -> None:
    """Write one file per slice, `1.dcm` and up, in the order this hospital numbers them.

    Args:
        folder: Created here.
        hu: float32 (z, y, x), HU, LPS, from the feet up.
        grid: Where its voxels lie.
        profile: The hospital, whose scanner and way of storing are followed.
        patient: PatientID; with the seed it decides every UID and date.
        seed: The seed of all hospitals.
    """
    folder.mkdir(parents=True)
    stored = _encode(hu, profile)
    order = range(grid.num_slices)
    dataset = describe_series(grid, profile, patient=patient, seed=seed)
    for number, z in enumerate(reversed(order) if profile.is_top_first else order, start=1):
        uid = make_uid(seed, patient, "instance", number)
        height_mm = round(grid.origin_mm[2] + z * grid.thickness_mm, 3)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = [*grid.origin_mm[:2], height_mm]
        dataset.SliceLocation = height_mm
        dataset.PixelData = stored[z].tobytes()
        dcmwrite(folder / f"{number}.dcm", dataset, enforce_file_format=True)


def write_labels(file: Path, labels: Labels, *, grid: Grid) -> None:
    """Write the label map on the voxels of the series.

    Args:
        file: Ends in `.nii.gz`.
        labels: uint8 (z, y, x), LPS; stored (x, y, z) with an affine to RAS, as NIfTI wants.
        grid: Where the voxels of the series lie.
    """
    x, y, z = grid.origin_mm
    affine = np.diag([-grid.spacing_mm, -grid.spacing_mm, grid.thickness_mm, 1.0])
    affine[:3, 3] = (-x, -y, z)
    image: Any = nib.Nifti1Image(labels.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    file.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def _encode(hu: Volume, profile: HospitalProfile) -> Stored:
    """Return the stored values: HU = value * RescaleSlope + RescaleIntercept (PS3.3 C.11.1.1.2)."""
    lowest = -(2 ** (profile.BitsStored - 1)) if profile.is_signed else 0
    highest = lowest + 2**profile.BitsStored - 1
    values = np.rint((hu - profile.RescaleIntercept) / profile.RescaleSlope)
    stored: Stored = np.clip(values, lowest, highest).astype("<i2" if profile.is_signed else "<u2")
    return stored


def describe_series(grid: Grid, profile: HospitalProfile, *, patient: str, seed: int) -> Dataset:
    """Return what all slices of a series share (PS3.3 A.3 and A.4, CT and MR Image IOD)."""
    dataset = Dataset()
    is_mr = profile.Modality == "MR"
    dataset.file_meta = _describe_file(MRImageStorage if is_mr else CTImageStorage)
    _add_patient_and_study(dataset, patient, seed=seed)
    _add_series_and_equipment(dataset, profile, patient=patient, seed=seed)
    _add_picture(dataset, grid, profile=profile)
    if is_mr:
        _add_mr(dataset, profile)
    return dataset


def _add_mr(dataset: Dataset, profile: HospitalProfile) -> None:
    """Make the description one of an MR image, whose values have no unit (PS3.3 C.8.3.1)."""
    for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType", "KVP", "ConvolutionKernel"):
        delattr(dataset, keyword)
    dataset.SOPClassUID = MRImageStorage
    dataset.Modality = "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "SP", ""
    dataset.MRAcquisitionType = "3D"
    is_t2 = profile.ConvolutionKernel == "T2"
    dataset.RepetitionTime, dataset.EchoTime = (2500, 90) if is_t2 else (9.1, 4.6)
    dataset.EchoTrainLength, dataset.FlipAngle = 1, 90 if is_t2 else 8
    dataset.MagneticFieldStrength = 1.5
    dataset.WindowCenter, dataset.WindowWidth = 500, 1000


def _describe_file(sop_class: UID) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = make_uid("consilia", "phantoms")
    meta.ImplementationVersionName = "CONSILIA PHANTOM"
    return meta


def _add_patient_and_study(dataset: Dataset, patient: str, *, seed: int) -> None:
    rng = make_generator(seed, patient, "person")
    study_day = FIRST_DAY + datetime.timedelta(days=int(rng.integers(0, 2000)))
    age = int(rng.integers(25, 85))
    birthday = study_day - datetime.timedelta(days=age * 365.25 + rng.integers(30, 330))
    time = f"{rng.integers(7, 19):02d}{rng.integers(0, 60):02d}00"
    dataset.PatientName = f"PHANTOM^{patient.upper()}"
    dataset.PatientID = patient
    dataset.PatientBirthDate = f"{birthday:%Y%m%d}"
    dataset.PatientSex = str(rng.choice(["F", "M"]))
    dataset.PatientAge = f"{age:03d}Y"
    dataset.StudyInstanceUID = make_uid(seed, patient, "study")
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = f"{study_day:%Y%m%d}"
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = time
    dataset.ContentDate, dataset.ContentTime = dataset.StudyDate, time
    dataset.ReferringPhysicianName = "PHANTOM^REFERRER"
    dataset.StudyID = "1"
    dataset.AccessionNumber = f"PH{rng.integers(10**7, 10**8)}"
    dataset.StudyDescription = "PHANTOM ABDOMEN"


def _add_series_and_equipment(
    dataset: Dataset, profile: HospitalProfile, *, patient: str, seed: int
) -> None:
    dataset.SOPClassUID = CTImageStorage
    dataset.Modality = "CT"
    dataset.SeriesInstanceUID = make_uid(seed, patient, "series")
    dataset.SeriesNumber = 2
    dataset.SeriesDescription = f"PHANTOM {profile.ConvolutionKernel}"
    dataset.BodyPartExamined = "ABDOMEN"
    dataset.PatientPosition = "HFS"
    dataset.FrameOfReferenceUID = make_uid(seed, patient, "frame of reference")
    dataset.PositionReferenceIndicator = ""
    dataset.Manufacturer = profile.Manufacturer
    dataset.ManufacturerModelName = profile.ManufacturerModelName
    dataset.StationName = profile.StationName
    dataset.InstitutionName = f"PHANTOM HOSPITAL {profile.name.upper()}"
    dataset.ConvolutionKernel = profile.ConvolutionKernel
    dataset.KVP = 120
    dataset.AcquisitionNumber = 1


def _add_picture(dataset: Dataset, grid: Grid, *, profile: HospitalProfile) -> None:
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.BurnedInAnnotation = "NO"
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [grid.spacing_mm, grid.spacing_mm]
    dataset.SliceThickness = grid.thickness_mm
    dataset.SpacingBetweenSlices = grid.thickness_mm
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = dataset.Columns = grid.size
    dataset.BitsAllocated = 16
    dataset.BitsStored = profile.BitsStored
    dataset.HighBit = profile.BitsStored - 1
    dataset.PixelRepresentation = int(profile.is_signed)
    dataset.RescaleSlope = profile.RescaleSlope
    dataset.RescaleIntercept = profile.RescaleIntercept
    dataset.RescaleType = "HU"
    dataset.WindowCenter, dataset.WindowWidth = 60, 400

"""A key, a small CT image with a patient in it, and planted identifiers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, config, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from client.ingest.keys import Key
from shared_models.phantoms.identifiers import Corpus, write_identifiers
from shared_models.phantoms.seeds import make_uid


@pytest.fixture(scope="session")
def key() -> Key:
    return Key(bytes(range(32)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_identifiers(tmp_path_factory.mktemp("identifiers"), seed=7)


@pytest.fixture
def new_image() -> Callable[..., Dataset]:
    """Return what makes a CT image of Ada Okafor as read from a file; keywords set attributes."""

    def make(syntax: UID = ExplicitVRLittleEndian, **attributes: Any) -> Dataset:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.SOPClassUID, dataset.Modality = CTImageStorage, "CT"
        dataset.SOPInstanceUID = make_uid("test", "instance")
        dataset.StudyInstanceUID = make_uid("test", "study")
        dataset.SeriesInstanceUID = make_uid("test", "series")
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.PatientName, dataset.PatientID = "OKAFOR^ADA", "MRN448213"
        dataset.PatientBirthDate, dataset.StudyDate = "19610412", "20200229"
        dataset.Rows, dataset.Columns = 64, 64
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation = 0
        noise = np.random.default_rng(5).normal(900, 60, (64, 64))
        dataset.PixelData = noise.astype("<u2").tobytes()
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        stream = io.BytesIO()
        dcmwrite(stream, dataset, enforce_file_format=True)
        return dcmread(io.BytesIO(stream.getvalue()))

    return make


@pytest.fixture
def dicom_dir(data_dir: Path) -> Iterator[Path]:
    """Return the real images, whose headers pydicom has something to say about."""
    with config.disable_value_validation():
        yield data_dir / "dicom"

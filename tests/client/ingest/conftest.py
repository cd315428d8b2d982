"""A key, a small CT image with a patient in it, and planted identifiers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pydicom import Dataset, config, dcmread, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from client import config as configs
from client.ingest.acquire import from_folder
from client.ingest.intake import Report, opened, take_in
from client.ingest.keys import Key
from shared_models.phantoms import VENDORS, write_archives
from shared_models.phantoms.identifiers import Corpus, write_identifiers
from shared_models.phantoms.seeds import make_uid
from shared_models.signing import create_key


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


class Archive(NamedTuple):
    """A hospital's made-up export and its answer key."""

    dicom: Path
    folder: Path
    answers: list[dict[str, Any]]


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    root = tmp_path_factory.mktemp("archive")
    small: dict[str, Any] = {"num_patients": 3, "num_slices": 6, "size": 48, "num_planted": 9}
    (folder,) = write_archives(root, 3, profiles=VENDORS[:1], **small)
    answers = json.loads((folder / "answers.json").read_text())["series"]
    return Archive(folder / "dicom", folder, answers)


@pytest.fixture
def site_dir(tmp_path: Path, site_text: str) -> Path:
    """Make a site that trains on its own store."""
    return made_site(tmp_path / "north", site_text)


@pytest.fixture(scope="session")
def ingested(tmp_path_factory: pytest.TempPathFactory, archive: Archive, site_text: str) -> Path:
    """Return such a site that took the archive in; who changes it takes a copy."""
    folder = made_site(tmp_path_factory.mktemp("ingested") / "north", site_text)
    settings = configs.read(folder / "site.toml").ingest
    with opened(settings) as (connection, key):
        take_in(settings, connection, key, from_folder(archive.dicom))
    return folder


def made_site(folder: Path, site_text: str) -> Path:
    """Make a site's folder, with a key of pseudonyms that is always the same."""
    private = folder / "ingest" / "private"
    (folder / "keys").mkdir(parents=True)
    private.mkdir(parents=True)
    create_key(folder / "keys" / "signing.pem")
    (private / "key").touch(mode=0o600)
    (private / "key").write_text(bytes(range(32)).hex())
    text = site_text.replace('"data/manifest.csv"', '"ingest/store/manifest.csv"')
    text = text.replace('root = "data"', 'root = "ingest/store"')
    (folder / "site.toml").write_text(text.replace("min_patients = 10", "min_patients = 2"))
    return folder


@pytest.fixture
def take(site_dir: Path) -> Callable[..., Report]:
    """Return what takes a folder in at that site."""

    def run(folder: Path, **given: Any) -> Report:
        settings = configs.read(site_dir / "site.toml").ingest
        settings = settings.model_copy(update=given)
        with opened(settings) as (connection, key):
            return take_in(settings, connection, key, from_folder(folder))

    return run

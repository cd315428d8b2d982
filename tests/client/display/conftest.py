"""Small releases that a coordinator signed, and a made-up patient's series to try them on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.release import release
from shared_models import nets, phantoms
from shared_models.contracts import SiteResult, ValidationReport
from shared_models.nets.base import weights_of
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, public_key, sign
from shared_models.weights import digest as weights_digest
from shared_models.weights import flatten

#: Stand wherever a patient could be recognized.
MARKS = {
    "PatientName": "QUILLFEATHER^ZENOBIA",
    "PatientID": "MRN-7731-QX",
    "PatientBirthDate": "19470313",
    "AccessionNumber": "ACC-55-QQ",
    "StudyDescription": "Referred by DR UMBERSLADE",
    "SeriesDescription": "SERIES-OF-QUILL",
}
UNET = {
    "task": {"name": "segmentation", "params": {"classes": ["organ", "lesion"]}},
    "net": {"name": "unet", "params": {"channels": [4, 8], "strides": [2]}},
    "imaging": [
        {"name": "window", "params": {"low": -100.0, "high": 250.0}},
        {"name": "resize", "params": {"size": [32, 32]}},
    ],
}


class Model(NamedTuple):
    """A release's folder and the public key that signed it."""

    folder: Path
    coordinator: str


@pytest.fixture
def new_model(
    tmp_path: Path, new_plan: Callable[..., StudyPlan], coordinator_key: Ed25519PrivateKey
) -> Callable[..., Model]:
    """Return what writes a release of a net with weights as drawn; keywords change the plan."""

    def make(
        *,
        name: str = "model",
        modalities: tuple[str, ...] = ("CT",),
        scale: float = 1.0,
        **plan: Any,
    ) -> Model:
        agreed = new_plan(**(UNET | plan))
        num_outputs = len(agreed.task.params["classes"]) + (agreed.task.name == "segmentation")
        drawn = nets.make(agreed.net.name, agreed.net.params, seed=3, num_outputs=num_outputs)
        weights = {key: np.float32(scale) * value for key, value in weights_of(drawn).items()}
        metrics = {"dice": 0.81} if agreed.task.name == "segmentation" else {"accuracy": 0.9}
        validation = ValidationReport(
            study=digest(agreed),
            weights_digest=weights_digest(flatten(weights)),
            metrics=metrics,
            num_patients=40,
            num_images=200,
        )
        sites = [
            SiteResult(name=site, num_patients=30, metrics=metrics, num_test_patients=9)
            for site in agreed.sites
        ]
        signed = SignedPlan(agreed, sign(agreed, key=coordinator_key))
        release(
            tmp_path / name,
            signed,
            weights,
            validation=validation,
            sites=sites,
            key=coordinator_key,
            modalities=modalities,
        )
        return Model(tmp_path / name, public_key(coordinator_key))

    return make


@pytest.fixture
def classifier(new_model: Callable[..., Model]) -> Model:
    return new_model(
        task={"name": "classification", "params": {"classes": ["clear", "opaque"]}},
        net={
            "name": "densenet",
            "params": {"init_features": 4, "growth_rate": 4, "block_config": [1], "num_groups": 2},
        },
    )


@pytest.fixture(scope="session")
def _phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (site, *_) = phantoms.write_hospitals(
        tmp_path_factory.mktemp("phantom"), seed=1, num_patients=1, size=48
    )
    (series,) = (site / "series").iterdir()
    for file in series.iterdir():
        dataset = pydicom.dcmread(file)
        for keyword, mark in MARKS.items():
            setattr(dataset, keyword, mark)
        dataset.save_as(file)
    return series


@pytest.fixture
def series(_phantom: Path, tmp_path: Path) -> Path:
    """Return a copy of a made-up CT series of a marked patient, 48 x 48, a few slices."""
    return Path(shutil.copytree(_phantom, tmp_path / "study"))


@pytest.fixture(scope="session")
def marks() -> tuple[str, ...]:
    """Return every part of what recognizes that patient."""
    values = [part for mark in MARKS.values() for part in (mark, *mark.split("^"))]
    return tuple(dict.fromkeys([*values, "Quillfeather", "UMBERSLADE", "1947-03-13"]))

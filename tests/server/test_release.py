"""A release says what its images were, and all of it is signed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.release import release
from server.start import initial_weights
from server.store import RunSettings
from server.validate import final_report, open_validator
from shared_models import phantoms
from shared_models import plan as plans
from shared_models.contracts import ReleaseManifest, Signature, SiteResult
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import is_signed_by, sign
from shared_models.weights import load


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    (site, *_) = phantoms.write_hospitals(tmp_path / "phantoms", seed=1, num_patients=2, size=16)
    manifest = site / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("finding", "label"))
    return manifest


def test_a_release_is_signed_whole_and_names_the_modality_it_was_validated_on(
    new_plan: Callable[..., StudyPlan],
    coordinator_key: Ed25519PrivateKey,
    hospital: Path,
    tmp_path: Path,
) -> None:
    plan = new_plan()
    settings = RunSettings(signing_key=tmp_path / "key", sites={}, validation_manifest=hospital)
    validator = open_validator(plan, settings)
    assert validator.modalities == ("CT",)
    weights = initial_weights(plan, validator.task, tmp_path)
    site = SiteResult(name="north", num_patients=40, metrics={"auc": 0.8}, num_test_patients=9)
    written = release(
        tmp_path / "model",
        SignedPlan(plan, sign(plan, key=coordinator_key)),
        weights,
        validation=final_report(validator, weights, first=weights),
        sites=(site,),
        key=coordinator_key,
        modalities=validator.modalities,
    )
    folder = tmp_path / "model"
    manifest = ReleaseManifest.model_validate_json((folder / "manifest.json").read_text())
    signature = Signature.model_validate_json((folder / "signature.json").read_text())
    signed = plans.read(folder / "plan.toml")
    assert manifest == written and manifest.modalities == ("CT",)
    assert manifest.sites["north"].num_patients == 40
    assert manifest.sites["north"].metrics == {"auc": 0.8}
    assert is_signed_by(manifest, signature, key=plan.coordinator)
    assert is_signed_by(signed.plan, signed.signature, key=plan.coordinator)
    assert signed.plan == plan and load(folder / "weights.safetensors").keys() == weights.keys()
    assert not list(tmp_path.glob(".*partial*"))

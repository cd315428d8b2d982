"""Releases that are what was signed are opened; all others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.display import kinds
from client.display.release import open_release
from shared_models import plan as plans
from shared_models import weights as weights_of
from shared_models.contracts import ReleaseManifest
from shared_models.errors import DocumentError, SignatureError
from shared_models.plan import StudyPlan
from shared_models.signing import public_key, sign

STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


def test_a_release_is_opened_as_it_was_written(new_model: Callable[..., Any]) -> None:
    model = new_model()
    found = open_release(model.folder, coordinator=model.coordinator)
    assert found.classes == ("organ", "lesion")
    assert found.manifest.modalities == ("CT",)
    assert set(found.manifest.sites) == {"north", "south"}
    assert not found.net.training
    assert found.version == f"lungs {found.manifest.weights_digest[:12]}"


def test_a_release_of_another_coordinator_is_refused(new_model: Callable[..., Any]) -> None:
    with pytest.raises(SignatureError, match="not signed by the coordinator this hospital knows"):
        open_release(new_model().folder, coordinator=public_key(STRANGER))


def edited(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


TAMPERED: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda f: flipped(f / "weights.safetensors"),
    "weights cut short": lambda f: (f / "weights.safetensors").write_bytes(b"short"),
    "no weights": lambda f: (f / "weights.safetensors").unlink(),
    "a metric": lambda f: edited(
        f / "manifest.json", lambda m: m["validation"]["metrics"].update(dice=0.99)
    ),
    "the modality": lambda f: edited(f / "manifest.json", lambda m: m.update(modalities=["MR"])),
    "an unknown field": lambda f: edited(f / "manifest.json", lambda m: m.update(extra=1)),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "no signature": lambda f: (f / "signature.json").unlink(),
    "a broken signature": lambda f: (f / "signature.json").write_text("{"),
    "no plan": lambda f: (f / "plan.toml").unlink(),
    "a class": lambda f: (f / "plan.toml").write_text(
        (f / "plan.toml").read_text().replace("organ", "tumor")
    ),
}


@pytest.mark.parametrize("what", sorted(TAMPERED))
def test_a_release_that_was_changed_is_refused(new_model: Callable[..., Any], what: str) -> None:
    model = new_model()
    TAMPERED[what](model.folder)
    with pytest.raises((SignatureError, DocumentError)):
        open_release(model.folder, coordinator=model.coordinator)


def test_a_manifest_that_a_stranger_signed_is_refused(new_model: Callable[..., Any]) -> None:
    model = new_model()
    manifest = ReleaseManifest.model_validate_json((model.folder / "manifest.json").read_text())
    forged = sign(manifest, key=STRANGER)
    (model.folder / "signature.json").write_text(forged.model_dump_json())
    with pytest.raises(SignatureError):
        open_release(model.folder, coordinator=model.coordinator)


def test_another_signed_plan_is_refused(
    new_model: Callable[..., Any],
    new_plan: Callable[..., StudyPlan],
    coordinator_key: Ed25519PrivateKey,
) -> None:
    model, other = new_model(), new_plan()
    text = plans.render(other, sign(other, key=coordinator_key))
    (model.folder / "plan.toml").write_text(text)
    with pytest.raises(DocumentError, match="not the one its model was made by"):
        open_release(model.folder, coordinator=model.coordinator)


def signed_again(folder: Path, key: Ed25519PrivateKey, **changes: Any) -> None:
    manifest = ReleaseManifest.model_validate_json((folder / "manifest.json").read_text())
    manifest = manifest.model_copy(update=changes)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "signature.json").write_text(sign(manifest, key=key).model_dump_json())


def test_even_a_signed_manifest_may_not_name_other_files(
    new_model: Callable[..., Any], coordinator_key: Ed25519PrivateKey
) -> None:
    model = new_model()
    (model.folder / "weights.safetensors").rename(model.folder.parent / "weights.safetensors")
    signed_again(model.folder, coordinator_key, weights_file="../weights.safetensors")
    with pytest.raises(DocumentError, match="outside the release"):
        open_release(model.folder, coordinator=model.coordinator)


def test_even_signed_weights_must_be_numbers_of_the_plans_net(
    new_model: Callable[..., Any], coordinator_key: Ed25519PrivateKey
) -> None:
    model = new_model()
    file = model.folder / "weights.safetensors"
    right = weights_of.load(file)
    first = sorted(right)[0]
    for wrong, expected in (
        ({**right, first: np.full_like(right[first], np.nan)}, "not those the release"),
        ({f"z{name}": value for name, value in right.items()}, "does not fit"),
        ({**right, first: right[first].astype(np.float64)}, "float32 only"),
    ):
        weights_of.save(file, wrong)
        new = weights_of.digest(weights_of.flatten(wrong))
        signed_again(model.folder, coordinator_key, weights_digest=new)
        with pytest.raises(DocumentError, match=expected):
            open_release(model.folder, coordinator=model.coordinator)


def test_a_model_whose_layers_stayed_with_the_hospitals_is_refused(
    new_model: Callable[..., Any], new_plan: Callable[..., StudyPlan]
) -> None:
    training = new_plan().training.model_dump() | {"personal": ["model.0."]}
    model = new_model(training=training)
    with pytest.raises(DocumentError, match=r"stayed with the hospitals .*, model\.0\., and"):
        open_release(model.folder, coordinator=model.coordinator)


def test_answers_nobody_can_show_are_refused_with_a_sentence(new_model: Callable[..., Any]) -> None:
    model = new_model()
    found = open_release(model.folder, coordinator=model.coordinator)
    boxes = found._replace(task=found.task._replace(label_kind="boxes"))  # type: ignore[arg-type]
    with pytest.raises(
        DocumentError, match="'boxes', which cannot be shown yet; known: class, map"
    ):
        kinds.kind_of(boxes)
    with pytest.raises(DocumentError, match="names 1 classes"):
        kinds.kind_of(found._replace(classes=("organ",)))

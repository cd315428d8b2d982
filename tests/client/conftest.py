"""A plan, a site and a hospital of drawn pictures, all real and all small."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from client import config as configs
from client import setup
from client.config import SiteConfig
from shared_models.contracts import Approval, Countersignature
from shared_models.plan import StudyPlan
from shared_models.signing import create_key, digest, public_key, sign

#: Stands wherever a patient could be recognized; it must never be found anywhere else.
MARK = "MARKED-7731"

PLAN: dict[str, Any] = {
    "name": "tiny",
    "purpose": "research",
    "sites": ["north", "south"],
    "seed": 3,
    "min_patients": 4,
    "compare_alone": True,
    "task": {"name": "classification", "params": {"classes": ["clear", "opaque"]}},
    "net": {
        "name": "densenet",
        "params": {"init_features": 4, "growth_rate": 4, "block_config": [1], "num_groups": 2},
    },
    "imaging": [{"name": "resize", "params": {"size": [16, 16]}}, {"name": "standardize"}],
    "strategy": {"name": "fedavg"},
    "training": {
        "num_rounds": 3,
        "steps_per_round": 2,
        "sample_rate": 0.5,
        "images_per_patient": 2,
        "optimizer": "sgd",
        "learning_rate": 0.05,
    },
    "rounds": {"quorum": 1},
    "privacy": {"epsilon": 4.0, "delta": 0.01, "noise_multiplier": 2.0, "max_grad_norm": 1.0},
}


class Hospital(NamedTuple):
    """``config_file`` is its site.toml, ``manifest`` its list of images."""

    folder: Path
    config_file: Path
    manifest: Path
    images: Path
    key: Ed25519PrivateKey


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mark() -> str:
    return MARK


@pytest.fixture(scope="session")
def plan_of(coordinator_key: Ed25519PrivateKey) -> Callable[[Mapping[str, Any]], StudyPlan]:
    """Return a plan with changes, each under its dotted name."""

    def make(changes: Mapping[str, Any] = {}) -> StudyPlan:
        expires = datetime.now(UTC).date() + timedelta(days=30)
        plan = StudyPlan.model_validate(
            PLAN | {"coordinator": public_key(coordinator_key), "expires": expires}
        )
        return StudyPlan.model_validate(_changed(plan.model_dump(), changes))

    return make


@pytest.fixture(scope="session")
def site_text(coordinator_key: Ed25519PrivateKey) -> str:
    """Return the site.toml that is written for a hospital called north."""
    return setup.config_text(
        name="north",
        coordinator=public_key(coordinator_key),
        address="fl.example.org:9092",
        root_certificates="ca.pem",
        manifest="data/manifest.csv",
        root="data",
        max_epsilon=4.0,
    )


@pytest.fixture
def site_of(site_text: str) -> Callable[[Mapping[str, Any]], SiteConfig]:
    """Return that site's configuration with changes, each under its dotted name."""

    def make(changes: Mapping[str, Any] = {}) -> SiteConfig:
        small = {"policy.min_patients": 4, "policy.max_delta": 0.05}
        data = configs.parse(site_text).model_dump()
        return SiteConfig.model_validate(_changed(_changed(data, small), changes))

    return make


@pytest.fixture
def hospital(tmp_path: Path, site_text: str) -> Hospital:
    """Make a hospital of 12 patients to train and 6 to test on, two marked pictures each."""
    folder, images = tmp_path / "north", tmp_path / "north" / "data"
    images.mkdir(parents=True)
    (folder / "keys").mkdir()
    key = create_key(folder / "keys" / "signing.pem")
    text = site_text.replace("\nmin_patients = 10", "\nmin_patients = 4")
    (folder / "site.toml").write_text(text.replace("max_delta = 0.005", "max_delta = 0.05"))
    rows = []
    for number in range(18):
        for view in range(2):
            file = f"{MARK}-{number}-{view}.png"
            _draw(images / file, is_opaque=number % 2 == 1, seed=2 * number + view)
            rows.append(
                {
                    "image": file,
                    "patient": f"{MARK}-{number}",
                    "label": ("clear", "opaque")[number % 2],
                    "split": "train" if number < 12 else "test",
                }
            )
    write_rows(images / "manifest.csv", rows)
    return Hospital(folder, folder / "site.toml", images / "manifest.csv", images, key)


def write_rows(manifest: Path, rows: list[dict[str, str]]) -> None:
    with manifest.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _draw(file: Path, *, is_opaque: bool, seed: int) -> None:
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 120, (20, 20))
    if is_opaque:
        pixels[6:14, 6:14] += 120
    words = PngInfo()
    words.add_text("Comment", f"{MARK} was here")
    Image.fromarray(pixels.astype(np.uint8)).save(file, pnginfo=words)


def _changed(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = data
        for parent in parents:
            inner[parent] = dict(inner[parent])
            inner = inner[parent]
        inner[last] = value
    return data


@pytest.fixture(scope="session")
def countersign() -> Callable[..., Countersignature]:
    """Return what makes a site's countersignature over a plan; keywords change the approval."""

    def make(
        plan: StudyPlan, name: str, *, key: Ed25519PrivateKey, mask_key: str | None, **changed: Any
    ) -> Countersignature:
        fields: dict[str, Any] = {
            "study": digest(plan),
            "site": name,
            "decision": "approved",
            "who": f"Dr. {name}",
            "when": datetime(2026, 3, 1, tzinfo=UTC),
            "mask_key": mask_key,
        }
        approval = Approval.model_validate(fields | changed)
        return Countersignature(approval=approval, signature=sign(approval, key=key))

    return make

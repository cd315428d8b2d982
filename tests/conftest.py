"""What several rooms' tests share: Hypothesis's settings, real images if there are any, a plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings

from shared_models.plan import StudyPlan
from shared_models.signing import public_key

settings.register_profile(
    "shared-machine",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shared-machine")

DATA_DIR = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real images, CONSILIA_DATA or beside the repository, or skip."""
    folder = Path(os.environ.get("CONSILIA_DATA", DATA_DIR)).resolve()
    if not folder.is_dir():
        pytest.skip("no real images on this machine; CONSILIA_DATA names their folder")
    return folder


@pytest.fixture(scope="session")
def coordinator_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def new_plan(coordinator_key: Ed25519PrivateKey) -> Callable[..., StudyPlan]:
    """Return what makes a small valid plan; keywords replace whole fields."""

    def make(**changes: Any) -> StudyPlan:
        fields: dict[str, Any] = {
            "name": "lungs",
            "purpose": "research",
            "coordinator": public_key(coordinator_key),
            "sites": ["north", "south"],
            "expires": date(2099, 1, 1),
            "task": {"name": "classification", "params": {"classes": ["clear", "opaque"]}},
            "net": {
                "name": "densenet",
                "params": {"init_features": 4, "growth_rate": 4, "block_config": [1]},
            },
            "imaging": [{"name": "resize", "params": {"size": [8, 8]}}],
            "strategy": {"name": "fedavg"},
            "training": {
                "num_rounds": 2,
                "steps_per_round": 5,
                "sample_rate": 0.1,
                "learning_rate": 0.01,
            },
            "rounds": {"quorum": 2},
        }
        return StudyPlan.model_validate(fields | changes)

    return make


@pytest.fixture
def plan(new_plan: Callable[..., StudyPlan]) -> StudyPlan:
    return new_plan()

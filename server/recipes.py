"""Plans for demonstrations: TOML files in ``server/plans``, one for each task and kind of image.

A recipe is an unfinished plan. Sites, classes, seed, dates and the noise that meets the epsilon
asked for are filled in here; ``[private.training]`` replaces ``[training]`` when privacy is on.
"""

from __future__ import annotations

import math
import tomllib
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

from server.hospitals import DataSet
from shared_models.errors import ConsiliaError
from shared_models.plan import StudyPlan, Training
from shared_models.privacy import calibrate
from shared_models.volume import NIFTI, PICTURES

FOLDER = "plans"
VALID_DAYS = 30


def plan_for(
    data: DataSet,
    *,
    name: str,
    task: str,
    coordinator: str,
    seed: int,
    epsilon: float | None,
    num_rounds: int | None = None,
    deadline_s: float = 600.0,
) -> StudyPlan:
    """Return an unsigned plan for ``data``; ``epsilon`` None means without privacy.

    Raises:
        ConsiliaError: if there is no recipe; the message names those there are.
        ValueError: if epsilon cannot be met.
    """
    recipe = _recipe(task, kind_of(data))
    private = recipe.pop("private")
    if epsilon is not None:
        recipe["training"] = private["training"]
    if num_rounds is not None:
        recipe["training"]["num_rounds"] = num_rounds
    recipe["task"]["params"] = {"classes": list(data.classes), **recipe["task"].get("params", {})}
    training = Training.model_validate(recipe["training"])
    return StudyPlan.model_validate(
        {
            **recipe,
            "name": name,
            "purpose": "demonstration",
            "coordinator": coordinator,
            "sites": data.sites,
            "expires": (datetime.now(UTC) + timedelta(days=VALID_DAYS)).date(),
            "seed": seed,
            "min_patients": 10,
            "compare_alone": True,
            "strategy": {"name": "fedavg"},
            "rounds": {"quorum": len(data.sites), "deadline_s": deadline_s},
            "privacy": _privacy(data, training, private["privacy"], epsilon),
        }
    )


def kind_of(data: DataSet) -> str:
    """Return what the images are: picture, volume (NIfTI) or series (DICOM)."""
    image = Path(data.rows[0]["image"])
    if image.name.lower().endswith(NIFTI):
        return "volume"
    return "picture" if image.suffix.lower() in PICTURES else "series"


def delta_for(data: DataSet) -> float:
    """Return 1 / (10 N) for the largest training set, rounded down to one digit."""
    exact = 1 / (10 * max(data.training_patients().values()))
    scale = 10.0 ** math.floor(math.log10(exact))
    return float(f"{math.floor(exact / scale) * scale:.0e}")


def _privacy(
    data: DataSet, training: Training, terms: dict[str, Any], epsilon: float | None
) -> dict[str, Any] | None:
    if epsilon is None:
        return None
    delta = delta_for(data)
    noise_multiplier = calibrate(
        epsilon_target=epsilon,
        delta=delta,
        sample_rate=training.sample_rate,
        steps=2 * training.num_rounds * training.steps_per_round,  # training alone costs as much
    )
    return {**terms, "epsilon": epsilon, "delta": delta, "noise_multiplier": noise_multiplier}


def _recipe(task: str, kind: str) -> dict[str, Any]:
    folder = files("server") / FOLDER
    known = sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))
    wanted = f"{task}-{kind}"
    if wanted not in known:
        raise ConsiliaError(f"no recipe called '{wanted}' (task-images); known: {', '.join(known)}")
    return tomllib.loads((folder / f"{wanted}.toml").read_text(encoding="utf-8"))

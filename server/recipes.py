"""Plans for demonstrations: TOML files in ``server/plans``, one for each task and kind of image.

A recipe is an unfinished plan. Sites, classes, seed, dates and the noise that meets the epsilon
asked for are filled in here; ``labels`` says what labels its images need. Under privacy,
``[private.*]`` tables replace those of their names. ``[start]`` says how to train a warm start,
which is then up to ``server.start``.
"""

from __future__ import annotations

import csv
import math
import tomllib
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

from server.hospitals import IMAGE_COLUMNS, DataSet, Labels, listing
from server.start import StartTerms
from shared_models.errors import ConsiliaError
from shared_models.plan import StudyPlan, planned_events
from shared_models.privacy import calibrate
from shared_models.volume import NIFTI, PICTURES

FOLDER = "plans"
VALID_DAYS = 30
MOST_DELTA = 1e-3
#: The epsilon at which the recipes' private learning rates were chosen.
USUAL_EPSILON = 8.0


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
    compare_alone: bool = True,
) -> StudyPlan:
    """Return an unsigned plan for ``data``; ``epsilon`` None means without privacy.

    Comparing with training alone costs as much privacy as training together.

    Raises:
        ConsiliaError: if there is no recipe, naming those there are, or epsilon cannot be met.
    """
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise ConsiliaError(
            f"--epsilon: expected a positive, finite epsilon, got {epsilon}; ask for more, or plan "
            "fewer --rounds"
        )
    recipe = _recipe(task, kind_of(data))
    private = recipe.pop("private")
    if epsilon is not None:
        recipe |= {t: content for t, content in private.items() if t not in ("privacy", "start")}
        recipe["training"] |= _slower(recipe["training"], epsilon)
    if num_rounds is not None:
        recipe["training"]["num_rounds"] = num_rounds
    recipe.pop("start", None)
    if recipe.pop("labels", "class") != "none":
        params = {"classes": list(data.classes), **recipe["task"].get("params", {})}
        recipe["task"]["params"] = params | ({"instances": True} if data.has_instances else {})
    is_split = recipe.get("rounds", {}).get("secure_aggregation", False)
    terms = None
    if epsilon is not None:
        terms = {
            **private["privacy"],
            "epsilon": epsilon,
            "delta": delta_for(data),
            "noise_multiplier": 1.0,
            "noise_shares": max(1, len(data.sites) - 1) if is_split else 1,  # one may tell its own
        }
    plan = StudyPlan.model_validate(
        {
            **recipe,
            "name": name,
            "purpose": "demonstration",
            "coordinator": coordinator,
            "sites": data.sites,
            "expires": (datetime.now(UTC) + timedelta(days=VALID_DAYS)).date(),
            "seed": seed,
            "min_patients": 10,
            "compare_alone": compare_alone,
            "strategy": recipe.get("strategy", {"name": "fedavg"}),
            "rounds": {
                **recipe.get("rounds", {}),
                "quorum": len(data.sites),
                "deadline_s": deadline_s,
            },
            "privacy": terms,
        }
    )
    return calibrated(plan)


def _slower(training: dict[str, Any], epsilon: float) -> dict[str, float]:
    """Return plain SGD's rates, smaller as the noise for a small ``epsilon`` grows.

    The noise multiplier is about inversely proportional to epsilon, and so a step's noise stays
    what it is at the usual epsilon.
    """
    factor = min(1.0, epsilon / USUAL_EPSILON) if training.get("optimizer") == "sgd" else 1.0
    rates = ("learning_rate", "learning_rate_end")
    return {name: float(f"{factor * training[name]:.6g}") for name in rates if name in training}


def calibrated(plan: StudyPlan) -> StudyPlan:
    """Return ``plan`` with the noise with which all it does meets the epsilon it states.

    Raises:
        ConsiliaError: if no noise is enough.
    """
    if plan.privacy is None:
        return plan
    try:
        noise_multiplier = calibrate(
            epsilon_target=plan.privacy.epsilon,
            delta=plan.privacy.delta,
            sample_rate=plan.training.sample_rate,
            steps=sum(event.steps for event in planned_events(plan)),
        )
    except ValueError as error:
        raise ConsiliaError(f"--epsilon: {error}; ask for more, or plan fewer --rounds") from error
    terms = plan.privacy.model_copy(update={"noise_multiplier": noise_multiplier})
    return plan.model_copy(update={"privacy": terms})


def start_terms(data: DataSet, *, task: str, epsilon: float | None) -> StartTerms | None:
    """Return how to train a warm start, if the recipe for ``data`` wants one."""
    recipe = _recipe(task, kind_of(data))
    private = recipe["private"] if epsilon is not None else {}
    terms = private.get("start", recipe.get("start"))
    return None if terms is None else StartTerms.model_validate(terms)


def check_task(task: str) -> None:
    """Refuse a task no recipe is for.

    Raises:
        ConsiliaError: naming the tasks there are.
    """
    tasks = sorted({name.rpartition("-")[0] for name in _known()})
    if task not in tasks:
        raise ConsiliaError(f"no recipe for the task '{task}'; known: {', '.join(tasks)}")


def labels_of(task: str, folder: Path) -> Labels:
    """Return what labels the recipe for ``task`` wants of the images that ``folder`` lists.

    Where there is no recipe for such images, what those for others agree on; else ``class``, and
    adopting and planning say what is wrong.
    """
    try:
        with listing(folder).open(newline="", encoding="utf-8-sig") as handle:
            first = next(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error, StopIteration):
        return "class"
    image = next((first[name] or "" for name in IMAGE_COLUMNS if name in first), "")
    wanted = f"{task}-{_kind(Path(image))}"
    known = [name for name in _known() if name.rpartition("-")[0] == task]
    names = [wanted] if wanted in known else known
    found: set[Labels] = {_read(name).get("labels", "class") for name in names}
    return found.pop() if len(found) == 1 else "class"


def kind_of(data: DataSet) -> str:
    """Return what the images are: picture, volume (NIfTI) or series (DICOM)."""
    return _kind(Path(data.rows[0]["image"]))


def _kind(image: Path) -> str:
    if image.name.lower().endswith(NIFTI):
        return "volume"
    return "picture" if image.suffix.lower() in PICTURES else "series"


def delta_for(data: DataSet) -> float:
    """Return 1 / (10 N) for all N training patients, one in a thousand at most, rounded down."""
    exact = min(1 / (10 * sum(data.training_patients().values())), MOST_DELTA)
    scale = 10.0 ** math.floor(math.log10(exact))
    return float(f"{math.floor(exact / scale) * scale:.0e}")


def _recipe(task: str, kind: str) -> dict[str, Any]:
    known = _known()
    wanted = f"{task}-{kind}"
    if wanted not in known:
        raise ConsiliaError(f"no recipe called '{wanted}' (task-images); known: {', '.join(known)}")
    return _read(wanted)


def _read(name: str) -> dict[str, Any]:
    file = files("server") / FOLDER / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _known() -> list[str]:
    folder = files("server") / FOLDER
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))

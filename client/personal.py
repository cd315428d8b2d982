"""Layers that stay in the hospital: the site's own, kept from one round to the next.

A plan's ``training.personal`` says how the names of their parameters begin. They take the place of
those that the coordinator sends, are trained and evaluated with all others, and are kept in the
state folder, out of the worker's reach: one file for each round, so that a round asked again begins
as it began before.

Guarantees:
    Nothing trained of a layer that stays is in the update.
    A site that was killed goes on with the layers it had.
    A round asked again begins with the layers it began with.
    Kept layers that cannot be read, or are not of the plan's net, stop the round.

References:
    Li et al. 2021, FedBN, https://arxiv.org/abs/2102.07623; Arivazhagan et al. 2019, Federated
    learning with personalization layers, https://arxiv.org/abs/1912.00818.

Design: under privacy terms these layers are part of the same clipped and noised steps, and cost
nothing beside. That needs all of the noise here: a plan that splits it may have no such layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared_models.contracts import RoundOrder
from shared_models.errors import MachineError
from shared_models.files import replace
from shared_models.plan import StudyPlan
from shared_models.weights import (
    Array,
    Flat,
    Schema,
    Weights,
    flat_of,
    flatten,
    is_finite,
    joined,
    load,
    schema_of,
    unflatten,
    unpacked,
)

FOLDER, SUFFIX = "personal", ".safetensors"
#: What begins or ends with a site's own layers; training alone trains everything anew.
KINDS = ("train", "evaluate")


def begin(
    vector: Flat, order: RoundOrder, *, plan: StudyPlan, schema: Schema, state_dir: Path
) -> Flat:
    """Return the weights sent with the site's own layers in their place, as far as it has any.

    Raises:
        MachineError: if those kept cannot be used.
    """
    if not plan.training.personal or order.kind not in KINDS:
        return vector
    before = [round_ for round_ in _rounds(state_dir, order) if round_ < order.round_]
    if not before:
        return vector
    wanted = tuple((name, shape) for name, shape in schema if stays(name, plan))
    own = _read(_file(state_dir, order, max(before)), wanted)
    sent = unpacked(vector, schema)
    return joined([flat_of(own[n]) if n in own else sent.bytes_of(n) for n, _ in schema])


def split(
    update: Array, began: Flat, *, plan: StudyPlan, schema: Schema
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the update with nothing of the layers that stay, and these as training left them."""
    before, change = unpacked(began, schema), unflatten(update, schema)
    own = {name: before[name] + value for name, value in change.items() if stays(name, plan)}
    shared = {n: np.zeros_like(value) if n in own else value for n, value in change.items()}
    return shared, own


def keep(state_dir: Path, order: RoundOrder, own: Weights) -> None:
    """Keep the layers that training by ``order`` left; of earlier rounds the last before it.

    Raises:
        OSError: if they cannot be written; then no reply should leave either.
    """
    from safetensors.numpy import save

    before = [round_ for round_ in _rounds(state_dir, order) if round_ < order.round_]
    file = _file(state_dir, order, order.round_)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in file.parent.glob(".*.tmp"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    replace(file, save({n: np.ascontiguousarray(value) for n, value in own.items()}), mode=0o600)
    for round_ in sorted(before)[:-1]:
        _file(state_dir, order, round_).unlink(missing_ok=True)


def stays(name: str, plan: StudyPlan) -> bool:
    """Tell whether a parameter is of a layer that stays here."""
    return name.startswith(plan.training.personal)


def _read(file: Path, wanted: Schema) -> dict[str, Array]:
    try:
        own = dict(load(file))
        if schema_of(own) == wanted and is_finite(flatten(own)):
            return own
    except (OSError, ValueError):
        pass
    raise MachineError(
        "this site's own layers of the study cannot be read; restore the folder "
        f"{FOLDER} of the state folder, or remove it there to begin with the layers that are sent"
    )


def _rounds(state_dir: Path, order: RoundOrder) -> Iterator[int]:
    for file in (state_dir / FOLDER / order.study).glob(f"*{SUFFIX}"):
        if file.stem.isdigit():
            yield int(file.stem)


def _file(state_dir: Path, order: RoundOrder, round_: int) -> Path:
    return state_dir / FOLDER / order.study / f"{round_}{SUFFIX}"

"""A released model, believed only if everything about it can be shown.

Guarantees:
    A release whose manifest, plan or weights were changed by a bit is refused.
    A release that the site's own coordinator did not sign is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from shared_models import nets, plan, tasks
from shared_models import weights as weights_of
from shared_models.contracts import ReleaseManifest, Signature
from shared_models.errors import DocumentError, SignatureError
from shared_models.plan import StudyPlan
from shared_models.registry import find
from shared_models.signing import digest, is_signed_by

if TYPE_CHECKING:
    from torch.nn import Module

    from shared_models.tasks import Task

MANIFEST, SIGNATURE, PLAN = "manifest.json", "signature.json", "plan.toml"
MOST_BYTES = 2**20
AGAIN = "ask the coordinator for the release again"


class Released(NamedTuple):
    """A release that was checked: ``classes`` are the names the plan gives its task's classes."""

    manifest: ReleaseManifest
    plan: StudyPlan
    task: Task
    net: Module
    classes: tuple[str, ...]

    @property
    def spatial_dims(self) -> int:
        """How many dimensions the net's images have."""
        return int(str(self.plan.net.params.get("spatial_dims", 2)))

    @property
    def version(self) -> str:
        """What the model is called: its study, and how its weights begin."""
        return f"{self.plan.name} {self.manifest.weights_digest[:12]}"


def open_release(folder: Path, *, coordinator: str, plugins: Collection[str] = ()) -> Released:
    """Read a release and check it against the coordinator's public key (hexadecimal).

    Raises:
        DocumentError: if a part of it is missing, unreadable or not of the others.
        SignatureError: if the manifest or the plan is not signed by ``coordinator``.
    """
    manifest = _parsed(folder / MANIFEST, ReleaseManifest)
    signature = _parsed(folder / SIGNATURE, Signature)
    if not is_signed_by(manifest, signature, key=coordinator):
        raise SignatureError(
            "the release is not signed by the coordinator this hospital knows; "
            f"do not use it, and {AGAIN}"
        )
    signed = plan.read(folder / PLAN)
    if not is_signed_by(signed.plan, signed.signature, key=coordinator):
        raise SignatureError(
            f"the release's plan is not signed by the coordinator this hospital knows; {AGAIN}"
        )
    if digest(signed.plan) != manifest.study:
        raise DocumentError(f"the release's plan is not the one its model was made by; {AGAIN}")
    if manifest.parts:
        raise DocumentError(
            f"only a part of this model is released ({', '.join(manifest.parts)}), and a part says "
            "nothing of a study"
        )
    if signed.plan.training.personal:
        raise DocumentError(
            "layers of this model stayed with the hospitals that trained it, "
            f"{', '.join(signed.plan.training.personal)}, and the rest says nothing of a study"
        )
    weights = _weights(folder, manifest)
    task, net = _made(signed.plan, weights, plugins)
    named = signed.plan.task.params.get("classes", ())
    classes = tuple(str(name) for name in named) if isinstance(named, tuple) else ()
    return Released(manifest, signed.plan, task, net, classes)


def _weights(folder: Path, manifest: ReleaseManifest) -> dict[str, Any]:
    if Path(manifest.weights_file).name != manifest.weights_file:
        raise DocumentError("the manifest names weights outside the release; do not use it")
    try:
        weights = dict(weights_of.load(folder / manifest.weights_file))
    except (OSError, ValueError) as error:
        raise DocumentError(
            f"the release's weights cannot be read ({type(error).__name__}); {AGAIN}"
        ) from None
    if any(value.dtype != np.float32 for value in weights.values()):
        raise DocumentError(f"expected weights of float32 only; {AGAIN}")
    flat = weights_of.flatten(weights)
    if weights_of.digest(flat) != manifest.weights_digest or not weights_of.is_finite(flat):
        raise DocumentError(f"the weights are not those the release was signed for; {AGAIN}")
    return weights


def _made(
    agreed: StudyPlan, weights: dict[str, Any], plugins: Collection[str]
) -> tuple[Task, Module]:
    from shared_models.nets.base import load_weights

    try:
        task = find("tasks", agreed.task.name, builtin=tasks.BUILTIN, plugins=plugins)(
            **agreed.task.params
        )
        net = nets.make(
            agreed.net.name,
            agreed.net.params,
            seed=0,
            num_outputs=task.num_outputs,
            plugins=plugins,
        )
        load_weights(net, weights)
    except (ValueError, TypeError, RuntimeError) as error:  # names and shapes of tensors only
        raise DocumentError(
            f"the release's plan does not fit this software or its weights "
            f"({type(error).__name__}); install the version that made it"
        ) from None
    return task, net.eval()


def _parsed(file: Path, contract: type[Any]) -> Any:
    try:
        content = file.read_bytes()
        if len(content) > MOST_BYTES:
            raise DocumentError(f"{file.name} is too long to be a release's; {AGAIN}")
        return contract.model_validate_json(content)
    except OSError as error:
        raise DocumentError(
            f"cannot read {file.name} of the release ({error.strerror}); expected a folder with "
            f"{MANIFEST}, {SIGNATURE}, {PLAN} and the weights"
        ) from None
    except ValidationError as error:
        raise DocumentError(
            [f"{file.name}: {text}" for text in plan.sentences(error, model=contract)]
        ) from None

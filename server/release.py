"""Released weights and what must be known about them, side by side.

The folder holds ``weights.safetensors``, ``manifest.json`` (a ``ReleaseManifest``),
``signature.json`` (the coordinator's over the manifest) and ``plan.toml``, signed too: all that a
hospital needs to check what it was given and to use it (``client.display.release``). The folder is
made beside its place and moved there whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared_models import weights as weights_of
from shared_models.contracts import (
    Evaluation,
    ReleasedSite,
    ReleaseManifest,
    SiteResult,
    ValidationReport,
)
from shared_models.files import replace
from shared_models.plan import SignedPlan, render
from shared_models.signing import digest, sign
from shared_models.weights import Weights, schema_of, size_of

WEIGHTS = "weights.safetensors"
WITHHELD = "withheld.safetensors"
INTENDED_USE = "Research and demonstration. Not a medical device; not for diagnosis."


def release(
    folder: Path,
    signed: SignedPlan,
    weights: Weights,
    *,
    validation: ValidationReport,
    sites: Sequence[SiteResult],
    key: Ed25519PrivateKey,
    modalities: Sequence[str] = (),
    parts: tuple[str, ...] = (),
) -> ReleaseManifest:
    """Write the model of a finished study to ``folder``, which must not exist.

    Args:
        folder: where; it appears whole or not at all.
        signed: the plan, with its signature.
        weights: as they were validated.
        validation: on the coordinator's held-out images.
        sites: what each hospital said.
        key: the coordinator's, which signs the manifest.
        modalities: of the coordinator's held-out images.
        parts: how the names of the weights begin that the task releases, if not all. The others
            are kept beside the folder, so that the auditor can still check the whole.
    """
    plan = signed.plan
    released = weights
    if parts:
        released = {n: value for n, value in weights.items() if n.startswith(parts)}
        withheld = {n: value for n, value in weights.items() if not n.startswith(parts)}
        weights_of.save(folder.parent / WITHHELD, withheld)
    manifest = ReleaseManifest(
        study=digest(plan),
        round_=plan.training.num_rounds,
        net=plan.net.name,
        task=plan.task.name,
        weights_digest=validation.weights_digest,
        released_digest=weights_of.digest(weights_of.flatten(released)) if parts else None,
        parts=parts,
        weights_file=WEIGHTS,
        num_parameters=size_of(schema_of(released)),
        strategy=plan.strategy.name,
        validation=Evaluation(
            metrics=validation.metrics,
            intervals=validation.intervals,
            num_patients=validation.num_patients,
            num_images=validation.num_images,
        ),
        privacy={site.name: site.privacy for site in sites if site.privacy is not None},
        intended_use=INTENDED_USE,
        sites={site.name: _released(site) for site in sites},
        modalities=tuple(modalities),
    )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights_of.save(partial / WEIGHTS, released)
    replace(partial / "manifest.json", manifest.model_dump_json(indent=2).encode())
    replace(partial / "signature.json", sign(manifest, key=key).model_dump_json().encode())
    replace(partial / "plan.toml", render(plan, signed.signature).encode())
    partial.replace(folder)
    return manifest


def _released(site: SiteResult) -> ReleasedSite:
    return ReleasedSite(
        num_patients=site.num_patients,
        num_test_patients=site.num_test_patients,
        metrics=site.metrics,
        intervals=site.intervals,
    )

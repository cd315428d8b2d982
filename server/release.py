"""Released weights and what must be known about them, side by side.

The folder holds ``weights.safetensors`` and ``manifest.json`` (a ``ReleaseManifest``). It is made
beside its place and moved there whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from shared_models import weights as weights_of
from shared_models.contracts import Evaluation, ReleaseManifest, SiteResult, ValidationReport
from shared_models.files import replace
from shared_models.plan import StudyPlan
from shared_models.signing import digest
from shared_models.weights import Weights, schema_of, size_of

WEIGHTS = "weights.safetensors"
WITHHELD = "withheld.safetensors"
INTENDED_USE = "Research and demonstration. Not a medical device; not for diagnosis."


def release(
    folder: Path,
    plan: StudyPlan,
    weights: Weights,
    *,
    validation: ValidationReport,
    sites: Sequence[SiteResult],
    parts: tuple[str, ...] = (),
) -> ReleaseManifest:
    """Write the model of a finished study to ``folder``, which must not exist.

    Where the task releases ``parts`` only (how their names begin), the others are kept beside the
    folder, so that the auditor can still check the whole.
    """
    released = {n: value for n, value in weights.items() if not parts or n.startswith(parts)}
    withheld = {n: value for n, value in weights.items() if n not in released}
    if withheld:
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
    )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights_of.save(partial / WEIGHTS, released)
    replace(partial / "manifest.json", manifest.model_dump_json(indent=2).encode())
    partial.replace(folder)
    return manifest

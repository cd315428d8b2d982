"""Global validation on the coordinator's own held-out set, which no site holds."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from server.store import RunSettings
from shared_models import cohort, nets, tasks
from shared_models.cohort import Patient
from shared_models.contracts import Evaluation, Picture, ValidationReport
from shared_models.evaluation import evaluate, evaluate_baselines, seen, slide, summarize
from shared_models.imaging import Pair
from shared_models.plan import StudyPlan
from shared_models.registry import find
from shared_models.signing import digest
from shared_models.tasks import Task
from shared_models.tasks.base import Pixels
from shared_models.weights import Weights, packed
from shared_models.weights import digest as weights_digest

NUM_PICTURES = 6
#: Pictures are enlarged to at least this many pixels across.
PICTURE_WIDTH = 160
#: A header may say anything; only what can be a modality is told.
MODALITY = re.compile(r"[A-Z0-9_]{1,16}")


class Validator(NamedTuple):
    """The study's plan and task, the coordinator's patients and their images' modalities."""

    plan: StudyPlan
    task: Task
    patients: Sequence[Patient]
    modalities: tuple[str, ...] = ()

    def net(self, weights: Weights) -> torch.nn.Module:
        """Return the plan's net with ``weights``."""
        net = self.plan.net
        return nets.filled(net.name, net.params, weights, num_outputs=self.task.num_outputs)


def open_validator(plan: StudyPlan, settings: RunSettings) -> Validator:
    """Read the coordinator's held-out images.

    Raises:
        DataError: if the images cannot be used, with every objection at once.
    """
    torch.set_num_threads(settings.threads)
    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN)(**plan.task.params)
    if settings.validation_manifest is None:
        return Validator(plan, task, ())
    prepare, modalities = cohort.preparer(cohort.steps_of(plan)), set[str]()

    def noting(image: Path, label: Path | None) -> Pair:
        pair = prepare(image, label)
        if MODALITY.fullmatch(pair[0].modality):
            modalities.add(pair[0].modality)
        return pair

    patients = cohort.load(
        settings.validation_manifest,
        root=settings.validation_root or settings.validation_manifest.parent,
        plan=plan,
        task=task,
        prepare=noting,
    )
    everybody = [p for split in patients.values() for p in split]
    return Validator(plan, task, everybody, tuple(sorted(modalities)))


def validate(validator: Validator, weights: Weights, *, with_intervals: bool = False) -> Evaluation:
    """Return the metrics of ``weights`` on the coordinator's patients."""
    if not validator.patients:
        return summarize((), task=validator.task, with_intervals=with_intervals)
    return evaluate(
        validator.net(weights),
        validator.patients,
        task=validator.task,
        with_intervals=with_intervals,
        window=validator.plan.training.patch,
    )


def final_report(validator: Validator, weights: Weights, *, first: Weights) -> ValidationReport:
    """Return the metrics with intervals, and a few of the coordinator's images with predictions.

    Beside them stands what the weights it began with, ``first``, and the task's baselines reach.
    """
    baselines = {}
    if validator.patients:
        baselines = evaluate_baselines(validator.patients, task=validator.task)
        name = "untrained" if validator.plan.start is None else "warm start"
        baselines = {name: validate(validator, first, with_intervals=True)} | baselines
    found = validate(validator, weights, with_intervals=True)
    return ValidationReport(
        study=digest(validator.plan),
        weights_digest=weights_digest(packed(weights)),
        metrics=found.metrics,
        intervals=found.intervals,
        num_patients=found.num_patients,
        num_images=found.num_images,
        baselines=baselines,
        covers=validator.task.covers if validator.plan.privacy is not None else "",
        pictures=tuple(_pictures(validator, weights)),
    )


@torch.no_grad()
def _pictures(validator: Validator, weights: Weights) -> list[Picture]:
    """Draw patients spread evenly over the set: not chosen by how well they went."""
    task, patients = validator.task, validator.patients
    if not patients:
        return []
    step = max(1, len(patients) // NUM_PICTURES)
    pictures, net = [], validator.net(weights).eval()
    for number, patient in list(enumerate(patients))[::step][:NUM_PICTURES]:
        index = len(patient.images) // 2
        shown = seen(patient, number, task=task)
        run, window = partial(task.run, net), validator.plan.training.patch
        image = shown.images[index : index + 1]
        output = (slide(run, image, window=window) if window else run(image))[0]
        pixels, caption = task.picture(shown.images[index], shown.targets[index], output)
        pictures.append(Picture(caption=caption, png_base64=_png(pixels)))
    return pictures


def _png(pixels: Pixels) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    scale = max(1, -(-PICTURE_WIDTH // picture.width))
    picture = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()

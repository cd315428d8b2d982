"""One batch of the plan, on made-up images, by the real engine, in a process of its own.

``python -m client.preflight.dry`` reads a job from its standard input and writes what it took as
the last line of its standard output. It is given no path, key or image of the hospital: the images
are noise of the size the plan's steps give. A process of its own, so that what it takes of memory
can be measured, and that it can be ended without harm.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from pydantic import Field, ValidationError

from client.config import PerformanceSettings
from client.preflight.base import MIB, Case, Finding, duration, several, size
from shared_models.contracts import Contract, Count, NonNegative
from shared_models.plan import StudyPlan

LIMIT_S = 300.0
STEPS_S = 4.0  # as many steps as fit, so that one slow one does not decide
MOST_STEPS = 5
#: Where nobody opened an image: the size of one before the plan's steps, in three dimensions or two
UNSEEN = {3: (64, 64, 64), 2: (1, 256, 256)}


class Job(Contract):
    """What to try; without a plan only the device is looked at."""

    plan: StudyPlan | None = None
    performance: PerformanceSettings
    plugins: tuple[str, ...] = ()
    num_patients: Count = 0
    num_test_images: Count = 0
    num_images: Count = 0
    image_size: tuple[int, ...] | None = None


class Dry(Contract):
    """What a dry batch took. ``trouble``: why there is none, as a kind of error or in our words."""

    device: str = "cpu"
    gpu: str = ""
    gpu_bytes: Count = 0
    gpu_free_bytes: Count = 0
    gpu_peak_bytes: Count = 0
    trouble: str = ""
    step_s: NonNegative | None = None
    num_drawn: Count = 0
    evaluation_s: NonNegative = 0.0
    peak_bytes: Count = 0
    cohort_bytes: Count = 0
    weights_bytes: Count = 0
    update_bytes: Count = 0
    metrics: tuple[str, ...] = Field(default=())


def gpu(case: Case) -> Iterator[Finding]:
    """Yield whether the device the settings name is there; the batch is tried on it, once."""
    if case.depth == "quick":
        yield Finding("GPU", None, "left out by --quick", "this machine")
        return
    case.progress("trying a batch", 0, 0)
    case.dry = tried(case)
    wanted, found = case.config.performance.device, case.dry
    if found.gpu:
        said = f"{found.gpu}, {size(found.gpu_free_bytes)} of {size(found.gpu_bytes)} free"
        figures = {"gpu_free_mb": found.gpu_free_bytes // MIB}
        yield Finding("GPU", True, said, "this machine", figures=figures)
    elif wanted == "cuda":
        said = "none that torch can use, though performance.device is cuda"
        cure = "see whether nvidia-smi shows it to the agent's user; or set performance.device"
        yield Finding("GPU", False, said, "this machine", cure)
    else:
        yield Finding("GPU", True, "none; training runs on the CPU", "this machine")


def dry_batch(case: Case) -> Iterator[Finding]:
    """Yield whether a step of the plan can be taken, and how long it lasts."""
    what, dry = "dry batch", case.dry
    if case.plan is None or dry is None:
        lack = "left out by --quick" if case.depth == "quick" else "no plan was named to try one of"
        yield Finding(what, None, lack, "this machine")
        return
    if dry.step_s is None:
        cure = (
            "lower performance.most_images, or give the machine more memory"
            if "emory" in dry.trouble
            else "ask the coordinator whether the plan was rehearsed with images of this size"
        )
        yield Finding(what, False, f"no step was taken: {dry.trouble}", "this machine", cure)
        return
    said = (
        f"a step with {several(dry.num_drawn, 'patient')} takes {duration(dry.step_s)} on "
        f"{'the GPU' if dry.device == 'cuda' else 'the CPU'}"
    )
    figures = {"step_s": round(dry.step_s, 4), "peak_mb": dry.peak_bytes // MIB}
    yield Finding(what, True, said, "this machine", figures=figures)


def metrics(case: Case) -> Iterator[Finding]:
    """Yield which of the task's metrics leave, and which the gate keeps."""
    if case.plan is None or case.dry is None or not case.dry.metrics:
        return
    from client.gate import allowed_metrics

    allowed = allowed_metrics(case.plan, case.config)
    leave = [name for name in case.dry.metrics if name in allowed]
    stay = [name for name in case.dry.metrics if name not in allowed]
    said = f"{', '.join(leave) or 'none'} may leave"
    if not stay:
        yield Finding("metrics", True, said, "settings")
        return
    cure = "add it to policy.metrics if the study is to see it; the round goes on without it"
    said += f"; {', '.join(stay)} stay{'s' if len(stay) == 1 else ''} here"
    yield Finding("metrics", None, said, "settings", cure)


def tried(case: Case) -> Dry:
    """Try a batch in another process and return what it took; it never raises for what that did."""
    rows = case.rows
    train = {row.patient for row in rows if row.split == "train"}
    job = Job(
        plan=case.plan,
        performance=case.config.performance,
        plugins=case.config.policy.plugins,
        num_patients=len(train),
        num_test_images=sum(row.split == "test" for row in rows) * case.images_per_row,
        num_images=sum(row.split != "val" for row in rows) * case.images_per_row,
        image_size=case.image_size,
    )
    command = [sys.executable, "-m", "client.preflight.dry"]
    try:
        ended = subprocess.run(
            command, input=job.model_dump_json().encode(), capture_output=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return Dry(trouble=f"it took longer than {duration(LIMIT_S)}")
    if ended.returncode < 0:
        return Dry(trouble=f"the system ended it (signal {-ended.returncode}): out of memory?")
    try:
        return Dry.model_validate_json(ended.stdout.splitlines()[-1])
    except (IndexError, ValidationError):
        return Dry(trouble=f"its process ended without an answer (exit {ended.returncode})")


def take(job: Job) -> Dry:
    """Try a batch here."""
    import resource

    import torch

    torch.set_num_threads(job.performance.threads)
    has_gpu = torch.cuda.is_available() and job.performance.device != "cpu"
    device = "cuda" if has_gpu or job.performance.device == "cuda" else "cpu"
    found = Dry(device=device)
    if has_gpu:
        free, total = torch.cuda.mem_get_info()
        name = "".join(c for c in torch.cuda.get_device_name() if c.isprintable())[:80]
        found = found.model_copy(update={"gpu": name, "gpu_bytes": total, "gpu_free_bytes": free})
    if job.plan is None or (device == "cuda" and not has_gpu):
        return found.model_copy(update={"trouble": "" if job.plan is None else "there is no GPU"})
    try:
        found = found.model_copy(update=_taken(job, job.plan, device))
    except Exception as error:  # whatever a net, an engine or a driver raises
        kind = type(error).__name__
        words = "out of memory" if kind in ("OutOfMemoryError", "MemoryError") else kind
        return found.model_copy(update={"trouble": words})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu_peak = torch.cuda.max_memory_allocated() if has_gpu else 0
    return found.model_copy(update={"peak_bytes": peak, "gpu_peak_bytes": gpu_peak})


def _taken(job: Job, plan: StudyPlan, device: str) -> dict[str, Any]:
    """Take steps and an evaluation; return the fields of ``Dry`` they fill."""
    from shared_models import nets, tasks
    from shared_models.evaluation import evaluate
    from shared_models.nets.base import weights_of
    from shared_models.registry import find
    from shared_models.weights import schema_of, size_of

    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN, plugins=job.plugins)(
        **plan.task.params
    )
    net = nets.make(
        plan.net.name, plan.net.params, seed=0, num_outputs=task.num_outputs, plugins=job.plugins
    )
    weights = 4 * size_of(schema_of(weights_of(net)))
    num_patients = max(job.num_patients, plan.min_patients)
    drawn = max(2, math.ceil(num_patients * plan.training.sample_rate))
    patients = _made_up(job, plan, task, drawn)
    step_s = _timed_step(net, patients, plan, task, job, device)
    start = time.monotonic()
    tested = patients[: min(drawn, 8)]
    evaluation = evaluate(net, tested, task=task, device=device, window=plan.training.patch)
    each_s = (time.monotonic() - start) / max(sum(len(p.images) for p in tested), 1)
    one = patients[0]
    image_bytes = (one.images[0].numel() * 4) + (one.targets[0].numel() * 8)
    return {
        "step_s": step_s,
        "num_drawn": drawn,
        "evaluation_s": each_s * job.num_test_images,
        "cohort_bytes": image_bytes * job.num_images,
        "weights_bytes": weights,
        "update_bytes": weights * (2 if plan.rounds.secure_aggregation else 1),
        "metrics": tuple(sorted(evaluation.metrics)),
    }


def _made_up(job: Job, plan: StudyPlan, task: Any, number: int) -> list[Any]:
    """Return patients of noise, every class among their targets; they share their images."""
    import numpy as np
    import torch

    from shared_models.cohort import Patient
    from shared_models.imaging import pipeline
    from shared_models.tasks import Box
    from shared_models.volume import Volume

    dims = int(str(plan.net.params.get("spatial_dims", 2)))
    shape = job.image_size
    if shape is None:
        steps = pipeline([(s.name, dict(s.params)) for s in plan.imaging], plugins=job.plugins)
        noise = np.random.Generator(np.random.PCG64(0)).random(UNSEEN[dims], dtype=np.float32)
        made, _ = steps(Volume(noise, np.eye(4)))
        shape = made.data.shape if dims == 3 else made.data.shape[1:]
    patch = plan.training.patch
    shape = tuple(map(max, shape, patch)) if patch else shape
    each = plan.training.images_per_patient
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((each, 1, *shape), generator=generator)
    spacing = ((1.0,) * len(shape),) * each
    if task.label_kind == "map":
        maps = torch.randint(task.num_outputs, (each, *shape), generator=generator)
        return [Patient(images, maps, spacing) for _ in range(number)]
    if task.label_kind == "boxes":
        y, x = shape
        classes = plan.task.params.get("classes", ())
        names = list(map(str, classes))[:3] if isinstance(classes, tuple) else []
        listed = [Box(name, (x / 4, y / 4), (x / 2, y / 2)) for name in names]
        target = task.encode_boxes(listed, (y, x))
        return [Patient(images, torch.stack([target] * each), spacing) for _ in range(number)]
    if task.label_kind == "none":
        return [Patient(images, torch.zeros(each).long(), spacing) for _ in range(number)]
    numbers = torch.arange(max(number * each, 1)) % task.num_outputs
    return [Patient(images, numbers[i * each : (i + 1) * each], spacing) for i in range(number)]


def _timed_step(
    net: Any, patients: list[Any], plan: StudyPlan, task: Any, job: Job, device: str
) -> float:
    """Return the seconds of a step in which all of ``patients`` are drawn; the first warms up."""
    from client.noise import secure
    from client.train import Performance, train
    from shared_models.plan import event_of
    from shared_models.privacy import share_of

    training = plan.training.model_copy(update={"sample_rate": 1.0, "steps_per_round": 1})
    settings = job.performance
    took = list[float]()
    begun = time.monotonic()
    while len(took) < 2 or (time.monotonic() - begun < STEPS_S and len(took) <= MOST_STEPS):
        start = time.monotonic()
        train(
            net,
            patients,
            plan=plan.model_copy(update={"training": training}),
            task=task,
            rounds=[0],
            randomness=secure(),
            noise_multiplier=0.0 if plan.privacy is None else share_of(event_of(plan, steps=1)),
            performance=Performance(
                device=device,
                autocast=settings.autocast,
                most_images=settings.most_images,
                engine=settings.engine,
            ),
        )
        took.append(time.monotonic() - start)
    return sorted(took[1:])[len(took[1:]) // 2]


def main() -> None:
    """Do the job on standard input."""
    import warnings

    warnings.simplefilter("ignore")
    found = take(Job.model_validate_json(sys.stdin.buffer.read()))
    sys.stdout.write(json.dumps(found.model_dump()) + "\n")


if __name__ == "__main__":
    main()

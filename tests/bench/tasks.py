"""Every task on real images: centralised, federated, federated under privacy, and alone.

    python tests/bench/tasks.py --data ../shared/data [--only TASK ...] [--kinds KIND ...]
        [--seeds 3] [--jobs 2] [--json FILE]

Each figure is the task's headline metric on the test patients of the manifest, of all hospitals
together and of each. ``centralised`` is the recipe with all patients at one site, ``alone`` each
hospital's own training in as many steps, and ``untrained`` and the names beside it need no
training. Privacy is per patient, at delta 1 / (10 N) for all N training patients, add or remove
one, Poisson sampling, PLD accountant. Means over seeds with 95 % t intervals. Runs that FILE holds
are not repeated, so that a long table may be made in several sittings.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table
from utility import interval

from client import setup
from server import recipes, start
from server.hospitals import DataSet, adopt, write_manifests
from server.release import WEIGHTS, WITHHELD
from server.simulate import simulate
from shared_models import cohort, nets, tasks
from shared_models.evaluation import evaluate_baselines, score_patient, summarize
from shared_models.nets.base import load_weights
from shared_models.plan import StudyPlan
from shared_models.registry import find
from shared_models.weights import load

KEY = "0" * 64
#: The real images each task is measured on.
SETS = {
    "anomaly": "cxr_pneumonia",
    "classification": "cxr_pneumonia",
    "clustering": "cxr_pneumonia",
    "denoising": "hippocampus_mr",
    "detection": "blood_cells_boxes",
    "embedding": "cxr_pneumonia",
    "enhancement": "cxr_pneumonia",
    "generation": "cxr_pneumonia",
    "localization": "hippocampus_mr",
    "reconstruction": "hippocampus_mr",
    "segmentation": "hippocampus_mr",
    "series-classification": "hippocampus_mr",
}
EPSILONS = {"epsilon 8": 8.0, "epsilon 2": 2.0}
KINDS = ("centralised", "federated", *EPSILONS)


class Run(NamedTuple):
    """One study to run."""

    task: str
    kind: str
    seed: int


Found = dict[str, dict[str, float]]


def run(job: Run, *, data_dir: Path) -> tuple[Run, Found]:
    """Return the headline metric by way of training, then by hospital (``all`` is together)."""
    folder = data_dir / SETS[job.task]
    data = adopt(folder, labels=recipes.labels_of(job.task, folder))
    given = data
    if job.kind == "centralised":
        given = data._replace(rows=tuple(row | {"site": "pooled"} for row in data.rows))
    with tempfile.TemporaryDirectory() as scratch:
        plan, alone = studied(job, given, Path(scratch))
        net, task = made(plan, Path(scratch) / "out")
        by_site = {site: tested(plan, task, data, site, Path(scratch)) for site in data.sites}
        everybody = [patient for patients in by_site.values() for patient in patients]
        found: Found = {job.kind: {"all": headline(net, task, everybody)}}
        found[job.kind] |= {site: headline(net, task, p) for site, p in by_site.items()}
        if job.kind == "federated":
            found["alone"] = alone
            untrained = nets.make(
                plan.net.name, plan.net.params, seed=job.seed, num_outputs=task.num_outputs
            )
            found["untrained"] = {"all": headline(untrained, task, everybody)}
            for name, each in evaluate_baselines(everybody, task=task).items():
                found[name] = {"all": each.metrics.get(task.headline, float("nan"))}
        return job, found


def studied(job: Run, data: DataSet, folder: Path) -> tuple[StudyPlan, dict[str, float]]:
    """Simulate the recipe's study in ``folder``; return its plan, and what each site did alone."""
    epsilon = EPSILONS.get(job.kind)
    dirs = {site: folder / "sites" / site for site in data.sites}
    for site, site_dir in dirs.items():
        setup.create_unenrolled(
            site_dir,
            name=site,
            coordinator=KEY,
            address="127.0.0.1:1",
            root_certificates=Path("none"),
            manifest=site_dir / "manifest.csv",
            root=data.root,
            allow_without_privacy=epsilon is None,
            max_epsilon=epsilon or 8.0,
        )
    terms = recipes.start_terms(data, task=job.task, epsilon=epsilon)
    own = folder / "start.csv" if terms else None
    write_manifests(data, site_dirs=dirs, validation=folder / "validation.csv", start=own)
    plan = recipes.plan_for(
        data,
        name="tasks",
        task=job.task,
        coordinator=KEY,
        seed=job.seed,
        epsilon=epsilon,
        deadline_s=7200.0,
        compare_alone=job.kind == "federated",
    )
    given = None
    if terms is not None and own is not None:
        plan, _ = start.warmed(plan, own, root=data.root, run_dir=folder, terms=terms)
        given = folder / start.FILE
    report = simulate(plan, list(dirs.values()), folder / "out", start=given)
    alone = {site.name: (site.alone or {}).get(report.headline) for site in report.sites}
    return plan, {site: value for site, value in alone.items() if value is not None}


def made(plan: StudyPlan, folder: Path) -> tuple:
    """Return the study's net, with what was not released too, and its task."""
    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN)(**plan.task.params)
    net = nets.make(plan.net.name, plan.net.params, seed=0, num_outputs=task.num_outputs)
    weights = load(folder / "model" / WEIGHTS)
    if (folder / WITHHELD).exists():
        weights |= load(folder / WITHHELD)
    load_weights(net, weights)
    return net, task


def tested(
    plan: StudyPlan, task: tasks.Task, data: DataSet, site: str, folder: Path
) -> list[cohort.Patient]:
    """Return a hospital's test patients."""
    rows = tuple(row for row in data.rows if row["site"] == site)
    place = folder / "test" / site
    write_manifests(
        data._replace(rows=rows), site_dirs={site: place}, validation=place / "validation.csv"
    )
    manifest = place / "manifest.csv"
    return cohort.load(manifest, root=data.root, plan=plan, task=task, splits=("test",))["test"]


def headline(net: object, task: tasks.Task, patients: list[cohort.Patient]) -> float:
    """Return the headline metric of ``net``; nan if it cannot be computed."""
    scores = [score_patient(net, p, task=task, number=n) for n, p in enumerate(patients)]
    metrics = summarize(scores, task=task, with_intervals=False).metrics
    return metrics.get(task.headline, float("nan"))


def table(found: dict[Run, Found]) -> Table:
    """Return a row for each task: all test patients by kind, then who lost by joining."""
    shown = Table(title="headline metric on all test patients, mean and 95 % t interval")
    for column in ("task", "metric", *KINDS, "alone, mean of sites", "untrained, others"):
        shown.add_column(column, overflow="fold")
    for task in dict.fromkeys(job.task for job in found):
        runs = [each for job, each in found.items() if job.task == task]
        cells = [cell([each[kind]["all"] for each in runs if kind in each]) for kind in KINDS]
        alone = [list(each["alone"].values()) for each in runs if each.get("alone")]
        cells.append(cell([sum(values) / len(values) for values in alone]))
        others = dict.fromkeys(n for each in runs for n in each if n not in (*KINDS, "alone"))
        told = [
            f"{name} {cell([each[name]['all'] for each in runs if name in each])}"
            for name in others
        ]
        shown.add_row(task, metric_of(task), *cells, "\n".join(told))
    return shown


def metric_of(task: str) -> str:
    """Return the name of a task's headline metric."""
    for params in ({"classes": ("a", "b")}, {}):
        try:
            return str(find("tasks", task, builtin=tasks.BUILTIN)(**params).headline)
        except (TypeError, ValueError):
            continue
    return ""


def cell(values: list[float]) -> str:
    """Write a mean with its interval, if there are several values."""
    if not values:
        return ""
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if len(values) > 1 else f"{mean:.3f}"


def read(file: Path | None) -> dict[Run, Found]:
    """Return the runs that a file of ``--json`` holds."""
    if file is None or not file.exists():
        return {}
    return {
        Run(task, kind, seed["seed"]): seed["found"]
        for task, kinds in json.loads(file.read_text()).items()
        for kind, seeds in kinds.items()
        for seed in seeds
    }


def as_json(found: dict[Run, Found]) -> dict:
    """Return the runs by task, then by kind."""
    shaped: dict = {}
    for job, each in found.items():
        seeds = shaped.setdefault(job.task, {}).setdefault(job.kind, [])
        seeds.append({"seed": job.seed, "found": each})
    return shaped


def results(jobs: list[Run], data_dir: Path, num_jobs: int) -> Iterable[tuple[Run, Found]]:
    """Yield the runs as they end."""
    if num_jobs == 1:
        yield from map(partial(run, data_dir=data_dir), jobs)
        return
    with ProcessPoolExecutor(num_jobs) as pool:
        yield from pool.map(partial(run, data_dir=data_dir), jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, found = Console(), read(arguments.json)
    there_are = [task for task in arguments.only if task in tasks.BUILTIN]
    wanted = [Run(*each) for each in product(there_are, arguments.kinds, range(arguments.seeds))]
    jobs = [job for job in wanted if job not in found]
    done = results(jobs, arguments.data, arguments.jobs)
    for job, each in track(done, total=len(jobs), description="studies", console=console):
        found[job] = each
        console.print(f"{job.task} {job.kind} seed {job.seed}: {each}")
        if arguments.json:
            arguments.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    console.print(table(found))


if __name__ == "__main__":
    main()

"""What each lever is worth to a private model on the real images, one changed at a time.

    python tests/bench/utility.py --data ../shared/data [--only SET] [--epsilons 2 4 8] [--seeds 3]
        [--variants NAME ...] [--jobs 2] [--json FILE]

The default is the demonstration's private recipe without the comparison with training alone (which
costs as much privacy as training together). Every variant changes what its row says and nothing
else; its noise is calibrated anew to the same epsilon. Patient-level, delta 1 / (10 N) for all N
training patients, add or remove one, Poisson sampling, PLD accountant. Figures are the headline
metric on the manifest's test split: means over seeds with 95 % t intervals. The recipe's
hyper-parameters were chosen on these data, which no epsilon accounts for. Runs that FILE
holds are not repeated, so that a long table may be made in several sittings.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from reference import KEY, SETS, on_test
from rich.console import Console
from rich.progress import track
from rich.table import Table

from client import setup
from server import recipes, start
from server.hospitals import DataSet, adopt, write_manifests
from server.simulate import simulate
from shared_models.plan import StudyPlan
from shared_models.weights import digest, flatten, load

#: Student's t for a two-sided 95 % interval, by the number of seeds.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
#: Where the last layers' parameters begin, which alone are trained where the others are frozen.
LAST = {"cxr_pneumonia": "class_layers", "hippocampus_mr": "model.2."}


def changed(plan: StudyPlan, **tables: dict) -> StudyPlan:
    """Return ``plan`` with some of its tables' entries changed."""
    for name, entries in tables.items():
        plan = plan.model_copy(update={name: getattr(plan, name).model_copy(update=entries)})
    return plan


def unsplit(plan: StudyPlan) -> StudyPlan:
    """Let every site add all of the noise."""
    return changed(plan, privacy={"noise_shares": 1}, rounds={"secure_aggregation": False})


def corrected_adam(plan: StudyPlan) -> StudyPlan:
    """Let every site take five steps of bias-corrected DP-Adam a round, with all of the noise."""
    rounds = max(1, plan.training.num_rounds // 5)
    steps = {"optimizer": "adam-bc", "steps_per_round": 5, "num_rounds": rounds}
    rates = {"learning_rate": 1e-3, "learning_rate_end": 1e-4}
    plan = changed(unsplit(plan), training=steps | rates)
    return plan.model_copy(
        update={"strategy": plan.strategy.model_copy(update={"name": "fedavg", "params": {}})}
    )


VARIANTS: dict[str, Callable[[StudyPlan], StudyPlan]] = {
    "default": lambda plan: plan,
    "no warm start": lambda plan: plan.model_copy(update={"start": None}),
    "all noise at every site": unsplit,
    "small batches (q / 5)": lambda plan: changed(
        plan, training={"sample_rate": plan.training.sample_rate / 5}
    ),
    "weights averaged (EMA .9)": lambda plan: changed(plan, rounds={"averaging": 0.9}),
    "4 views, shifted by up to 2": lambda plan: changed(plan, training={"views": 4, "shift": 2}),
    "automatic clipping": lambda plan: changed(plan, privacy={"clipping": "automatic"}),
    "bias-corrected DP-Adam": corrected_adam,
    "frozen first layers": lambda plan: plan,  # `run` freezes them: which, depends on the net
}


class Run(NamedTuple):
    """One training: a set, an epsilon, a variant and a seed."""

    name: str
    epsilon: float
    variant: str
    seed: int


def run(job: Run, *, data_dir: Path, cache: Path) -> tuple[Run, dict[str, float]]:
    """Simulate the study and return the headline metric on all test patients and on each site's.

    For the variant called ``start only`` nothing is trained but the warm start. Starts are kept in
    ``cache``, for the same set and seed give the same one.
    """
    task, _ = SETS[job.name]
    data = adopt(data_dir / job.name, labels=recipes.labels_of(task))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dirs = {site: folder / "sites" / site for site in data.sites}
        for site, site_dir in dirs.items():
            setup.create(
                site_dir,
                name=site,
                coordinator=KEY,
                address="127.0.0.1:1",
                root_certificates=Path("none"),
                manifest=site_dir / "manifest.csv",
                root=data.root,
                max_epsilon=job.epsilon,
            )
        terms = recipes.start_terms(data, task=task, epsilon=job.epsilon)
        validation, own = folder / "validation.csv", folder / "start.csv"
        write_manifests(data, site_dirs=dirs, validation=validation, start=own)
        plan = recipes.plan_for(
            data,
            name="utility",
            task=task,
            coordinator=KEY,
            seed=job.seed,
            epsilon=job.epsilon,
            compare_alone=False,
        )
        if terms is not None and job.variant != "no warm start":
            plan = warmed(plan, folder, cache / f"{job.name}-{job.seed}", data, terms)
        if job.variant == "start only":
            weights = folder / "out" / "model"
            weights.mkdir(parents=True)
            (folder / start.FILE).rename(weights / "weights.safetensors")
            return job, on_test(plan, data, folder)
        plan = VARIANTS[job.variant](plan)
        if job.variant == "frozen first layers":
            plan = changed(plan, training={"frozen": frozen(folder / start.FILE, job.name)})
        plan = recipes.calibrated(plan)
        given = folder / start.FILE if plan.start is not None else None
        simulate(plan, list(dirs.values()), folder / "out", start=given)
        return job, on_test(plan, data, folder)


def warmed(
    plan: StudyPlan, folder: Path, kept: Path, data: DataSet, terms: start.StartTerms
) -> StudyPlan:
    """Return the plan with its warm start, which then lies in ``folder`` and is kept."""
    if not kept.exists():
        start.warmed(plan, folder / "start.csv", root=data.root, run_dir=folder, terms=terms)
        own = shutil.copyfile(folder / start.FILE, kept.with_suffix(f".{os.getpid()}"))
        own.replace(kept)
    shutil.copyfile(kept, folder / start.FILE)
    return plan.model_copy(update={"start": digest(flatten(load(kept)))})


def frozen(file: Path, name: str) -> tuple[str, ...]:
    """Return all parameters but those of the last layers."""
    return tuple(n for n in sorted(load(file)) if not n.startswith(LAST[name]))


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean of shares of one and its 95 % t interval; of one value, that value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = T_95.get(len(values), 2.57) * statistics.stdev(values) / len(values) ** 0.5
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def table(name: str, found: dict[Run, dict[str, float]]) -> Table:
    """Return a row for each variant, a column for each epsilon."""
    runs = [job for job in found if job.name == name]
    epsilons = sorted({job.epsilon for job in runs})
    shown = Table(title=f"{name}, test split, mean and 95 % t interval over seeds")
    shown.add_column("")
    for value in epsilons:
        shown.add_column(f"epsilon {value:g}")
    for variant in dict.fromkeys(job.variant for job in runs):
        cells = []
        for value in epsilons:
            of = [found[j]["all"] for j in runs if (j.variant, j.epsilon) == (variant, value)]
            if not of:
                cells.append("")
                continue
            mean, low, high = interval(of)
            cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]" if len(of) > 1 else f"{mean:.3f}")
        shown.add_row(variant, *cells)
    return shown


def read(file: Path | None) -> dict[Run, dict[str, float]]:
    """Return the runs a file of ``--json`` holds."""
    if file is None or not file.exists():
        return {}
    fields = [(entry.pop("metric"), entry) for entry in json.loads(file.read_text())]
    return {Run(**entry): metric for metric, entry in fields}


def as_json(found: dict[Run, dict[str, float]]) -> list[dict]:
    """Return one object a run."""
    return [{**job._asdict(), "metric": values} for job, values in found.items()]


def jobs_of(arguments: argparse.Namespace) -> list[Run]:
    """Return all runs asked for; what no epsilon changes is run once."""
    names = [name for name in SETS if arguments.only in (None, name)]
    runs = []
    for name, seed, variant in product(names, range(arguments.seeds), arguments.variants):
        is_private = variant != "start only"
        epsilons: Iterable[float] = arguments.epsilons if is_private else [max(arguments.epsilons)]
        runs += [Run(name, epsilon, variant, seed) for epsilon in epsilons]
    return runs


def main() -> None:
    known = ["start only", *VARIANTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", choices=list(SETS))
    parser.add_argument("--epsilons", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = read(arguments.json)
    runs = [job for job in jobs_of(arguments) if job not in found]
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(arguments.jobs, max_tasks_per_child=1) as pool,
    ):
        work = partial(run, data_dir=arguments.data, cache=Path(cache))
        for job, values in track(pool.map(work, runs), total=len(runs), description="training"):
            found[job] = values
            if arguments.json:
                arguments.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    for name in dict.fromkeys(job.name for job in found):
        Console().print(table(name, found))


if __name__ == "__main__":
    main()

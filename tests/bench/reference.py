"""Federated beside centralised and local-only training, without privacy, on the real images.

    python tests/bench/reference.py --data ../shared/data --seeds 3 [--only NAME] [--json FILE]

Every figure is on the manifest's test split. Federated is the study's own in-process runtime with
the recipe the demonstration uses; centralised is the same recipe with all patients at one site;
alone is each hospital's own training in the same number of steps. ``reference`` is the plain FedAvg
baseline published with the data, which federated must reach.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from client import setup
from server import recipes
from server.hospitals import DataSet, adopt, write_manifests
from server.simulate import simulate
from shared_models import cohort, nets, tasks
from shared_models.contracts import StudyReport
from shared_models.evaluation import score_patient, summarize
from shared_models.nets.base import load_weights
from shared_models.plan import StudyPlan
from shared_models.registry import find
from shared_models.weights import load

KEY = "0" * 64
SETS = {
    "blood_cells_boxes": ("detection", 0.664),
    "cxr_pneumonia": ("classification", 0.895),
    "hippocampus_mr": ("segmentation", 0.813),
    "nuclei": ("segmentation", 0.671),
}


def run_study(data: DataSet, task: str, seed: int, folder: Path) -> tuple[StudyPlan, StudyReport]:
    """Simulate the recipe's study over ``data`` in ``folder``."""
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
            allow_without_privacy=True,
        )
    write_manifests(data, site_dirs=dirs, validation=folder / "validation.csv")
    plan = recipes.plan_for(
        data, name="reference", task=task, coordinator=KEY, seed=seed, epsilon=None
    )
    plan = plan.model_copy(update={"compare_alone": len(dirs) > 1})
    return plan, simulate(plan, list(dirs.values()), folder / "out")


def on_test(plan: StudyPlan, data: DataSet, folder: Path) -> dict[str, float]:
    """Return the headline metric of the study's model on all test patients and on each site's."""
    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN)(**plan.task.params)
    net = nets.make(plan.net.name, plan.net.params, seed=0, num_outputs=task.num_outputs)
    load_weights(net, load(folder / "out" / "model" / "weights.safetensors"))
    found, pooled = {}, []
    for site in data.sites:
        manifest = folder / "test" / f"{site}.csv"
        kept = tuple(r for r in data.rows if r["site"] == site)
        part = data._replace(rows=kept)
        write_manifests(part, site_dirs={site: manifest.parent / site}, validation=manifest)
        patients = cohort.load(
            manifest.parent / site / "manifest.csv",
            root=data.root,
            plan=plan,
            task=task,
            splits=("test",),
        )["test"]
        scores = [score_patient(net, patient, task=task) for patient in patients]
        pooled += scores
        metrics = summarize(scores, task=task, with_intervals=False).metrics
        found[site] = metrics[task.headline]
    metrics = summarize(pooled, task=task, with_intervals=False).metrics
    return {"all": metrics[task.headline]} | found


def compare(data_dir: Path, task: str, seeds: range, console: Console) -> dict[str, list[dict]]:
    """Return the headline metric by kind of training, one dictionary a seed."""
    data = adopt(data_dir, labels=recipes.labels_of(task, data_dir))
    pooled = data._replace(rows=tuple(row | {"site": "pooled"} for row in data.rows))
    results: dict[str, list[dict]] = {"centralised": [], "federated": [], "alone": []}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            for kind, given in (("centralised", pooled), ("federated", data)):
                folder = Path(scratch) / kind
                plan, report = run_study(given, task, seed, folder)
                results[kind].append(on_test(plan, data, folder))
                console.print(f"{data_dir.name} seed {seed} {kind}: {results[kind][-1]}")
            alone = {s.name: (s.alone or {}).get(report.headline) for s in report.sites}
            results["alone"].append(alone)
    return results


def table(name: str, results: dict[str, list[dict]], reference: float) -> Table:
    """Return the means over seeds, with the lowest and highest in brackets."""
    columns = list(results["federated"][0])
    shown = Table(title=f"{name}, test split, {len(results['federated'])} seeds")
    for column in ("", *columns):
        shown.add_column(column)
    for kind, runs in results.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if run.get(column) is not None]
            spread = f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "-"
            cells.append(spread)
        shown.add_row(kind, *cells)
    shown.add_row("reference FedAvg", f"{reference:.3f}", *[""] * (len(columns) - 1))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=list(SETS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, found = Console(), {}
    for name, (task, reference) in SETS.items():
        if arguments.only in (None, name):
            found[name] = compare(arguments.data / name, task, range(arguments.seeds), console)
            console.print(table(name, found[name], reference))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

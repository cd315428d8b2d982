"""A site trains from what it took in, prepares each image once, and checks what it has before."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from client import cache as caches
from client import cli
from client import config as configs
from client.cache import ABOUT
from client.supervisor import Supervisor
from client.work import Bench, Job
from shared_models import plan as plans
from shared_models.errors import SignatureError
from shared_models.weights import flat_of

SMALL = [{"name": "resize", "params": {"size": [16, 16]}}, {"name": "standardize"}]
NET = {
    "name": "densenet",
    "params": {"init_features": 4, "growth_rate": 4, "block_config": [1], "num_groups": 2},
}


@pytest.fixture
def labelled(
    ingested: Path, archive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> configs.SiteConfig:
    """Return a site that took the archive in and labelled it by the real command."""
    site_dir = tmp_path / "north"
    shutil.copytree(ingested, site_dir)
    monkeypatch.chdir(site_dir)
    lesion = {
        a["identifiers"]["PatientID"]: a["has_lesion"] for a in archive.answers if "patient" in a
    }
    file = tmp_path / "labels.csv"
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["patient", "label", "split"])
        for n, patient in enumerate(sorted(lesion)):
            word = "opaque" if lesion[patient] else "Clear"
            writer.writerow([patient, word, "test" if n == 2 else "train"])
    done = CliRunner().invoke(cli.app, ["data", "label", str(file)])
    assert done.exit_code == 0, done.output
    return configs.read(site_dir / "site.toml")


def job(site: configs.SiteConfig, plan: Any, step: Any, **given: Any) -> Job:
    fields: dict[str, Any] = {
        "step": step,
        "study": "ab" * 32,
        "plan": plan,
        "site": site.name,
        "data": site.data,
        "performance": site.performance,
        "today": datetime.now(UTC).date(),
        "cache": site.cache,
        "labels": (("Clear", "clear"),),
        "noise_multiplier": 2.0,
    }
    return Job(**fields | given)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Note which images are read to be prepared."""
    found: list[Path] = []
    real = caches.read_pair

    def noted(image: Path, label: Path | None) -> Any:
        found.append(image)
        return real(image, label)

    monkeypatch.setattr(caches, "read_pair", noted)
    return found


def num_series(site: configs.SiteConfig) -> int:
    return len(site.data.manifest.read_text().splitlines()) - 1


def test_a_site_trains_from_what_it_took_in_and_prepares_each_image_once(
    labelled: configs.SiteConfig, plan_of: Callable[..., Any], read: list[Path]
) -> None:
    plan = plan_of({"imaging": SMALL, "net": NET})
    bench = Bench()
    judged, _ = bench(job(labelled, plan, "judge"), None)
    assert judged.objections == ()
    size = sum(int(np.prod(shape)) for _, shape in judged.tensors)
    weights = flat_of(np.random.default_rng(0).normal(0, 0.1, size).astype(np.float32))
    outcome, update = bench(job(labelled, plan, "train"), weights)
    assert outcome.cohort is not None
    assert (outcome.cohort.num_patients, outcome.cohort.num_test_patients) == (3, 1)
    assert update is not None
    assert np.abs(update).max() > 0
    assert len(read) == num_series(labelled)
    bench(job(labelled, plan, "train", round_=1), weights)
    assert len(read) == num_series(labelled), "a second round read images again"
    again, _ = Bench()(job(labelled, plan, "prepare"), None)
    assert len(read) == num_series(labelled), "a second start read images again"
    assert again.cohort == outcome.cohort


def test_a_confined_worker_keeps_what_it_prepares_for_the_next(
    labelled: configs.SiteConfig, plan_of: Callable[..., Any], read: list[Path]
) -> None:
    plan = plan_of({"imaging": SMALL, "net": NET})
    with closing(Supervisor(labelled)) as supervisor:
        told = supervisor.confinement()
        outcome, _ = supervisor(job(labelled, plan, "prepare"), None)
    assert outcome.cohort is not None
    kept = list(labelled.cache.folder.glob(f"??/*/{ABOUT}"))
    assert len(kept) >= num_series(labelled), told
    Bench()(job(labelled, plan, "prepare"), None)
    assert read == []


def test_a_cache_that_cannot_be_used_costs_time_only(
    labelled: configs.SiteConfig, plan_of: Callable[..., Any], tmp_path: Path
) -> None:
    plan = plan_of({"imaging": SMALL, "net": NET})
    (tmp_path / "file").touch()
    broken = labelled.cache.model_copy(update={"folder": tmp_path / "file"})
    outcome, _ = Bench()(job(labelled, plan, "prepare", cache=broken), None)
    assert outcome.cohort is not None
    assert outcome.cohort.num_patients == 3


# --- before a study


def test_a_label_that_the_plan_spells_otherwise_is_found_and_cured_by_a_signed_mapping(
    labelled: configs.SiteConfig,
    plan_of: Callable[..., Any],
    tmp_path: Path,
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(plans.render(plan_of({"imaging": SMALL, "net": NET}), None))
    runner = CliRunner()
    found = runner.invoke(cli.app, ["data", "check", str(file), "--json"])
    assert found.exit_code == 1
    (wrong,) = [f for f in json.loads(found.stdout)["findings"] if f["ok"] is False]
    assert "'Clear'" in wrong["said"]
    assert "data map 'Clear=clear'" in wrong["cure"]
    done = runner.invoke(cli.app, ["data", "map", "Clear=clear", "--who", "Dr. Ada"])
    assert done.exit_code == 0, done.output
    found = runner.invoke(cli.app, ["data", "check", str(file), "--json"])
    assert found.exit_code == 0, found.output
    mapped = labelled.data.mapping
    mapped.write_bytes(mapped.read_bytes().replace(b"Dr. Ada", b"Dr. Eve"))
    found = runner.invoke(cli.app, ["data", "check", str(file), "--json"])
    assert isinstance(found.exception, SignatureError)
    assert "mapped" in (labelled.state_dir / "journal.jsonl").read_text()


def test_the_tables_count_and_name_nobody(labelled: configs.SiteConfig, archive: Any) -> None:
    runner = CliRunner()
    found = json.loads(runner.invoke(cli.app, ["data", "--json"]).stdout)
    good = [answer for answer in archive.answers if not answer["reason"]]
    assert found["series"] >= len(good)
    assert sum(found["labels"].values()) == found["series"]
    assert found["splits"]["train"] == 3
    shown = runner.invoke(cli.app, ["data"]).stdout
    assert "spacing" in shown
    assert "P-" not in shown

"""The consortium's whole life by its three commands, as real processes on one machine."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.link import free_port
from shared_models import plan as plans
from shared_models.plan import StudyPlan, planned_events
from shared_models.privacy import epsilon
from shared_models.signing import digest

SITES = ("north", "south", "west")
PATIENCE_S = 90.0


class Stage:
    """The folder it all happens in, and what runs there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.office = folder / "office"
        self.desk = folder / "desk"  # Python reads the folder it is started in
        self.desk.mkdir()
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def do(self, module: str, *arguments: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            cwd=self.desk,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def coordinator(self, *arguments: str | Path, code: int = 0) -> str:
        return self.do("server.cli", *arguments, code=code)

    def site(self, name: str, command: str, *arguments: str | Path, code: int = 0) -> str:
        config = ("--config", self.folder / name / "site.toml")
        return self.do("client.cli", command, *arguments, *config, code=code)

    def start(self, name: str, module: str, *arguments: str | Path) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdout=log,
                stderr=log,
                cwd=self.desk,
                start_new_session=True,
            )

    def serve(self) -> None:
        self.start("serve", "server.cli", "serve", self.office)

    def start_site(self, name: str) -> None:
        config = self.folder / name / "site.toml"
        self.start(name, "client.cli", "start", "--config", config)

    def end(self, name: str, number: int = signal.SIGTERM) -> int:
        process = self.running.pop(name)
        process.send_signal(number)
        return process.wait(30)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, holds: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            logs = "\n".join(f"--- {f.name}\n{f.read_text()[-2000:]}" for f in self.logs())
            assert time.monotonic() < deadline, f"waited in vain: {what}\n{logs}"
            time.sleep(0.3)

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.log"))

    def studies(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            self.coordinator("studies", "--office", self.office, "--json").splitlines()[-1]
        )
        return found

    def decided(self) -> dict[str, str | None]:
        found: dict[str, str | None] = self.studies()[0]["sites"]
        return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("consortium"))
    yield stage
    for name in list(stage.running):
        stage.end(name)


def images(folder: Path, *, seed: int) -> Path:
    """Write films of bright and dark patients and their manifest."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(30):
        label = number % 2
        film = draw.normal(90 + 60 * label, 20, (16, 16)).clip(0, 255).astype(np.uint8)
        Image.fromarray(film).save(folder / f"{number}.png")
        split = "test" if number >= 20 else "train"
        rows.append([f"{number}.png", f"p{number}", label, split])
    with (folder / "manifest.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["image", "patient", "label", "split"], *rows])
    return folder


def plan_of(coordinator: str) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "films",
            "purpose": "research",
            "coordinator": coordinator,
            "sites": list(SITES),
            "expires": date(2099, 1, 1),
            "task": {"name": "classification", "params": {"classes": ["dark", "bright"]}},
            "net": {
                "name": "densenet",
                "params": {
                    "init_features": 4,
                    "growth_rate": 4,
                    "block_config": [1],
                    "num_groups": 2,
                },
            },
            "imaging": [{"name": "resize", "params": {"size": [16, 16]}}],
            "strategy": {"name": "fedavg"},
            "training": {
                "num_rounds": 4,
                "steps_per_round": 2,
                "sample_rate": 0.5,
                "learning_rate": 0.01,
            },
            "rounds": {"quorum": 2, "deadline_s": 40},
            "privacy": {
                "epsilon": 6.0,
                "delta": 0.004,
                "noise_multiplier": 3.0,
                "max_grad_norm": 1.0,
            },
        }
    )


def test_1_an_office_is_made_and_hospitals_are_let_in_by_words(stage: Stage) -> None:
    ports = [free_port() for _ in range(3)]
    fleet, control, enrolment = (f"127.0.0.1:{port}" for port in ports)
    said = stage.coordinator(
        *("init", stage.office, "--name", "Films", "--fleet", fleet),
        *("--control", control, "--enrolment", enrolment),
    )
    config = stage.office / "consortium.toml"
    config.write_text(config.read_text().replace("0.0.0.0", "127.0.0.1"))
    plan = plan_of(said.split()[-1])
    (stage.folder / "plan.toml").write_text(plans.render(plan))
    stage.serve()
    for seed, name in enumerate(SITES):
        data = images(stage.folder / f"data-{name}", seed=seed)
        invite = stage.folder / f"{name}.invite.json"
        stage.coordinator("invite", name, "--office", stage.office, "--out", invite)
        joining = subprocess.Popen(
            [
                *(sys.executable, "-m", "client.cli", "join", str(invite)),
                *("--folder", str(stage.folder / name), "--root", str(data)),
                *("--manifest", str(data / "manifest.csv"), "--wait", "2"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

        def asked(name: str = name, joining: Any = joining) -> str | None:
            table = stage.coordinator("sites", "--office", stage.office, "--json")
            rows = {row["site"]: row for row in json.loads(table)["sites"]}
            words: str | None = rows[name]["words"]
            assert words or joining.poll() is None, joining.communicate()[0]
            return words

        stage.until(asked, f"{name} asks")
        words = str(asked())
        stage.coordinator(
            "accept", name, "--words", "bogus words", "--office", stage.office, code=10
        )
        stage.coordinator("accept", name, "--words", words, "--office", stage.office)
        heard, _ = joining.communicate(timeout=PATIENCE_S)
        assert joining.returncode == 0, heard
        assert words in heard
        config = stage.folder / name / "site.toml"
        told = config.read_text().replace("allow_fingerprint = false", "allow_fingerprint = true")
        config.write_text(told)


def test_2_a_study_is_offered_judged_and_decided(stage: Stage) -> None:
    for name in SITES:
        stage.start_site(name)
    held_out = images(stage.folder / "held-out", seed=9)
    manifest = held_out / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("train", "val").replace("test", "val"))
    stage.coordinator(
        *("propose", stage.folder / "plan.toml", "--office", stage.office),
        *("--validation", manifest, "--validation-root", held_out),
    )
    study = stage.studies()[0]["study"]

    def offered(name: str) -> bool:
        return study in stage.site(name, "studies", "--json")

    for name in SITES:
        stage.until(lambda name=name: offered(name), f"{name} hears of the study")  # type: ignore[misc]
    stage.site("north", "judge", study[:12])
    assert "patient" in stage.site("north", "show", study[:12])
    for name in ("north", "south"):
        stage.site(name, "approve", study[:12], "--who", "Dr. Lind")
    stage.site("west", "refuse", study[:12], "--who", "Dr. Ost", "--reason", "capacity")
    stage.until(
        lambda: stage.decided() == {"north": "approved", "south": "approved", "west": "refused"},
        "the decisions arrive",
    )


def test_3_it_runs_through_the_death_of_the_coordinator(stage: Stage) -> None:
    study = stage.studies()[0]["study"]
    stage.coordinator("run", study[:12], "--office", stage.office, "--no-follow")
    run_dir = stage.office / "studies" / study[:12]
    stage.until(lambda: (run_dir / "rounds.jsonl").exists(), "the first round")
    stage.end("serve", signal.SIGKILL)
    stage.serve()
    stage.until(lambda: (run_dir / "report.html").exists(), "the report")
    report = json.loads((run_dir / "report.json").read_text())
    assert [point["round_"] for point in report["rounds"]] == [0, 1, 2, 3]
    trained = {site["name"]: site["epsilon"] for site in report["sites"]}
    assert trained["west"] is None
    assert 0 < trained["north"] <= 6.0
    assert 0 < trained["south"] <= 6.0
    assert stage.studies()[0]["state"] == "finished"


def test_4_a_revoked_hospital_is_cut_off_and_no_other_notices(stage: Stage) -> None:
    stage.coordinator("revoke", "south", "--office", stage.office)
    stage.until(
        lambda: "a visit to the coordinator failed" in stage.log("south"), "south is refused"
    )
    before = stage.log("north").count("visit to the coordinator failed")
    second = plans.read(stage.folder / "plan.toml").plan.model_copy(
        update={"name": "films-2", "sites": ("north", "west")}
    )
    (stage.folder / "second.toml").write_text(plans.render(second))
    stage.coordinator("propose", stage.folder / "second.toml", "--office", stage.office)
    stage.until(lambda: "films-2" in stage.site("north", "studies", "--json"), "north hears of it")
    assert stage.log("north").count("visit to the coordinator failed") == before


def test_5_an_auditor_finds_both_sides_in_order(stage: Stage) -> None:
    (study,) = [one["study"] for one in stage.studies() if one["state"] == "finished"]
    run_dir = stage.office / "studies" / study[:12]
    found = stage.do("shared_models.audit", "verify", run_dir)
    assert "FAILS" not in found
    assert "south approved this plan" in found  # revoked since, and yet it had
    assert "west approved" not in found
    for name in SITES:
        found = stage.do("shared_models.audit", "verify", stage.folder / name)
        assert "FAILS" not in found


def test_6_a_fingerprint_is_told_under_a_plan_of_its_own(stage: Stage) -> None:
    draft = plans.read(stage.folder / "plan.toml").plan.model_dump() | {
        "name": "films-geometry",
        "sites": ("north", "west"),
        "imaging": (),
        "fingerprint": {
            "size": {"low": 4, "high": 256, "num_cells": 40},
            "noise_multiplier": 1.0,
        },
    }
    plan = StudyPlan.model_validate(draft)
    study, file = digest(plan), stage.folder / "geometry.toml"
    file.write_text(plans.render(plan))
    stage.coordinator("propose", file, "--office", stage.office)
    for name in plan.sites:
        heard = lambda name=name: study in stage.site(name, "studies", "--json")  # noqa: E731
        stage.until(heard, f"{name} hears of it")
        stage.site(name, "approve", study[:12], "--who", "Dr. Lind")

    def approved() -> bool:
        (found,) = [one["sites"] for one in stage.studies() if one["study"] == study]
        return set(found.values()) == {"approved"}

    stage.until(approved, "the decisions arrive")
    said = stage.coordinator("run", study[:12], "--office", stage.office)
    assert 'name = "crop-or-pad"' in said
    run_dir = stage.office / "studies" / study[:12]
    found = json.loads((run_dir / "fingerprint.json").read_text())
    assert found["num_patients"] == 40
    cost = epsilon(planned_events(plan), delta=0.004)
    assert [reply["privacy"]["epsilon"] for reply in found["replies"]] == [cost, cost]
    assert "FAILS" not in stage.do("shared_models.audit", "verify", run_dir)
    ledger = stage.folder / "west" / "state" / "ledger.jsonl"
    assert f"{cost:.4f}" in stage.do("shared_models.audit", "epsilon", ledger)


def test_7_stopping_leaves_no_process(stage: Stage) -> None:
    for name in list(stage.running):
        assert stage.end(name) == 0, stage.log(name)
    mark = str(stage.folder).encode()
    left = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if mark in told and int(entry.name) != os.getpid():
            left.append(told.split(b"\0")[:4])
    assert left == []

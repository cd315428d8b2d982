"""From a proposal to a decision and back, over the control plane's real TLS: two keys, no third."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import join as joins
from client import studies, visits
from client.cli import app as site_app
from client.config import SiteConfig
from server import control, desk, store
from server import office as offices
from server.cli import app as coordinator_app
from server.office import Office
from shared_models import audit
from shared_models.plan import StudyPlan, render
from shared_models.signing import digest, load_key, public_key


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def office(tmp_path: Path) -> Office:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    named = dict(zip(("fleet", "control", "enrolment"), addresses, strict=True))
    return offices.create(tmp_path / "office", name="Lungs of the North", **named)


@pytest.fixture
def served(office: Office) -> Iterator[None]:
    def visit(site: str, told: Any) -> Any:
        found = desk.Desk(office.folder, office.key, offices.enrolled(office))
        return desk.visit(found, told, site=site, today=datetime.now(UTC).date())

    with control.serve(office, visit=visit):
        yield


@pytest.fixture
def site(office: Office, served: None, tmp_path: Path) -> SiteConfig:
    """Join a hospital called north, whose words somebody compared."""
    file = tmp_path / "north.invite"
    file.write_text(offices.invite(office, "north").model_dump_json())
    data = joins.Data(tmp_path / "manifest.csv", tmp_path)
    joining = joins.prepare(joins.read_invite(file), tmp_path / "north", data)
    assert not joins.wait(joining, minutes=0)
    offices.accept(office, "north", joining.words)
    assert joins.wait(joining, minutes=0)
    return joining.config


def proposed(office: Office, new_plan: Callable[..., StudyPlan], tmp_path: Path) -> Path:
    """Propose a plan by the command and return its run directory."""
    draft = new_plan(
        coordinator=public_key(office.key),
        sites=["north"],
        rounds={"quorum": 1},
        expires=datetime.now(UTC).date() + timedelta(days=9),
        privacy={"epsilon": 8, "delta": 1e-3, "noise_multiplier": 2, "max_grad_norm": 1},
    )
    file = tmp_path / "plan.toml"
    file.write_text(render(draft))
    command = ["propose", str(file), "--office", str(office.folder), "--json"]
    found = CliRunner().invoke(coordinator_app, command)
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["study"] == digest(draft)
    return Path(json.loads(found.output)["run_dir"])


def test_a_study_runs_with_both_keys_and_ends_with_the_hospitals(
    office: Office, site: SiteConfig, new_plan: Callable[..., StudyPlan], tmp_path: Path
) -> None:
    run_dir = proposed(office, new_plan, tmp_path)
    key = load_key(site.signing_key)
    agent = visits.Agent(datetime.now(UTC), has_gpu=False, certificate_days=9)

    def visit() -> list[str]:
        return visits.visit_once(site, key, lambda told: visits._call(site, told), agent=agent)

    def decide(command: str, *options: str) -> None:
        arguments = [study[:6], "--who", "Dr. Reed", *options]
        config = ["--config", str(tmp_path / "north" / "site.toml")]
        found = CliRunner().invoke(site_app, [command, *arguments, *config])
        assert found.exit_code == 0, found.output

    def on_file() -> set[str]:
        return set(store.approvals(run_dir, store.read_plan(run_dir), store.read_settings(run_dir)))

    (study,) = visit()
    assert on_file() == set()
    decide("approve")
    assert on_file() == set()
    visit()
    assert on_file() == {"north"}
    decide("withdraw", "--reason", "capacity")
    assert studies.approved(study, site, key=key) is None
    visit()
    assert on_file() == set()
    visit()
    checkpoints = office.folder / "checkpoints" / "north.jsonl"
    command = ["verify", str(tmp_path / "north"), "--checkpoint", str(checkpoints)]
    verified = CliRunner().invoke(audit.app, command)
    assert verified.exit_code == 0, verified.output
    assert "holds  the journal holds all that 3 receipts know of" in verified.output
    assert "holds  the journal holds all that 3 checkpoints know of" in verified.output


def test_the_agents_visits_run_beside_it_and_end_with_it(
    office: Office, site: SiteConfig, new_plan: Callable[..., StudyPlan], tmp_path: Path
) -> None:
    study = digest(store.read_plan(proposed(office, new_plan, tmp_path)).plan)
    key, stop = load_key(site.signing_key), threading.Event()
    with visits.in_background(site, key, stop=stop):
        waited = threading.Event()
        for _ in range(300):
            if visits.last_visit(site.state_dir) is not None:
                break
            waited.wait(0.1)
    assert visits.last_visit(site.state_dir) is not None
    assert studies.folder_of(site, study).is_dir()
    assert not any(thread.name == "visits" for thread in threading.enumerate())

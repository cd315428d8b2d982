"""``consilia-coordinator`` as a person meets it: bad input, exit codes, help."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from server import demo
from server.cli import app
from shared_models.errors import EXIT_CODES, ConsiliaError, DataError, MachineError
from shared_models.plan import StudyPlan, render

runner = CliRunner()
DEPLOY = Path(__file__).parents[2] / "deploy"


class Silent:
    """A progress that says nothing."""

    def stage(self, text: str, *, total: int | None = None) -> None:
        pass

    def advance(self, done: int, text: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Make a data set of two sites with 12, 4 and 4 patients in train, val and test."""
    folder = tmp_path / "films"
    folder.mkdir()
    splits = ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    with (folder / "manifest.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "patient", "finding", "site", "split"])
        for site in ("north", "south"):
            for number, split in enumerate(splits):
                name = f"{site}-{number}.png"
                Image.new("L", (8, 8), number * 10).save(folder / name)
                writer.writerow([name, f"{site}-{number}", number % 2, site, split])
    return folder


def refused(out: Path, **changes: object) -> ConsiliaError:
    """Run a demonstration that must be refused, and see that it left nothing."""
    options = demo.Options(out=out, task="classification")._replace(**changes)
    with pytest.raises(ConsiliaError) as caught:
        demo.run(options, Silent())
    assert not out.exists() or not any(out.iterdir())
    return caught.value


@pytest.mark.parametrize("command", ["server.cli", "client.cli"])
def test_help_imports_no_torch(command: str) -> None:
    code = f"import sys, {command}; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_command_states_the_exit_codes() -> None:
    shown = " ".join(runner.invoke(app, ["--help"]).output.split())
    for code in EXIT_CODES:
        assert f" {code} " in shown


def test_exit_codes_are_never_reused() -> None:
    kinds = ConsiliaError.__subclasses__()
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    assert ConsiliaError.exit_code not in {kind.exit_code for kind in kinds}


def test_the_example_plan_has_no_objection() -> None:
    found = runner.invoke(app, ["check", str(DEPLOY / "plan.toml"), "--json"])
    assert found.exit_code == 0
    assert json.loads(found.output) == {"valid": True, "objections": []}


def test_all_objections_to_a_plan_are_told_at_once(
    new_plan: Callable[..., StudyPlan], tmp_path: Path
) -> None:
    text = render(new_plan(rounds={"quorum": 5}))
    text = text.replace('name = "densenet"', 'name = "densnet"')
    text = text.replace('name = "fedavg"', 'name = "medain"')
    (tmp_path / "plan.toml").write_text(text)
    found = runner.invoke(app, ["check", str(tmp_path / "plan.toml")])
    assert found.exit_code == 1
    assert "no nets called 'densnet'; known: " in found.output
    assert "no strategies called 'medain'; known: " in found.output
    assert "rounds.quorum" in found.output


@pytest.mark.parametrize("value", ["nan", "-1.0", "inf", "0.0"])
def test_an_epsilon_that_is_none_is_refused(value: str, tmp_path: Path) -> None:
    text = (DEPLOY / "plan.toml").read_text().replace("epsilon = 8.0", f"epsilon = {value}")
    (tmp_path / "plan.toml").write_text(text)
    found = runner.invoke(app, ["check", str(tmp_path / "plan.toml")])
    assert found.exit_code == 1
    assert "privacy.epsilon" in found.output
    assert runner.invoke(app, ["demo", "--epsilon", value]).exit_code == 2


def test_an_unknown_key_is_named_beside_the_known_ones(tmp_path: Path) -> None:
    text = (DEPLOY / "plan.toml").read_text().replace("quorum = 3", "quorum = 3\nquorom = 4")
    (tmp_path / "plan.toml").write_text(text)
    found = runner.invoke(app, ["check", str(tmp_path / "plan.toml")])
    assert found.exit_code == 1
    assert "rounds.quorom: unknown key; known here: averaging, deadline_s, quorum, " in found.output


def test_an_unknown_task_names_the_known_ones(tmp_path: Path) -> None:
    assert "known: " in str(refused(tmp_path / "out", task="foo"))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = refused(tmp_path / "out", data=tmp_path / "empty")
    assert isinstance(error, DataError)
    assert "manifest.csv" in str(error)


def test_missing_images_and_labels_are_told_at_once_by_line(films: Path, tmp_path: Path) -> None:
    (films / "north-3.png").unlink()
    text = (
        (films / "manifest.csv")
        .read_text()
        .replace("south-5.png,south-5,1", "south-5.png,south-5,")
    )
    (films / "manifest.csv").write_text(text)
    error = refused(tmp_path / "out", data=films)
    assert len(error.objections) == 2
    assert "line 5: the image is missing" in error.objections[0]
    assert "line 27: an image without a label" in error.objections[1]
    assert "north-3" not in str(error)


def test_an_out_folder_in_use_is_left_alone(films: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    with pytest.raises(MachineError, match="choose another --out"):
        demo.run(demo.Options(out=out, task="classification", data=films), Silent())
    assert (out / "precious.txt").read_text() == "keep me"


def test_too_little_space_is_refused_before_anything_is_written(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    error = refused(tmp_path / "out", data=films)
    assert "10 MB free" in str(error) and "--out" in str(error)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_preparing_leaves_nothing(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        with open("/dev/full", "w") as handle:  # noqa: PTH123
            handle.write("x")

    monkeypatch.setattr(demo, "write_manifests", full)
    error = refused(tmp_path / "out", data=films)
    assert "No space left on device" in str(error)


def test_an_epsilon_out_of_reach_leaves_nothing(films: Path, tmp_path: Path) -> None:
    error = refused(tmp_path / "out", data=films, epsilon=1e-9)
    assert "--epsilon" in str(error)


def test_a_corrupt_image_ends_the_study_with_the_site_and_the_reason(
    films: Path, tmp_path: Path
) -> None:
    (films / "north-2.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    arguments = ["demo", "--data", str(films), "--out", str(out), "--rounds", "1", "--no-dp"]
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 15, done.stderr
    assert "north: data" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "report.json").exists() and not (out / "model").exists()
    assert "north-2" not in done.stderr + (out / "sites" / "north" / "agent.log").read_text()

"""The demonstration as people run it: real processes, a real SuperLink, real keys and approvals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_models.weights import load

COORDINATOR = [sys.executable, "-m", "server.cli"]
AUDIT = [sys.executable, "-c", "from shared_models.audit import main; main()"]
PATIENTS = "24"


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of processes that mention ``folder`` or run in its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command or str(folder) in environment:
            found.append(command)
    return found


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COORDINATOR, *map(str, arguments)], capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    out = tmp_path_factory.mktemp("plain") / "out"
    done = run("demo", "--out", out, "--phantoms", PATIENTS, "--rounds", "2", "--no-dp")
    assert done.returncode == 0, done.stderr
    yield out, done.stdout


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    out = tmp_path_factory.mktemp("private") / "out"
    arguments = ("--phantoms", PATIENTS, "--rounds", "2", "--epsilon", "6", "--json")
    done = run("demo", "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    yield out, done.stdout


def test_the_out_folder_holds_what_the_readme_promises(plain: tuple[Path, str]) -> None:
    out, _ = plain
    for name in ("plan.toml", "rounds.jsonl", "report.json", "report.html"):
        assert (out / name).stat().st_size > 0
    assert load(out / "model" / "weights.safetensors")
    assert not list(out.rglob("*.pkl")) and not list(out.rglob("*.pt"))


def test_the_last_line_is_the_path_of_the_report(plain: tuple[Path, str]) -> None:
    out, printed = plain
    assert printed.strip().splitlines()[-1] == f"report: {(out / 'report.html').resolve()}"


def test_no_process_is_left_behind(plain: tuple[Path, str]) -> None:
    assert processes_of(plain[0]) == []


def test_the_same_plan_in_process_gives_the_same_weights_bit_for_bit(
    plain: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = plain
    sites = sorted((out / "sites").iterdir())
    done = run("simulate", out / "plan.toml", "--sites", *sites, "--out", tmp_path / "simulated")
    assert done.returncode == 0, done.stderr
    networked = (out / "model" / "weights.safetensors").read_bytes()
    assert (tmp_path / "simulated" / "model" / "weights.safetensors").read_bytes() == networked


def test_an_auditor_verifies_the_private_run_offline(private: tuple[Path, str]) -> None:
    done = subprocess.run([*AUDIT, "verify", private[0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_epsilon_is_what_the_sites_ledger_says_and_within_what_was_asked(
    private: tuple[Path, str],
) -> None:
    out, printed = private
    report = json.loads(printed)
    for site in report["sites"]:
        assert site["unit"] == "patient"
        assert 0 < site["epsilon"] <= 6
        ledger = out / "sites" / site["name"] / "state" / "ledger.jsonl"
        arguments = ["epsilon", ledger, "--json"]
        done = subprocess.run([*AUDIT, *arguments], capture_output=True, text=True, check=True)
        spent = json.loads(done.stdout)["lifetime"]
        assert spent == {"epsilon": site["epsilon"], "delta": site["delta"]}


def test_a_changed_report_fails_the_audit(private: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(private[0], copy)
    report = json.loads((copy / "report.json").read_text())
    report["sites"][0]["privacy"]["epsilon"] = report["sites"][0]["epsilon"] = 0.5
    (copy / "report.json").write_text(json.dumps(report))
    done = subprocess.run([*AUDIT, "verify", copy], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILS" in done.stdout


def _heed_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo = subprocess.Popen(
        [*COORDINATOR, "demo", "--out", str(out), "--phantoms", PATIENTS, "--rounds", "150"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )
    deadline = time.monotonic() + 120
    while not (out / "rounds.jsonl").exists() and time.monotonic() < deadline:
        assert demo.poll() is None, demo.communicate()[1]
        time.sleep(0.3)
    assert (out / "rounds.jsonl").exists(), "the study did not start"
    demo.send_signal(signal.SIGINT)
    _, complaint = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Traceback" not in complaint
    assert processes_of(out) == []

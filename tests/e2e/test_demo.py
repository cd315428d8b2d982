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

from shared_models.contracts import SignedJoinRequest
from shared_models.signing import digest
from shared_models.weights import load
from shared_models.words import words

COORDINATOR = [sys.executable, "-m", "server.cli"]
AUDIT = [sys.executable, "-c", "from shared_models.audit import main; main()"]
PATIENTS = "24"
PATIENCE_S = 240


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
        [*COORDINATOR, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    out = tmp_path_factory.mktemp("plain") / "out"
    done = run("demo", "--out", out, "--phantoms", PATIENTS, "--rounds", "2", "--no-dp")
    assert done.returncode == 0, done.stderr
    yield out, done.stdout, done.stderr


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    out = tmp_path_factory.mktemp("private") / "out"
    arguments = ("--phantoms", PATIENTS, "--rounds", "2", "--epsilon", "6", "--json")
    done = run("demo", "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    yield out, done.stdout


def test_the_out_folder_holds_what_the_readme_promises(plain: tuple[Path, str, str]) -> None:
    out, *_ = plain
    for name in ("plan.toml", "rounds.jsonl", "report.json", "report.html"):
        assert (out / name).stat().st_size > 0
    assert load(out / "model" / "weights.safetensors")
    assert not list(out.rglob("*.pkl")) and not list(out.rglob("*.pt"))


def test_the_report_says_what_the_images_are_and_that_no_person_decided(
    plain: tuple[Path, str, str],
) -> None:
    report = json.loads((plain[0] / "report.json").read_text())
    assert report["data"] == "phantoms, seed 0"
    assert len(report["notes"]) == 2
    assert "no person compared words or decided" in report["notes"][0]


def test_the_last_line_is_the_path_of_the_report(plain: tuple[Path, str, str]) -> None:
    out, printed, _ = plain
    assert printed.strip().splitlines()[-1] == f"report: {(out / 'report.html').resolve()}"


def test_hospitals_join_by_words_that_both_sides_read(plain: tuple[Path, str, str]) -> None:
    out, _, told = plain
    done = run("sites", "--office", out / "coordinator", "--json")
    rows = {row["site"]: row["state"] for row in json.loads(done.stdout)["sites"]}
    assert rows == dict.fromkeys(
        sorted(path.name for path in (out / "sites").iterdir()), "enrolled"
    )
    for site in rows:
        request = SignedJoinRequest.model_validate_json(
            (out / "sites" / site / "keys" / "request.json").read_bytes()
        ).request
        assert f"{site}: both sides read '{words(digest(request))}'" in told


def test_each_hospital_was_offered_the_plan_and_approved_it_at_home(
    plain: tuple[Path, str, str],
) -> None:
    out, _, told = plain
    assert "the demonstration plays the people who approve" in told
    for site in (out / "sites").iterdir():
        lines = (site / "state" / "journal.jsonl").read_text().splitlines()
        kinds = [json.loads(line)["entry"]["kind"] for line in lines]
        met = [kind for kind in kinds if kind in ("joined", "offered", "approved", "order")]
        assert met[:4] == ["joined", "offered", "approved", "order"]
        checked = subprocess.run([*AUDIT, "verify", site], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_the_office_can_be_opened_again(plain: tuple[Path, str, str]) -> None:
    out, *_ = plain
    done = run("studies", "--office", out / "coordinator", "--json")
    (study,) = json.loads(done.stdout)
    assert (study["state"], set(study["sites"].values())) == ("finished", {"approved"})


def test_no_process_is_left_behind(plain: tuple[Path, str, str]) -> None:
    assert processes_of(plain[0]) == []


def test_the_same_plan_in_process_gives_the_same_weights_bit_for_bit(
    plain: tuple[Path, str, str], tmp_path: Path
) -> None:
    out, *_ = plain
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


@pytest.mark.parametrize(
    ("moment", "is_kept"),
    [("coordinator/register.jsonl", False), ("coordinator/studies/*/rounds.jsonl", True)],
)
def test_ctrl_c_ends_every_process(moment: str, is_kept: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["demo", "--out", str(out), "--phantoms", PATIENTS, "--rounds", "150", "--no-dp"]
    with subprocess.Popen(
        [*COORDINATOR, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    ) as demo:
        deadline = time.monotonic() + PATIENCE_S
        while not list(out.glob(moment)) and demo.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        came_so_far = bool(list(out.glob(moment)))
        demo.send_signal(signal.SIGINT)
        _, complaint = demo.communicate(timeout=PATIENCE_S)
    assert came_so_far, complaint
    assert demo.returncode == 130
    assert "Traceback" not in complaint
    assert processes_of(out) == []
    assert out.exists() is is_kept

"""Everything consilia-site check tries: what is really broken is found, with its owner and cure."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client import agent, journal, ledger, supervisor
from client import config as configs
from client.cli import app
from client.config import PerformanceSettings
from client.confinement import Confinement
from client.preflight import AREAS, CHECKS, Case, Finding, dry, installed, machine, run, show
from client.preflight import settings as settings_checks
from client.preflight.base import MIB
from server.consortium import certificates
from shared_models import plan as plans
from shared_models.plan import event_of
from shared_models.signing import sign


@pytest.fixture
def case_of(hospital, plan_of) -> Callable[..., Case]:
    """Return a case of the small hospital, with all its files, and a plan with changes."""
    authority = certificates(hospital.folder / "tls", hosts=["127.0.0.1"]).authority
    shutil.copy(authority, hospital.folder / "ca.pem")
    agent.create_node_key(hospital.folder / "keys" / "node")
    with hospital.config_file.open("r+") as file:
        text = file.read().replace("fl.example.org:9092", "127.0.0.1:1")
        file.seek(0)
        file.truncate()
        file.write(text)

    def make(
        plan: dict[str, Any] | None = None,
        *,
        has_plan: bool = True,
        changes: dict[str, Any] | None = None,
        **given: Any,
    ) -> Case:
        config = configs.read(hospital.config_file)
        for path, value in (changes or {}).items():
            table, _, last = path.rpartition(".")
            inner = config if not table else getattr(config, table)
            changed = inner.model_copy(update={last: value})
            config = config.model_copy(update={table: changed}) if table else changed
        return Case(config, plan=plan_of(plan or {}) if has_plan else None, **given)

    return make


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def named(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {one.what: one for one in findings}


def rewrite(hospital, change: Callable[[int, dict[str, str]], None]) -> None:
    with hospital.manifest.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    for number, row in enumerate(rows):
        change(number, row)
    with hospital.manifest.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# --- how checks are run


def test_a_check_that_breaks_is_a_finding_and_stops_no_other(case_of, mark: str) -> None:
    def breaks(case: Case) -> Iterator[Finding]:
        yield Finding("half", True, "done", "data")
        raise OSError(f"no such file: {mark}")

    found = list(run(case_of(), [breaks, settings_checks.keys]))
    assert [one.what for one in found] == ["half", "breaks", "keys"]
    assert (found[1].ok, found[1].said) == (False, "the check could not be made (OSError)")
    assert found[1].cure
    assert mark not in str(found)


def test_adding_a_check_is_adding_its_name() -> None:
    assert len(CHECKS) == sum(map(len, AREAS.values()))
    assert all(check.__doc__ for check in CHECKS)


# --- settings


def test_keys_that_only_their_owner_reads_are_well(case_of) -> None:
    assert only(settings_checks.keys(case_of())).ok


@pytest.mark.parametrize("name", ["signing.pem", "node"])
def test_a_key_that_others_may_read_is_told_with_the_command_that_helps(
    name: str, case_of, hospital
) -> None:
    file = hospital.folder / "keys" / name
    file.chmod(0o640)
    found = only(settings_checks.keys(case_of()))
    assert (found.ok, found.owner) == (False, "settings")
    assert "others on this machine may read" in found.said
    assert found.cure == f'chmod 600 "{file}"'


@pytest.mark.parametrize("name", ["signing.pem", "node"])
@pytest.mark.parametrize("content", [None, b"rubbish"])
def test_a_key_that_is_lost_or_broken_is_the_settings(
    name: str, content: bytes | None, case_of, hospital
) -> None:
    case, file = case_of(), hospital.folder / "keys" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    found = only(settings_checks.keys(case))
    assert (found.ok, found.owner) == (False, "settings")
    assert "backup" in found.cure


def test_an_authority_that_cannot_be_read_is_the_settings(case_of, hospital) -> None:
    case = case_of()
    assert only(settings_checks.authority(case)).ok
    (hospital.folder / "ca.pem").write_text("rubbish")
    found = only(settings_checks.authority(case))
    assert (found.ok, found.owner) == (False, "settings")
    assert "fingerprint by phone" in found.cure


def test_the_certificate_must_fit_its_key(case_of, hospital, tmp_path: Path) -> None:
    one, other = (certificates(tmp_path / name, hosts=["north"]) for name in ("one", "other"))
    file = hospital.folder / "keys" / "control.pem"
    case = case_of(changes={"link.certificate": file, "link.control": "127.0.0.1:2"})
    for key, is_fit in ((one.key, True), (other.key, False)):
        file.write_bytes(key.read_bytes() + one.certificate.read_bytes())
        found = only(settings_checks.certificate(case))
        assert (found.ok, found.owner) == (is_fit, "settings")
    assert found.said == "the key beside it is another's"
    file.write_bytes(b"")
    assert only(settings_checks.certificate(case)).ok is False
    assert list(settings_checks.certificate(case_of())) == []


def test_a_plan_the_rules_refuse_is_told_by_its_first_objection(case_of) -> None:
    assert only(settings_checks.plan(case_of())).ok
    found = only(settings_checks.plan(case_of({"training.num_rounds": 300})))
    assert (found.ok, found.owner) == (False, "settings")
    assert "training.num_rounds: expected at most 200" in found.said
    quiet = case_of()
    policy = quiet.config.policy.model_copy(update={"quiet_hours": ("00:00-24:00",)})
    quiet.config = quiet.config.model_copy(update={"policy": policy})
    assert "quiet_hours" in only(settings_checks.plan(quiet)).said


# --- the machine


def test_the_state_folder_is_written_and_left_as_it_was(case_of) -> None:
    case = case_of()
    found = only(machine.state_folder(case))
    assert found.ok is not False
    assert found.figures["fsync_s"] >= 0
    assert not case.config.state_dir.exists()
    case.config.state_dir.mkdir()
    assert only(machine.state_folder(case)).ok is not False
    assert list(case.config.state_dir.iterdir()) == []


def test_a_state_folder_that_cannot_be_written_is_the_machines(case_of, hospital) -> None:
    (hospital.folder / "state").write_text("a file, where a folder should be")
    found = only(machine.state_folder(case_of()))
    assert (found.ok, found.owner) == (False, "this machine")
    assert "cannot be written" in found.said
    assert "state_dir" in found.cure


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_found_by_writing(case_of, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, content: bytes) -> None:
        with Path("/dev/full").open("wb", buffering=0) as stream:
            stream.write(content)

    monkeypatch.setattr(machine, "replace", full)
    found = only(machine.state_folder(case_of()))
    assert (found.ok, found.owner) == (False, "this machine")
    assert "No space left" in found.said
    assert "make room" in found.cure


def test_the_room_needed_is_that_of_the_plans_model(
    case_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, masked = (
        only(machine.disk(case_of({"rounds.secure_aggregation": on}))) for on in (False, True)
    )
    assert plain.ok
    assert plain.figures["needed_mb"] <= masked.figures["needed_mb"]
    any_plan = only(machine.disk(case_of(has_plan=False)))
    assert any_plan.figures["needed_mb"] >= 2 * 200
    usage = shutil.disk_usage("/")._replace(free=100 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = only(machine.disk(case_of()))
    assert (found.ok, found.owner) == (False, "this machine")
    assert found.said.startswith("100.0 MB free, ")


def charge(case: Case) -> None:
    site, plan = case.config, case.plan
    assert plan is not None
    plenty = ledger.Budget(per_study=90.0, lifetime=90.0, delta=0.01)
    event = event_of(plan, steps=2)
    ledger.reserve(site.state_dir, study="5a" * 32, round_=0, event=event, budget=plenty)


def test_records_are_read_whole_and_against_each_other(case_of, hospital) -> None:
    case = case_of()
    assert only(machine.records(case)).said.startswith("none yet")
    charge(case)
    book = journal.Book(case.config.state_dir, case.config.name, hospital.key)
    journal.append(book, journal.Event("started"))
    assert only(machine.records(case)).said == "whole and alike; 1 charge"
    charge(case)
    found = only(machine.records(case))
    assert (found.ok, found.owner) == (False, "this machine")
    assert "the ledger's reservation 1 is not in the journal" in found.said
    assert "consilia-audit verify" in found.cure


@pytest.mark.parametrize("name", [ledger.FILE, journal.FILE])
def test_a_record_that_was_edited_is_found(name: str, case_of, hospital) -> None:
    case = case_of()
    charge(case)
    book = journal.Book(case.config.state_dir, case.config.name, hospital.key)
    journal.append(book, journal.Event("started"))
    file = case.config.state_dir / name
    file.write_bytes(file.read_bytes().replace(b"5a5a", b"6b6b"))
    found = only(machine.records(case))
    assert (found.ok, found.owner) == (False, "this machine")


def test_what_the_worker_gives_up_is_tried_by_starting_one(case_of) -> None:
    found = only(machine.worker(case_of()))
    assert found.ok is not False
    assert "it reaches no network" in found.said or "confined in its network" in found.said


def test_what_the_machine_does_not_let_the_worker_give_up_is_named_with_its_cure(
    case_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = Confinement(None, None, "EPERM", None, "ENOSYS")
    monkeypatch.setattr(supervisor, "confinement_of", lambda _: lacking)
    network, files = machine.worker(case_of())
    assert (network.ok, network.owner) == (None, "this machine")
    assert "in its network (EPERM); otherwise it gains no privilege" in network.said
    assert "max_user_namespaces" in network.cure
    assert ("files (ENOSYS)" in files.said, "Landlock" in files.cure) == (True, True)


def test_a_key_that_the_worker_may_read_is_named(case_of, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Confinement(*[None] * 5)
    monkeypatch.setattr(supervisor, "confinement_of", lambda _: whole)
    case = case_of()
    within = case.config.data.root / "keys" / "signing.pem"
    case.config = case.config.model_copy(update={"signing_key": within})
    confined, exposed = machine.worker(case)
    assert confined.ok
    assert (exposed.ok, exposed.owner) == (False, "settings")
    assert "signing.pem" in exposed.said
    assert "move the keys" in exposed.cure


def test_memory_is_that_of_the_machine_or_of_its_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert machine.available_bytes(tmp_path, tmp_path / "none") == 4000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert machine.available_bytes(tmp_path, tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes(tmp_path, tmp_path) == 4000 * 1024
    assert machine.available_bytes(tmp_path / "none", tmp_path / "none") > 0


def test_memory_is_held_against_what_the_dry_batch_took(case_of) -> None:
    case = case_of()
    assert only(machine.memory(case)).ok is None
    for peak, is_enough in ((MIB, True), (10**15, False)):
        case.dry = dry.Dry(peak_bytes=peak, cohort_bytes=MIB)
        found = only(machine.memory(case))
        assert found.ok == is_enough
    assert found.owner == "this machine"
    assert "most_images" in found.cure


@pytest.mark.parametrize(
    ("most_gb", "peak_mb", "is_enough"), [(0.5, 600, False), (2, 600, True), (0, 10_000, False)]
)
def test_memory_is_held_against_what_the_worker_may_hold(
    most_gb: float, peak_mb: int, is_enough: bool, case_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker over its limit is ended in the middle of a round, which is too late to learn it."""
    monkeypatch.setattr(machine, "available_bytes", lambda: 64 * 1024 * MIB)
    monkeypatch.setattr(supervisor, "SHARE_OF_MEMORY", 1e-6)
    case = case_of()
    limits = case.config.limits.model_copy(update={"max_memory_gb": most_gb})
    case.config = case.config.model_copy(update={"limits": limits})
    case.dry = dry.Dry(peak_bytes=peak_mb * MIB, cohort_bytes=MIB)
    found = only(machine.memory(case))
    assert (found.ok, found.owner) == (is_enough, "settings")
    assert "raise limits.max_memory_gb" in found.cure
    assert ("while it is 0" in found.cure) == (most_gb == 0)
    assert most_gb == 0 or found.figures["allowed_mb"] == 1024 * most_gb


# --- what is installed


def wheel(folder: Path, files: dict[str, str], *, requires: tuple[str, ...] = ()) -> Path:
    """Install a made-up wheel of ours into ``folder``, as pip does."""
    info = folder / "consilia-9.9.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: consilia\nVersion: 9.9\n{needs}")
    lines = ["consilia-9.9.dist-info/METADATA,,"]
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
        found = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest())
        lines.append(f"{name},sha256={found.rstrip(b'=').decode()},{len(content)}")
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    return folder


FILES = {"client/__init__.py": "", "client/gate.py": "ours = 1\n", "client/templates/x.toml": "a"}


def found_in(folder: Path, running: Path | None = None) -> Finding:
    return installed.files_finding([str(folder)], running=running or folder)


def test_files_as_the_wheel_lists_them_are_well(tmp_path: Path) -> None:
    found = found_in(wheel(tmp_path, FILES))
    assert (found.ok, found.said) == (True, "3 files of 9.9 are those of the wheel")


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (
            lambda f: (f / "client/gate.py").write_text("ours = 2\n"),
            "changed since they were installed: client/gate.py",
        ),
        (lambda f: (f / "client/templates/x.toml").write_text("b"), "client/templates/x.toml"),
        (lambda f: (f / "client/gate.py").unlink(), "client/gate.py"),
        (lambda f: (f / "client/more.py").write_text(""), "not of the wheel: client/more.py"),
    ],
    ids=["edited", "edited data", "removed", "added"],
)
def test_a_tampered_file_is_named(do: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    do(wheel(tmp_path, FILES))
    found = found_in(tmp_path)
    assert (found.ok, found.owner) == (False, "this machine")
    assert words in found.said
    assert "pip install --force-reinstall" in found.cure


def test_another_distribution_of_the_same_names_is_named(tmp_path: Path) -> None:
    wheel(tmp_path, FILES)
    other = tmp_path / "flowery_client-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: flowery-client\nVersion: 1.0\n")
    (other / "RECORD").write_text("client/__init__.py,,\n")
    found = found_in(tmp_path)
    assert found.ok is False
    assert "flowery-client installs packages of the same names" in found.said
    assert "pip uninstall flowery-client" in found.cure


def test_an_editable_install_cannot_be_compared_and_that_is_said(tmp_path: Path) -> None:
    wheel(tmp_path, FILES)
    info = tmp_path / "consilia-9.9.dist-info" / "direct_url.json"
    info.write_text(json.dumps({"url": "file:///x", "dir_info": {"editable": True}}))
    found = found_in(tmp_path)
    assert found.ok is None
    assert "editable install, which cannot be compared" in found.said


def test_other_files_that_run_than_those_installed_are_found(tmp_path: Path) -> None:
    found = found_in(wheel(tmp_path / "site", FILES), tmp_path / "checkout")
    assert (found.ok, found.said) == (False, "other files run than those that are installed")
    assert "PYTHONPATH" in found.cure
    nothing = found_in(tmp_path / "empty")
    assert nothing.ok is None


def test_versions_are_those_the_wheel_asks_for(tmp_path: Path) -> None:
    wheel(tmp_path, FILES, requires=("torch", "flwr==1.41.0", 'ruff; extra == "dev"'))
    for name, version in (("torch", "2.13.0"), ("flwr", "1.40.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)
    found = installed.versions_finding([str(tmp_path)])
    assert (found.ok, found.owner) == (False, "this machine")
    assert found.said == "expected flwr==1.41.0 (here: 1.40.0)"
    (tmp_path / "flwr-1.40.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flwr\nVersion: 1.41.0\n"
    )
    found = installed.versions_finding([str(tmp_path)])
    assert (found.ok, found.said) == (True, "consilia 9.9 with flwr 1.41.0, torch 2.13.0")
    shutil.rmtree(tmp_path / "torch-2.13.0.dist-info")
    assert "torch (here: none)" in installed.versions_finding([str(tmp_path)]).said


# --- data


def data_findings(case: Case) -> dict[str, Finding]:
    return named(run(case, AREAS["data"]))


def test_a_hospital_whose_data_fit_has_nothing_to_put_right(case_of) -> None:
    found = data_findings(case_of())
    assert all(one.ok for one in found.values()), found
    assert list(found) == ["manifest", "patients", "delta", "labels", "images", "geometry"]
    assert found["patients"].said == "12 to train on, 6 to test on"
    assert found["images"].figures == {"read": 36, "broken": 0, "images": 36}
    assert found["geometry"].said.startswith("16 × 16 of 1.25 × 1.25 mm")


@pytest.mark.parametrize(
    ("where", "words"),
    [("data.manifest", "data.manifest names no file"), ("data.root", "data.root names no folder")],
)
def test_a_manifest_or_root_that_is_not_there_is_told_without_its_path(
    where: str, words: str, case_of, mark: str
) -> None:
    found = data_findings(case_of(changes={where: Path(f"/nowhere/{mark}")}))
    assert (found["manifest"].ok, found["manifest"].owner) == (False, "data")
    assert found["manifest"].said == words
    assert mark not in str(found)


def test_a_manifest_with_missing_files_is_counted(case_of, hospital) -> None:
    case = case_of()
    for number in range(25):
        next(hospital.images.glob("*.png")).unlink()
        assert number < 25
    found = data_findings(case)["manifest"]
    assert (found.ok, found.owner) == (False, "data")
    assert found.said.startswith("20 lines: a label without an image")
    assert found.cure == "restore it or remove the line"


def test_a_manifest_without_its_columns_is_told_without_its_name(case_of, mark: str) -> None:
    case = case_of()
    file = case.config.data.root / f"{mark}.csv"
    file.write_text("picture,patient\na,b\n")
    changed = case.config.data.model_copy(update={"manifest": file})
    case.config = case.config.model_copy(update={"data": changed})
    found = data_findings(case)["manifest"]
    assert found.said == "missing column image, label"
    assert mark not in str(found)


def test_images_that_cannot_be_read_are_counted_with_the_cure(case_of, hospital) -> None:
    for file in sorted(hospital.images.glob("*.png"))[:3]:
        file.write_bytes(file.read_bytes()[:60])
    found = data_findings(case_of())["images"]
    assert (found.ok, found.owner) == (False, "data")
    assert found.said.startswith("of 36 opened, 3 images: cannot read the image (")
    assert "replace it" in found.cure
    assert found.figures["broken"] == 3


def test_a_quick_check_opens_few_images_evenly_spread(case_of) -> None:
    told: list[tuple[str, int, int]] = []
    case = case_of(depth="quick", progress=lambda *what: told.append(what))
    assert data_findings(case)["images"].said == "5 of 36 opened, all readable"
    assert told == [("reading images", number, 5) for number in range(5)]


def test_labels_of_other_classes_are_counted_and_not_quoted(case_of, hospital, mark: str) -> None:
    rewrite(hospital, lambda number, row: row.update(label=mark) if number < 4 else None)
    found = data_findings(case_of())["labels"]
    assert (found.ok, found.owner) == (False, "data")
    assert found.said == "4 of 36 labels are none of the plan's classes"
    assert "clear, opaque" in found.cure


NUMBERS = {"clear": "0", "opaque": "1"}


@pytest.mark.parametrize(
    ("classes", "ok", "words"),
    [
        ((), None, "numbers, which the plan reads: 0 as clear, 1 as opaque"),
        (("clear", "opaque"), True, "the plan's classes"),
        (("opaque", "clear"), False, "this site's labels number opaque, clear, the plan's clear"),
    ],
)
def test_swapped_class_names_are_found_where_the_site_says_what_numbers_mean(
    classes: tuple[str, ...], ok: bool | None, words: str, case_of, hospital
) -> None:
    rewrite(hospital, lambda _, row: row.update(label=NUMBERS[row["label"]]))
    case = case_of(changes={"data.classes": classes})
    case.rows = ()
    found = next(one for one in run(case, AREAS["data"]) if one.what == "labels")
    assert (found.ok, found.owner) == (ok, "data")
    assert words in found.said
    assert ok or "data.classes" in found.cure


def test_a_class_that_is_not_to_train_on_is_told(case_of, hospital) -> None:
    def change(number: int, row: dict[str, str]) -> None:
        row.update(label="clear" if row["split"] == "train" else row["label"])

    rewrite(hospital, change)
    found = data_findings(case_of())["labels"]
    assert (found.ok, found.said) == (None, "no opaque to train on")


def test_too_few_patients_and_too_large_a_delta_are_the_datas(case_of) -> None:
    found = data_findings(case_of({"min_patients": 13, "privacy.delta": 0.09}))
    assert (found["patients"].ok, found["patients"].owner) == (False, "data")
    assert "at least 13 are needed" in found["patients"].said
    assert (found["delta"].ok, found["delta"].owner) == (False, "data")
    few = data_findings(case_of(changes={"policy.min_test_patients": 7}))
    assert few["patients"].ok is None
    assert "fewer than 7 stay in the hospital" in few["patients"].said


def test_sizes_that_differ_after_the_plans_steps_are_told(case_of, hospital) -> None:
    from PIL import Image

    file = next(hospital.images.glob("*.png"))
    with Image.open(file) as picture:
        picture.resize((30, 24)).save(file)
    assert data_findings(case_of())["geometry"].ok
    found = data_findings(case_of({"imaging": [{"name": "standardize"}]}))["geometry"]
    assert (found.ok, found.owner) == (False, "data")
    assert found.said == "2 different sizes after the plan's imaging steps"
    assert "'resize' or 'crop-or-pad'" in found.cure


def test_slices_where_the_net_takes_volumes_are_told(case_of) -> None:
    plan = {
        "net.params": {"spatial_dims": 3, "init_features": 4, "growth_rate": 4},
        "imaging": [{"name": "standardize"}],
    }
    found = data_findings(case_of(plan))["geometry"]
    assert found.ok is False
    assert "single slices, where the plan's net takes volumes" in found.said


def test_a_spacing_that_changes_very_much_is_worth_a_look(case_of) -> None:
    plan = {"imaging": [{"name": "resize", "params": {"size": [4, 4]}}]}
    found = data_findings(case_of(plan))["geometry"]
    assert (found.ok, found.owner) == (None, "data")


SEGMENTS = {
    "task": {"name": "segmentation", "params": {"classes": ["lesion"]}},
    "net": {"name": "unet", "params": {"channels": [4, 8], "strides": [2]}},
    "imaging": [{"name": "resize", "params": {"size": [16, 16]}}],
}


@pytest.mark.parametrize(("highest", "ok"), [(1, True), (0, None), (3, False)])
def test_label_maps_are_opened_and_their_numbers_held_against_the_classes(
    highest: int, ok: bool | None, case_of, hospital, mark: str
) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.zeros((20, 20), np.uint8)
    pixels[5:15, 5:15] = highest
    Image.fromarray(pixels).save(hospital.images / f"{mark}-map.png")
    rewrite(hospital, lambda _, row: row.update(label=f"{mark}-map.png"))
    case = case_of(SEGMENTS, changes={"data.classes": ("lesion",)})
    found = data_findings(case)
    verdict = found["images"] if ok is False else found["labels"]
    assert (verdict.ok, verdict.owner) == (ok, "data")
    if ok is False:
        assert "expected label values from 0 to 1" in verdict.said
    assert mark not in str(found)


FINDS = {
    "task": {"name": "detection", "params": {"classes": ["cell", "big cell"]}},
    "net": {"name": "centernet", "params": {"stem": [4], "channels": [8, 8]}},
    "imaging": [{"name": "resize", "params": {"size": [16, 16]}}],
}


@pytest.mark.parametrize(
    ("label", "what", "ok", "words"),
    [
        ("cell 1 2 9 9; big cell 3 3 12 12", "labels", True, "to train on: cell 24, big cell 24"),
        ("none", "labels", None, "no cell to train on, no big cell to train on"),
        ("cell 1 2 9 9", "labels", None, "no big cell to train on"),
        ("MARK 1 2 9 9", "labels", False, "36 of 36 labels are no boxes of the plan's classes"),
        ("cell 1 2 1 9", "labels", False, "36 of 36 labels are no boxes of the plan's classes"),
        ("cell 1 2 900 9", "images", False, "36 images: a box reaches outside its image"),
    ],
)
def test_boxes_are_held_against_the_plans_classes_and_their_images(
    label: str, what: str, ok: bool | None, words: str, case_of, hospital, mark: str
) -> None:
    rewrite(hospital, lambda _, row: row.update(label=label.replace("MARK", mark)))
    found = data_findings(case_of(FINDS))
    assert (found[what].ok, found[what].owner) == (ok, "data")
    assert words in found[what].said
    assert mark not in str(found)


ORDER = {
    "task": {"name": "series-classification", "params": {"labels": "order"}},
    "net": {"name": "recurrent", "params": {"spatial_dims": 3, "channels": [4], "hidden": 4}},
    "imaging": [{"name": "resize", "params": {"size": [16, 16]}}],
}


def test_a_task_that_wants_no_labels_is_told_nothing_of_them(case_of, hospital) -> None:
    rewrite(hospital, lambda _, row: row.update(label=""))
    found = data_findings(case_of(ORDER))
    assert found["manifest"].ok
    assert "labels" not in found
    assert data_findings(case_of())["manifest"].ok is False


# --- the dry batch


def test_a_dry_batch_runs_the_plans_engine_in_a_process_of_its_own(case_of) -> None:
    case = case_of()
    found = named(run(case, (*AREAS["data"], dry.gpu, dry.dry_batch, machine.memory, dry.metrics)))
    assert found["dry batch"].ok, found["dry batch"]
    assert "a step with 6 patients takes" in found["dry batch"].said
    assert found["memory"].figures["needed_mb"] > 50
    assert found["metrics"].ok
    assert case.dry is not None
    assert case.dry.cohort_bytes == 36 * (16 * 16 * 4 + 8)
    assert case.dry.update_bytes == case.dry.weights_bytes > 0
    assert case.dry.evaluation_s > 0


def taken(case: Case, **given: Any) -> dry.Dry:
    plan = case.plan
    return dry.take(dry.Job(plan=plan, performance=PerformanceSettings(), num_patients=6, **given))


def test_a_batch_that_cannot_be_taken_tells_the_kind_of_error_alone(case_of) -> None:
    found = taken(case_of(), image_size=(1, 16, 16))
    assert found.step_s is None
    assert found.trouble.isidentifier()
    case = case_of()
    case.dry = found
    said = only(dry.dry_batch(case))
    assert (said.ok, said.owner) == (False, "this machine")
    assert said.said == f"no step was taken: {found.trouble}"
    assert said.cure


@pytest.mark.parametrize("is_private", [True, False])
def test_made_up_patients_are_enough_for_every_metric(is_private: bool, case_of) -> None:
    changes = SEGMENTS | ({} if is_private else {"privacy": None})
    found = taken(case_of(changes))
    assert found.trouble == ""
    assert set(found.metrics) == {"dice", "dice_lesion", "hd95", "hd95_lesion"}


@pytest.mark.parametrize("is_private", [True, False])
def test_made_up_boxes_are_enough_for_every_metric(is_private: bool, case_of) -> None:
    found = taken(case_of(FINDS | ({} if is_private else {"privacy": None})))
    assert found.trouble == ""
    assert {"map50", "map50_cell", "froc", "froc_big_cell"} <= set(found.metrics)


def test_made_up_images_without_labels_are_enough_for_a_metric(case_of) -> None:
    found = taken(case_of(ORDER), image_size=(5, 16, 16))
    assert found.trouble == ""
    assert "accuracy" in found.metrics


def test_metrics_that_stay_are_told(case_of) -> None:
    case = case_of(changes={"policy.metrics": ("auc",)})
    case.dry = dry.Dry(metrics=("accuracy", "auc"))
    found = only(dry.metrics(case))
    assert (found.ok, found.owner) == (None, "settings")
    assert found.said == "auc may leave; accuracy stays here"


def test_a_gpu_that_is_asked_for_and_not_there_is_the_machines(case_of) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    performance = PerformanceSettings(device="cuda")
    case = case_of(changes={"performance": performance})
    found = dry.take(dry.Job(plan=case.plan, performance=performance))
    assert (found.device, found.trouble) == ("cuda", "there is no GPU")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "the system ended it (signal 9): out of memory?"),
        ("raise SystemExit(3)", "ended without an answer (exit 3)"),
        ("print('MARKED-7731')", "ended without an answer (exit 0)"),
        ("import time; time.sleep(60)", "it took longer than"),
    ],
)
def test_a_process_that_dies_or_hangs_is_a_finding(
    program: str, words: str, case_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dry.subprocess.run

    def other(command: list[str], **given: Any) -> Any:
        return real([command[0], "-c", program], **given)

    monkeypatch.setattr(dry, "LIMIT_S", 2.0)
    monkeypatch.setattr(dry.subprocess, "run", other)
    case = case_of()
    list(dry.gpu(case))
    found = only(dry.dry_batch(case))
    assert found.ok is False
    assert words in found.said
    assert "MARKED" not in str(found)


# --- the command


@pytest.fixture
def plan_file(plan_of, coordinator_key: Ed25519PrivateKey, tmp_path: Path) -> Path:
    file = tmp_path / "plan.toml"
    plan = plan_of({})
    file.write_text(plans.render(plan, sign(plan, key=coordinator_key)))
    return file


def check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.mark.usefixtures("case_of")
def test_check_leaves_with_1_if_anything_is_wrong_and_says_whose_it_is(
    case_of, hospital, plan_file: Path
) -> None:
    assert case_of
    found = check(plan_file, "--config", hospital.config_file, "--quick")
    assert found.exit_code == 1
    assert "✗  port" in found.output
    assert "server: ask whether the coordinator is running" in found.output
    assert found.output.rstrip().splitlines()[-1].startswith("1 of ")
    assert max(map(len, found.output.splitlines())) <= 80
    assert not (hospital.folder / "state").exists()


def test_check_tells_machines_the_same(case_of, hospital, plan_file: Path) -> None:
    assert case_of
    found = check(plan_file, "--config", hospital.config_file, "--quick", "--json")
    told = json.loads(found.output)
    assert (found.exit_code, told["ok"]) == (1, False)
    assert {one["area"] for one in told["findings"]} == set(AREAS)
    (failed,) = [one for one in told["findings"] if one["ok"] is False]
    assert (failed["what"], failed["owner"]) == ("port", "server")
    assert failed["cure"]


@pytest.mark.parametrize(("broken", "owner"), [("site.toml", "settings"), ("plan.toml", "server")])
def test_settings_or_a_plan_that_cannot_be_read_are_findings(
    broken: str, owner: str, case_of, hospital, plan_file: Path, mark: str
) -> None:
    assert case_of
    file = {"site.toml": hospital.config_file, "plan.toml": plan_file}[broken]
    file.write_text(file.read_text() + f'\nunknown = "{mark}"\n')
    found = check(plan_file, "--config", hospital.config_file, "--json")
    (failed,) = [one for one in json.loads(found.output)["findings"] if one["ok"] is False]
    assert (found.exit_code, failed["owner"]) == (1, owner)
    assert "unknown key" in failed["said"]
    assert mark not in found.output


def test_nothing_of_a_patient_is_in_the_output_or_the_log(
    case_of, hospital, plan_file: Path, mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert case_of
    for file in sorted(hospital.images.glob("*.png"))[:2]:
        file.write_bytes(b"\x89PNG broken " + mark.encode())
    rewrite(hospital, lambda number, row: row.update(label=mark) if number == 9 else None)
    outputs = [
        check(plan_file, "--config", hospital.config_file, "--quick", *more).output
        for more in ((), ("--json",), ("--all",))
    ]
    hospital.manifest.write_text(hospital.manifest.read_text() + f"{mark}.png,{mark},clear,test\n")
    outputs.append(check(plan_file, "--config", hospital.config_file, "--quick").output)
    for output in outputs:
        assert mark not in output
        assert str(hospital.images) not in output
    assert mark not in caplog.text


def test_the_verdict_counts_by_owner() -> None:
    well = Finding("a", True, "b", "data")
    wrong = [Finding("a", False, "b", owner, "c") for owner in ("network", "data", "network")]
    assert show.verdict([well]).plain == "nothing is wrong in 1 check"
    assert show.verdict([well, *wrong, Finding("a", None, "b", "data")]).plain == (
        "3 of 5 failed, to be put right by: network 2, data 1; 1 not tried, or worth a look (–)"
    )

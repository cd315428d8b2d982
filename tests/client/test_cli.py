"""consilia-site as a person at a hospital meets it: words, exit codes, and JSON for machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client import config, ledger, peers, studies
from client.cli import app
from shared_models import audit, journal
from shared_models import plan as plans
from shared_models.contracts import Countersignature
from shared_models.errors import ConsiliaError, DocumentError, LedgerError
from shared_models.plan import event_of
from shared_models.privacy import epsilon
from shared_models.signing import digest, is_signed_by, public_key, sign


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own, with nothing but words between."""
    return subprocess.run(
        [sys.executable, "-m", "client.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "200"},
    )


PlanFiles = Callable[..., Path]


@pytest.fixture
def plan_file(plan_of, coordinator_key: Ed25519PrivateKey, tmp_path: Path) -> PlanFiles:
    """Return a function that writes a plan, signed by its coordinator unless told otherwise."""

    def make(changes: dict[str, Any] | None = None, *, is_signed: bool = True) -> Path:
        plan = plan_of(changes or {})
        signature = sign(plan, key=coordinator_key) if is_signed else None
        file = tmp_path / "plan.toml"
        file.write_text(plans.render(plan, signature))
        return file

    return make


# --- judge


def test_judge_has_no_objection_to_a_plan_within_the_rules(hospital, plan_file: PlanFiles) -> None:
    found = run("judge", plan_file(), "--config", hospital.config_file)
    assert (found.exit_code, found.output) == (
        0,
        "no objection: this hospital may approve the plan\n",
    )


def test_judge_tells_every_objection_and_leaves_with_1(hospital, plan_file: PlanFiles) -> None:
    plan = plan_file({"purpose": "quality-assurance", "sites": ["south"], "rounds.quorum": 1})
    found = run("judge", plan, "--config", hospital.config_file)
    assert found.exit_code == 1
    assert found.output.splitlines() == [
        "- sites: the plan does not name this site, north",
        "- purpose: 'quality-assurance' is not allowed at this site; "
        "allowed: demonstration, research",
        "2 objections: not admitted",
    ]


def test_judge_counts_one_objection_as_one(hospital, plan_file: PlanFiles) -> None:
    plan = plan_file({"sites": ["south"]})
    found = run("judge", plan, "--config", hospital.config_file)
    assert found.output.splitlines()[-1] == "1 objection: not admitted"


@pytest.mark.parametrize("is_admitted", [True, False])
def test_judge_tells_machines_the_same(is_admitted: bool, hospital, plan_file: PlanFiles) -> None:
    plan = plan_file() if is_admitted else plan_file({"sites": ["south"]})
    found = run("judge", plan, "--config", hospital.config_file, "--json")
    assert found.exit_code == (0 if is_admitted else 1)
    objections = [] if is_admitted else ["sites: the plan does not name this site, north"]
    assert json.loads(found.output) == {"admitted": is_admitted, "objections": objections}


def test_judge_changes_nothing(hospital, plan_file: PlanFiles) -> None:
    run("judge", plan_file(), "--config", hospital.config_file)
    assert not (hospital.folder / "state").exists()


def test_judge_says_what_keeps_a_file_from_being_a_plan(hospital, plan_file: PlanFiles) -> None:
    file = plan_file()
    file.write_text(file.read_text().replace("num_rounds = 3", "num_round = 3"))
    found = process("judge", file, "--config", hospital.config_file)
    assert found.returncode in (1, DocumentError.exit_code)
    assert "training.num_round: unknown key; known here: " in found.stdout + found.stderr
    assert "training.num_rounds: field required" in found.stdout + found.stderr


# --- approve


def test_approve_keeps_the_plan_and_the_sites_signature(hospital, plan_file: PlanFiles) -> None:
    file = plan_file()
    found = run("approve", file, "--who", "Dr. Reed", "--config", hospital.config_file)
    plan = plans.read(file).plan
    assert found.exit_code == 0
    assert found.output == f"approved study {digest(plan)[:12]} of 'tiny'\n"
    site = config.read(hospital.config_file)
    assert studies.approved(digest(plan), site, key=hospital.key) == plan


def test_approve_gives_machines_the_countersignature(hospital, plan_file: PlanFiles) -> None:
    file = plan_file()
    found = run("approve", file, "--who", "Dr. Reed", "--config", hospital.config_file, "--json")
    given = Countersignature.model_validate_json(found.output)
    assert given.approval.study == digest(plans.read(file).plan)
    assert given.approval.who == "Dr. Reed"
    assert is_signed_by(given.approval, given.signature, key=public_key(hospital.key))


@pytest.mark.parametrize(
    ("changes", "is_signed", "objection"),
    [
        ({}, False, "- signature: the plan is not signed by its coordinator"),
        ({"sites": ["south"]}, True, "- sites: the plan does not name this site, north"),
    ],
    ids=["unsigned", "against a rule"],
)
def test_approve_refuses_what_the_rules_forbid(
    changes: dict[str, Any], is_signed: bool, objection: str, hospital, plan_file: PlanFiles
) -> None:
    file = plan_file(changes, is_signed=is_signed)
    found = run("approve", file, "--who", "Dr. Reed", "--config", hospital.config_file)
    assert found.exit_code == 1
    assert found.output.splitlines() == [objection, "1 objection: not admitted"]
    assert not (hospital.folder / "state" / "studies").exists()
    lines = journal.parse((hospital.folder / "state" / journal.FILE).read_bytes())
    assert [line.entry.kind for line in lines] == ["opened", "refused-plan"]


def test_nobody_overrides_the_rules(hospital, plan_file: PlanFiles) -> None:
    for option in ("--force", "--yes", "--override"):
        found = run("approve", plan_file(), "--who", "x", "--config", hospital.config_file, option)
        assert found.exit_code == 2


@pytest.mark.parametrize("who", ["", "x" * 121])
def test_approve_asks_for_a_name(who: str, hospital, plan_file: PlanFiles) -> None:
    found = run("approve", plan_file(), "--who", who, "--config", hospital.config_file)
    assert found.exit_code == 2
    assert not (hospital.folder / "state").exists()


def test_approve_without_the_sites_key_approves_nothing(hospital, plan_file: PlanFiles) -> None:
    (hospital.folder / "keys" / "signing.pem").unlink()
    found = run("approve", plan_file(), "--who", "Dr. Reed", "--config", hospital.config_file)
    assert isinstance(found.exception, DocumentError)
    assert not (hospital.folder / "state").exists()


# --- trust


def trusted(hospital) -> dict[str, str]:
    return peers.read(config.read(hospital.config_file).policy.peers)


def test_trust_adds_the_peers_named_and_says_so(hospital) -> None:
    pairs = [f"south={'ab' * 32}", f"west={'cd' * 32}"]
    found = run("trust", *pairs, "--config", hospital.config_file)
    assert (found.exit_code, found.output) == (0, "trusted: south\ntrusted: west\n")
    assert trusted(hospital) == {"south": "ab" * 32, "west": "cd" * 32}
    assert (hospital.folder / "peers.toml").exists()


@pytest.mark.parametrize("pair", ["south", "south=", "=" + "ab" * 32, "south=abc", "so/uth=" + "0"])
def test_trust_refuses_what_is_no_name_and_key(pair: str, hospital) -> None:
    found = run("trust", pair, "--config", hospital.config_file)
    assert isinstance(found.exception, DocumentError)
    assert trusted(hospital) == {}


def test_trust_is_what_a_plan_with_secure_aggregation_asks_for(
    hospital, plan_file: PlanFiles
) -> None:
    plan = plan_file({"rounds.secure_aggregation": True, "rounds.quorum": 2})
    before = run("judge", plan, "--config", hospital.config_file)
    assert before.exit_code == 1
    assert "consilia-site trust" in before.output
    run("trust", f"south={'ab' * 32}", "--config", hospital.config_file)
    assert run("judge", plan, "--config", hospital.config_file).exit_code == 0


# --- budget


@pytest.fixture
def charged(hospital, plan_of) -> dict[str, float]:
    """Charge two studies and return what each cost, and both together, at the delta agreed."""
    site = config.read(hospital.config_file)
    plenty = ledger.Budget(per_study=100.0, lifetime=100.0, delta=0.01)
    small, large = (event_of(plan_of(), steps=steps) for steps in (2, 3))
    events = {"5a" * 32: [small, small], "c3" * 32: [large]}
    for study, charges in events.items():
        for round_, event in enumerate(charges):
            ledger.reserve(site.state_dir, study=study, round_=round_, event=event, budget=plenty)
    delta = plenty.delta
    costs = {study: epsilon(charges, delta=delta) for study, charges in events.items()}
    return costs | {"all": epsilon([small, small, large], delta=delta)}


def test_budget_shows_what_each_study_and_all_together_cost(
    hospital, charged: dict[str, float]
) -> None:
    found = run("budget", "--config", hospital.config_file)
    assert found.exit_code == 0
    assert found.output.splitlines() == [
        f"study {'5a' * 6}  epsilon {charged['5a' * 32]:.4f} of 4 at delta 0.01",
        f"study {'c3' * 6}  epsilon {charged['c3' * 32]:.4f} of 4 at delta 0.01",
        f"all studies         epsilon {charged['all']:.4f} of 8 at delta 0.01",
        "per patient; dp_accounting PLD, rounded up; Poisson; add or remove one patient",
    ]


def test_budget_tells_machines_the_same(hospital, charged: dict[str, float]) -> None:
    found = run("budget", "--config", hospital.config_file, "--json")
    costs = {study: {"epsilon": cost, "delta": 0.01} for study, cost in charged.items()}
    assert json.loads(found.output) == {
        "unit": "patient",
        "lifetime": costs.pop("all"),
        "noise_shares": 1,
        "studies": costs,
    }


def test_the_auditor_computes_the_numbers_the_site_shows(
    hospital, charged: dict[str, float]
) -> None:
    assert charged
    shown = run("budget", "--config", hospital.config_file, "--json")
    file = hospital.folder / "state" / ledger.FILE
    computed = CliRunner().invoke(audit.app, ["epsilon", str(file), "--json"])
    assert computed.output == shown.output


def test_budget_of_a_new_site_is_untouched(hospital) -> None:
    found = run("budget", "--config", hospital.config_file)
    assert found.output.splitlines()[0] == "all studies         epsilon 0.0000 of 8"
    assert not (hospital.folder / "state").exists()


@pytest.mark.usefixtures("charged")
def test_budget_of_a_broken_ledger_has_its_own_exit_code(hospital) -> None:
    with (hospital.folder / "state" / ledger.FILE).open("a") as handle:
        handle.write('{"study"')
    found = process("budget", "--config", hospital.config_file)
    assert found.returncode == LedgerError.exit_code
    assert found.stderr == (
        "the ledger's last line was cut short; the site puts it right when its agent starts\n"
    )
    assert found.stdout == ""


# --- every command


@pytest.mark.parametrize("command", ["judge", "approve", "budget", "start"])
def test_a_missing_site_toml_is_told_in_one_line(
    command: str, plan_file: PlanFiles, tmp_path: Path
) -> None:
    arguments = {"judge": [plan_file()], "approve": [plan_file(), "--who", "x"]}.get(command, [])
    found = process(command, *arguments, "--config", tmp_path / "none.toml")
    assert found.returncode == DocumentError.exit_code
    assert found.stderr == f"there is no file {tmp_path / 'none.toml'}\n"


def test_help_needs_no_torch_and_no_flower() -> None:
    program = (
        "import sys\n"
        "from client.cli import app\n"
        "from typer.testing import CliRunner\n"
        "found = CliRunner().invoke(app, ['--help'])\n"
        "assert found.exit_code == 0, found.output\n"
        "assert 'Exit codes' in found.output\n"
        "for heavy in ('torch', 'flwr', 'monai', 'opacus', 'numpy'):\n"
        "    assert heavy not in sys.modules, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- studies and decisions


@pytest.fixture
def offered(hospital, plan_file: PlanFiles) -> str:
    """Offer a study to the hospital and return its digest."""
    site = config.read(hospital.config_file)
    signed = plans.read(plan_file())
    word = studies.Word(state="offered", when=datetime.now(UTC))
    studies.keep_offer(signed, word, site, key=hospital.key)
    return digest(signed.plan)


def decide(hospital, command: str, study: str, *options: str) -> Result:
    return run(command, study[:6], "--who", "Dr. Reed", *options, "--config", hospital.config_file)


def status_of(hospital) -> str:
    found = run("studies", "--json", "--config", hospital.config_file)
    (one,) = json.loads(found.output)
    return str(one["status"])


def test_a_study_is_listed_shown_approved_and_withdrawn_by_its_first_digits(
    hospital, offered: str
) -> None:
    listed = run("studies", "--config", hospital.config_file).output
    assert offered[:8] in listed
    assert "to be decided" in listed
    assert decide(hospital, "approve", offered).output == (
        f"approved study {offered[:12]} of 'tiny'\n"
    )
    assert status_of(hospital) == "approved"
    found = decide(hospital, "withdraw", offered, "--reason", "capacity")
    assert found.output == f"withdrawn study {offered[:12]} of 'tiny'\n"
    assert status_of(hospital) == "withdrawn"
    assert run("judge", offered[:6], "--config", hospital.config_file).exit_code == 0
    assert decide(hospital, "approve", offered).exit_code == 0
    assert status_of(hospital) == "approved"
    verified = CliRunner().invoke(audit.app, ["verify", str(hospital.folder)])
    assert "holds  3 decisions about studies" in verified.output
    assert verified.exit_code == 0


def test_a_refusal_needs_a_reason_of_the_list_and_keeps_its_note(hospital, offered: str) -> None:
    assert decide(hospital, "refuse", offered).exit_code == 2
    assert decide(hospital, "refuse", offered, "--reason", "dislike").exit_code == 2
    assert status_of(hospital) == "offered"
    note = ["--note", "our lawyers say no"]
    found = decide(hospital, "refuse", offered, "--reason", "legal", *note, "--json")
    told = Countersignature.model_validate_json(found.output)
    assert (told.approval.decision, told.approval.reason) == ("refused", "legal")
    assert "lawyers" not in found.output
    assert status_of(hospital) == "refused"


@pytest.mark.parametrize("note", ["", "x" * 2001])
def test_a_note_that_is_none_is_wrong_usage(note: str, hospital, offered: str) -> None:
    assert decide(hospital, "refuse", offered, "--reason", "data", "--note", note).exit_code == 2
    assert status_of(hospital) == "offered"


def test_what_was_not_approved_cannot_be_withdrawn(hospital, offered: str) -> None:
    found = decide(hospital, "withdraw", offered)
    assert isinstance(found.exception, ConsiliaError)
    assert "nothing to withdraw" in str(found.exception)


def test_a_plan_is_told_in_plain_words(hospital, offered: str) -> None:
    found = " ".join(run("show", offered[:6], "--config", hospital.config_file).output.split())
    for words in (
        "tiny study",
        "Purpose research",
        "densenet (init_features 4",
        "the change of the model's weights with noise added here; also the number of training "
        "patients, and metrics over the test patients if there are at least 5.",
        "which costs as much again",
        "per patient at delta 0.01 for the whole study; at most 4",
        "dp_accounting PLD, pessimistic, rounded up; Poisson sampling; add or remove one patient",
        "Does not cover the presence of test patients in evaluation metrics",
    ):
        assert words in found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": None}, "NONE: nothing bounds what the model may reveal"),
        ({"privacy": None}, "WITHOUT any noise; the training loss"),
        ({"rounds.secure_aggregation": True}, "hidden among at least 2 sites"),
    ],
)
def test_what_a_plan_lacks_or_adds_is_told(
    changes: dict[str, Any], words: str, hospital, plan_file: PlanFiles
) -> None:
    found = run("show", plan_file(changes), "--config", hospital.config_file)
    assert words in " ".join(found.output.split())


def test_the_plan_itself_is_shown_as_it_was_signed(hospital, offered: str) -> None:
    found = run("show", offered[:6], "--toml", "--config", hospital.config_file)
    signed = plans.parse(found.output)
    assert digest(signed.plan) == offered
    assert is_signed_by(signed.plan, signed.signature, key=signed.plan.coordinator)


# --- status and page


def test_status_leaves_with_1_where_the_journal_is_broken(hospital, offered: str) -> None:
    found = run("status", "--json", "--config", hospital.config_file)
    assert found.exit_code == 0
    assert json.loads(found.output)["studies"][0]["study"] == offered
    file = hospital.folder / "state" / journal.FILE
    file.write_bytes(file.read_bytes()[:-9])
    found = run("status", "--config", hospital.config_file)
    assert found.exit_code == 1
    assert "BROKEN: entry 1" in found.output


def test_status_says_that_a_certificate_cannot_be_read(hospital) -> None:
    text = hospital.config_file.read_text()
    named = '[link]\ncontrol = "fl.example.org:9444"\ncertificate = "none.pem"\n'
    hospital.config_file.write_text(text.replace("[link]\n", named))
    found = run("status", "--json", "--config", hospital.config_file)
    assert any("certificate cannot be read" in one for one in json.loads(found.output)["attention"])


def test_page_serves_the_status_until_it_is_stopped(hospital, offered: str) -> None:
    command = [sys.executable, "-m", "client.cli", "page", "--port", "0"]
    running = subprocess.Popen(
        [*command, "--config", str(hospital.config_file)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout is not None
        address = running.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urlopen(f"{address}status.json", timeout=30) as answer:
            assert json.load(answer)["studies"][0]["study"] == offered
    finally:
        running.terminate()
        assert running.wait(30) == 0
        if running.stdout is not None:
            running.stdout.close()


def test_status_and_decisions_need_no_torch() -> None:
    program = (
        "import sys\n"
        "import client.show, client.status, client.page, client.studies_cli, client.visits\n"
        "for heavy in ('torch', 'flwr', 'monai', 'opacus', 'grpc'):\n"
        "    assert heavy not in sys.modules, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

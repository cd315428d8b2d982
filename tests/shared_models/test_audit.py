"""A run that was tampered with anywhere is found out, offline, from its files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from shared_models import weights as weights_of
from shared_models.audit import WITHHELD, app, audit_run
from shared_models.contracts import (
    Approval,
    Contract,
    Countersignature,
    Evaluation,
    PrivacyEvent,
    PrivacyStatement,
    Refusal,
    ReleaseManifest,
    Reservation,
    RoundPoint,
    RoundRecord,
    SiteReply,
    SiteResult,
    StudyReport,
    ValidationReport,
)
from shared_models.errors import DocumentError
from shared_models.plan import StudyPlan, event_of, render
from shared_models.privacy import epsilon, statement
from shared_models.signing import digest, public_key, sign

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SITES = ("north", "south")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.ljust(32).encode()) for name in SITES}
WEIGHTS = {"a": np.array([1.0, 2.0], np.float32)}
MODEL = weights_of.digest(weights_of.flatten(WEIGHTS))
EVALUATION = Evaluation(metrics={"auc": 0.9}, num_patients=10, num_images=10)

NewPlan = Callable[..., StudyPlan]


def stated(plan: StudyPlan, *, steps: int) -> PrivacyStatement | None:
    if plan.privacy is None or steps == 0:
        return None
    return statement((event_of(plan, steps=steps),), delta=plan.privacy.delta)


def reply(plan: StudyPlan, site: str, kind: Any, *, round_: int, steps: int) -> SiteReply:
    return SiteReply(
        study=digest(plan),
        round_=round_,
        kind=kind,
        site=site,
        num_patients=40,
        evaluation=EVALUATION,
        privacy=stated(plan, steps=steps),
    )


def records_of(plan: StudyPlan) -> list[RoundRecord]:
    """Return two training rounds, the evaluation and the training alone; south misses round 1."""
    per_round, last = plan.training.steps_per_round, plan.training.num_rounds
    steps = dict.fromkeys(SITES, 0)
    records = []
    for kind, round_ in (("train", 0), ("train", 1), ("evaluate", last), ("alone", last)):
        present = [s for s in SITES if (s, kind, round_) != ("south", "train", 1)]
        for site in present:
            steps[site] += per_round * {"train": 1, "evaluate": 0, "alone": last}[kind]
        records.append(
            RoundRecord(
                round_=round_,
                kind=kind,  # type: ignore[arg-type]
                replies=tuple(
                    reply(plan, site, kind, round_=round_, steps=steps[site]) for site in present
                ),
                refusals=tuple(
                    Refusal(
                        study=digest(plan), round_=round_, kind="train", site=site, code="failed"
                    )
                    for site in SITES
                    if site not in present
                ),
                weights_digest=MODEL,
                seconds=1.0 + round_,
                sent_bytes=100,
                received_bytes=50,
            )
        )
    return records


def report_of(plan: StudyPlan, records: list[RoundRecord], plan_toml: str) -> StudyReport:
    last = {r.site: r.privacy for record in records for r in record.replies if r.privacy}
    validation = ValidationReport(
        study=digest(plan), weights_digest=MODEL, metrics={"auc": 0.9}, num_patients=9, num_images=9
    )
    return StudyReport.model_validate(
        {
            "study": digest(plan),
            "name": plan.name,
            "purpose": plan.purpose,
            "description": "",
            "task": plan.task.name,
            "headline": "auc",
            "created": NOON,
            "seed": 0,
            "data": "",
            "plan_toml": plan_toml,
            "software": {},
            "is_private": plan.privacy is not None,
            "sites": tuple(
                SiteResult(
                    name=site,
                    num_patients=40,
                    metrics={},
                    num_test_patients=10,
                    epsilon=last[site].epsilon if site in last else None,
                    delta=last[site].delta if site in last else None,
                    privacy=last.get(site),
                )
                for site in SITES
            ),
            "rounds": tuple(
                RoundPoint(
                    round_=r.round_,
                    validation={},
                    sites={},
                    train_loss={},
                    seconds=r.seconds,
                    slowest_site_seconds=0.5,
                    sent_bytes=r.sent_bytes,
                    received_bytes=r.received_bytes,
                )
                for r in records
                if r.kind == "train"
            ),
            "global": validation,
            "model_digest": MODEL,
            "model_bytes": 8,
            "seconds": 3.0,
        }
    )


def manifest_of(plan: StudyPlan, report: StudyReport) -> ReleaseManifest:
    return ReleaseManifest(
        study=digest(plan),
        round_=2,
        net=plan.net.name,
        task=plan.task.name,
        weights_digest=MODEL,
        weights_file="weights.safetensors",
        num_parameters=2,
        strategy="fedavg",
        validation=EVALUATION,
        privacy={site.name: site.privacy for site in report.sites if site.privacy},
        intended_use="research",
    )


def write_run(folder: Path, plan: StudyPlan, key: Ed25519PrivateKey) -> Path:
    """Write a finished run in which everything is true."""
    text = render(plan, sign(plan, key=key))
    records = records_of(plan)
    report = report_of(plan, records, text)
    (folder / "approvals").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "plan.toml").write_text(text)
    keys = {"sites": {site: {"signing": public_key(k)} for site, k in KEYS.items()}}
    (folder / "run.json").write_text(json.dumps(keys))
    for site in SITES:
        approve(folder, plan, site)
    lines = "".join(record.model_dump_json() + "\n" for record in records)
    (folder / "rounds.jsonl").write_text(lines)
    (folder / "report.json").write_text(report.model_dump_json(by_alias=True))
    (folder / "model" / "manifest.json").write_text(manifest_of(plan, report).model_dump_json())
    weights_of.save(folder / "model" / "weights.safetensors", WEIGHTS)
    return folder


def approve(folder: Path, plan: StudyPlan, name: str, **changes: Any) -> None:
    key = changes.pop("key", KEYS[name])
    fields = {"study": digest(plan), "site": name, "decision": "approved", "who": "x", "when": NOON}
    approval = Approval.model_validate(fields | changes)
    signed: Contract = Countersignature(approval=approval, signature=sign(approval, key=key))
    (folder / "approvals" / f"{name}.json").write_text(signed.model_dump_json())


PRIVACY = {"epsilon": 8.0, "delta": 1e-3, "noise_multiplier": 2.0, "max_grad_norm": 1.0}


@pytest.fixture
def private(new_plan: NewPlan) -> StudyPlan:
    return new_plan(privacy=PRIVACY, compare_alone=True)


@pytest.fixture
def run_dir(tmp_path: Path, private: StudyPlan, coordinator_key: Ed25519PrivateKey) -> Path:
    return write_run(tmp_path / "run", private, coordinator_key)


def edit(file: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_lines(file: Path, change: Callable[[list[Any]], None]) -> None:
    data = [json.loads(line) for line in file.read_text().splitlines()]
    change(data)
    file.write_text("".join(json.dumps(each) + "\n" for each in data))


def test_a_true_run_passes_every_check(run_dir: Path, private: StudyPlan) -> None:
    found = audit_run(run_dir)
    assert found.failed == ()
    assert found.subject == digest(private)
    assert len(found.passed) == len(set(found.passed)) >= 15


def test_a_true_run_without_privacy_passes_every_check(
    tmp_path: Path, plan: StudyPlan, coordinator_key: Ed25519PrivateKey
) -> None:
    found = audit_run(write_run(tmp_path / "run", plan, coordinator_key))
    assert found.failed == ()
    assert "a study without privacy claims none" in found.passed


def failed(run_dir: Path) -> str:
    return "\n".join(audit_run(run_dir).failed)


def site(report: Any, name: str) -> Any:
    return next(each for each in report["sites"] if each["name"] == name)


def set_privacy(name: str, **changes: Any) -> Callable[[Any], None]:
    return lambda report: site(report, name)["privacy"].update(changes)


def no_privacy(report: Any) -> None:
    site(report, "south").update(privacy=None, epsilon=None, delta=None)


def smaller_everywhere(report: Any) -> None:
    one = site(report, "north")
    one["epsilon"] = one["privacy"]["epsilon"] = round(one["epsilon"] - 0.001, 4)


REPORT_LIES: list[tuple[Callable[[Any], None], str]] = [
    (lambda r: r.update(study="9" * 64), "the report is of this plan"),
    (lambda r: r.update(plan_toml="nonsense"), "the plan printed in the report is the signed one"),
    (
        lambda r: r.update(plan_toml=r["plan_toml"].replace("seed = 0", "seed = 1")),
        "the plan printed in the report is the signed one",
    ),
    (lambda r: r["sites"].pop(), "the report speaks of every site of the plan"),
    (smaller_everywhere, "covers the 20 steps it answered"),
    (no_privacy, "south: an epsilon is stated for what it trained"),
    (set_privacy("north", epsilon=9.0), "north: epsilon 9 is within the plan's"),
    (lambda r: site(r, "north").update(epsilon=0.1), "the epsilon printed is the one stated"),
    (lambda r: site(r, "north").update(delta=1e-9), "the epsilon printed is the one stated"),
    (set_privacy("south", noise_multiplier=9.0), "south: the stated mechanism is the plan's"),
    (set_privacy("south", sample_rate=0.01), "south: the stated mechanism is the plan's"),
    (set_privacy("south", max_grad_norm=0.5), "south: the stated mechanism is the plan's"),
    (set_privacy("south", images_per_patient=1), "south: the stated mechanism is the plan's"),
    (set_privacy("south", delta=1e-2), "south: the stated mechanism is the plan's"),
    (lambda r: r.update(model_digest="9" * 64), "the reported model is the last round's"),
    (lambda r: r["rounds"].pop(), "the report's rounds are those of rounds.jsonl"),
    (lambda r: r["rounds"][1].update(seconds=0.1), "the report's rounds are those of"),
]


@pytest.mark.parametrize(("lie", "check"), REPORT_LIES, ids=[str(n) for n in range(17)])
def test_a_lie_in_the_report_is_found(
    run_dir: Path, lie: Callable[[Any], None], check: str
) -> None:
    edit(run_dir / "report.json", lie)
    assert check in failed(run_dir)


MANIFEST_LIES: list[tuple[dict[str, Any], str]] = [
    ({"study": "9" * 64}, "the manifest is of this study"),
    ({"weights_digest": "9" * 64}, "the manifest is of this study"),
    ({"privacy": {}}, "the manifest states the report's privacy"),
    ({"weights_file": "none"}, "the released weights are the reported model"),
    ({"weights_file": "manifest.json"}, "the released weights are the reported model"),
]


@pytest.mark.parametrize(("lie", "check"), MANIFEST_LIES)
def test_a_lie_in_the_manifest_is_found(run_dir: Path, lie: dict[str, Any], check: str) -> None:
    edit(run_dir / "model" / "manifest.json", lambda m: m.update(lie))
    assert check in failed(run_dir)


def test_other_weights_are_found(run_dir: Path) -> None:
    other = {"a": np.array([1.0, 2.0000002], np.float32)}
    weights_of.save(run_dir / "model" / "weights.safetensors", other)
    assert failed(run_dir) == "the released weights are the reported model"


def in_parts(run_dir: Path) -> None:
    """Release only ``a`` of the model, and keep ``b`` beside the folder."""
    whole = weights_of.load(run_dir / "model" / "weights.safetensors")
    kept = {name: value for name, value in whole.items() if name.startswith("a")}
    weights_of.save(run_dir / "model" / "weights.safetensors", kept)
    weights_of.save(run_dir / WITHHELD, {n: v for n, v in whole.items() if n not in kept})
    stated = {"parts": ["a"], "released_digest": weights_of.digest(weights_of.flatten(kept))}
    edit(run_dir / "model" / "manifest.json", lambda m: m.update(stated))


def test_a_model_released_in_part_is_checked_with_what_is_withheld(run_dir: Path) -> None:
    in_parts(run_dir)
    assert failed(run_dir) == ""
    (run_dir / WITHHELD).unlink()
    weights_of.save(run_dir / WITHHELD, {"b": np.zeros(3, np.float32)})
    assert failed(run_dir) == "the released weights are the reported model"


def test_more_than_the_parts_that_are_released_is_found(run_dir: Path) -> None:
    in_parts(run_dir)
    edit(run_dir / "model" / "manifest.json", lambda m: m.update({"parts": ["other"]}))
    assert failed(run_dir) == "only the parts that the task releases are released"


def test_a_round_left_out_of_the_record_is_found(run_dir: Path) -> None:
    edit_lines(run_dir / "rounds.jsonl", lambda lines: lines.pop(0))
    assert "the report's rounds are those of rounds.jsonl" in failed(run_dir)


def test_a_round_more_than_was_charged_is_found(run_dir: Path) -> None:
    """The steps a site took are counted from its answers, not from what it says they cost."""
    edit_lines(run_dir / "rounds.jsonl", lambda lines: lines.insert(1, lines[0]))
    assert "north: epsilon" in failed(run_dir)
    assert "covers the 25 steps it answered" in failed(run_dir)


def test_training_alone_counts_as_all_rounds(run_dir: Path, private: StudyPlan) -> None:
    assert private.privacy is not None
    cost = epsilon((event_of(private, steps=20),), delta=private.privacy.delta)
    assert f"north: epsilon {cost:g} covers the 20 steps it answered" in audit_run(run_dir).passed


def test_a_plan_edited_after_it_was_signed_is_found(run_dir: Path) -> None:
    file = run_dir / "plan.toml"
    file.write_text(file.read_text().replace("noise_multiplier = 2.0", "noise_multiplier = 1.0"))
    found = failed(run_dir)
    assert "the plan is signed by its coordinator" in found
    assert "the report is of this plan" in found
    assert "north approved this plan" in found


def test_a_plan_without_a_signature_is_found(run_dir: Path, private: StudyPlan) -> None:
    (run_dir / "plan.toml").write_text(render(private))
    assert failed(run_dir) == "the plan is signed by its coordinator"


def missing_approval(run_dir: Path, plan: StudyPlan) -> None:
    (run_dir / "approvals" / "south.json").unlink()


def test_who_withdrew_after_it_answered_had_approved(run_dir: Path, private: StudyPlan) -> None:
    file = run_dir / "approvals" / "south.json"
    approved = Countersignature.model_validate_json(file.read_bytes())
    file.with_suffix(".jsonl").write_text(approved.model_dump_json() + "\n")
    approve(run_dir, private, "south", decision="withdrawn")
    assert not audit_run(run_dir).failed


def garbled_approval(run_dir: Path, plan: StudyPlan) -> None:
    (run_dir / "approvals" / "south.json").write_bytes(b"\xff{")


def refused(run_dir: Path, plan: StudyPlan) -> None:
    approve(run_dir, plan, "south", decision="refused")


def approved_another_plan(run_dir: Path, plan: StudyPlan) -> None:
    approve(run_dir, plan, "south", study="9" * 64)


def approved_by_another_site(run_dir: Path, plan: StudyPlan) -> None:
    approve(run_dir, plan, "south", site="north")


def approved_with_another_key(run_dir: Path, plan: StudyPlan) -> None:
    approve(run_dir, plan, "south", key=KEYS["north"])


def refusal_turned_into_approval(run_dir: Path, plan: StudyPlan) -> None:
    refused(run_dir, plan)
    edit(
        run_dir / "approvals" / "south.json",
        lambda signed: signed["approval"].update(decision="approved"),
    )


def key_forgotten(run_dir: Path, plan: StudyPlan) -> None:
    edit(run_dir / "run.json", lambda settings: settings["sites"].pop("south"))


APPROVAL_LIES = [
    missing_approval,
    garbled_approval,
    refused,
    approved_another_plan,
    approved_by_another_site,
    approved_with_another_key,
    refusal_turned_into_approval,
    key_forgotten,
]


@pytest.mark.parametrize("lie", APPROVAL_LIES, ids=lambda f: f.__name__)
def test_an_approval_that_does_not_hold_is_found(
    run_dir: Path, private: StudyPlan, lie: Callable[[Path, StudyPlan], None]
) -> None:
    lie(run_dir, private)
    assert failed(run_dir) == "south approved this plan"


@pytest.mark.parametrize(
    "settings", ["[]", "{}", "null", '{"sites": []}', '{"sites": {"north": 1}}']
)
def test_settings_without_keys_approve_nothing(run_dir: Path, settings: str) -> None:
    (run_dir / "run.json").write_text(settings)
    assert failed(run_dir) == "north approved this plan\nsouth approved this plan"


def test_a_claim_of_privacy_without_terms_is_found(
    tmp_path: Path, plan: StudyPlan, coordinator_key: Ed25519PrivateKey
) -> None:
    run_dir = write_run(tmp_path / "run", plan, coordinator_key)
    edit(run_dir / "report.json", lambda r: site(r, "north").update(epsilon=1.0))
    assert failed(run_dir) == "a study without privacy claims none"


@pytest.mark.parametrize(
    "name", ["plan.toml", "report.json", "rounds.jsonl", "run.json", "model/manifest.json"]
)
@pytest.mark.parametrize("content", [None, b"\xff", b"{"])
def test_a_file_a_run_must_have_is_missed(run_dir: Path, name: str, content: bytes | None) -> None:
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_bytes(content)
    with pytest.raises(DocumentError):
        audit_run(run_dir)


# --- the command line


def test_the_verdict_is_printed_and_is_the_exit_code(run_dir: Path) -> None:
    good = CliRunner().invoke(app, ["verify", str(run_dir)])
    assert (good.exit_code, good.stdout.splitlines()[-1]) == (0, "verified")
    edit(run_dir / "report.json", lambda r: r.update(model_digest="9" * 64))
    bad = CliRunner().invoke(app, ["verify", str(run_dir)])
    assert bad.exit_code == 1
    assert "  FAILS  the reported model is the last round's" in bad.stdout


def test_machines_get_the_same_as_json(run_dir: Path) -> None:
    told = CliRunner().invoke(app, ["verify", str(run_dir), "--json"])
    assert json.loads(told.stdout) == json.loads(audit_run(run_dir).model_dump_json())


@pytest.fixture
def ledger(tmp_path: Path, private: StudyPlan) -> Path:
    entries = [
        Reservation(
            study=study * 64, round_=n, event=event_of(private, steps=5), delta=1e-4, when=NOON
        )
        for n, study in enumerate("aab")
    ]
    file = tmp_path / "ledger.jsonl"
    file.write_text("".join(entry.model_dump_json() + "\n" for entry in entries))
    return file


def test_a_ledgers_epsilon_is_computed_again(ledger: Path, private: StudyPlan) -> None:
    told = CliRunner().invoke(app, ["epsilon", str(ledger), "--delta", "1e-3", "--json"])

    def cost(steps: int) -> float:
        return epsilon((event_of(private, steps=steps),), delta=1e-3)

    assert json.loads(told.stdout) == {
        "unit": "patient",
        "studies": {
            "a" * 64: {"epsilon": cost(10), "delta": 1e-3},
            "b" * 64: {"epsilon": cost(5), "delta": 1e-3},
        },
        "lifetime": {"epsilon": cost(15), "delta": 1e-3},
        "noise_shares": 1,
    }
    plain = CliRunner().invoke(app, ["epsilon", str(ledger), "--delta", "1e-3"])
    assert f"all studies         epsilon {cost(15):.4f}" in plain.stdout
    assert "at delta 0.001" in plain.stdout
    assert "per patient" in plain.stdout


def test_a_ledgers_epsilon_is_stated_at_the_delta_agreed(ledger: Path, private: StudyPlan) -> None:
    told = CliRunner().invoke(app, ["epsilon", str(ledger)])
    cost = epsilon((event_of(private, steps=15),), delta=1e-4)
    assert f"all studies         epsilon {cost:.4f} at delta 0.0001" in told.stdout


@pytest.mark.parametrize("delta", ["0", "1", "-1", "nan", "x"])
def test_a_delta_that_is_none_is_wrong_usage(ledger: Path, delta: str) -> None:
    assert CliRunner().invoke(app, ["epsilon", str(ledger), "--delta", delta]).exit_code == 2


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from shared_models.audit import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("content", "exit_code"), [(None, 12), (b"{", 16), (b"{}\n", 16)])
def test_a_broken_ledger_is_one_sentence_and_its_exit_code(
    tmp_path: Path, content: bytes | None, exit_code: int
) -> None:
    if content is not None:
        (tmp_path / "ledger.jsonl").write_bytes(content)
    told = command("epsilon", str(tmp_path / "ledger.jsonl"))
    assert told.returncode == exit_code
    assert len(told.stderr.splitlines()) == 1
    assert told.stdout == ""


def test_an_attempt_twice_in_a_ledger_is_named_by_its_line(ledger: Path) -> None:
    ledger.write_text(ledger.read_text() + ledger.read_text().splitlines()[0] + "\n")
    told = command("epsilon", str(ledger))
    assert told.returncode == 16
    assert told.stderr == "line 4 of the ledger repeats or skips an attempt\n"


def test_an_auditor_needs_neither_torch_nor_flower() -> None:
    code = (
        "import sys, shared_models.audit;"
        "sys.exit(bool({'torch', 'flwr', 'monai', 'opacus'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_balance_says_what_a_split_noise_rests_on() -> None:
    from shared_models.terminal import balance

    event = PrivacyEvent(
        sample_rate=0.1,
        noise_multiplier=2.0,
        max_grad_norm=1.0,
        images_per_patient=1,
        steps=3,
        noise_shares=4,
    )
    entry = Reservation(
        study="1" * 64, round_=0, event=event, delta=1e-4, when=datetime(2026, 1, 1, tzinfo=UTC)
    )
    alone = entry.model_copy(update={"event": event.model_copy(update={"noise_shares": 1})})
    assert "as long as 4 of them" in balance([alone, entry], as_json=False)
    assert "as long as" not in balance([alone], as_json=False)

"""``consilia-audit``: verify a run and its ledgers offline, trusting neither side.

It needs no torch and no Flower, and nothing but the files. Epsilons, digests and signatures are
computed again; metrics are the parties' own word.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from shared_models import journal
from shared_models import plan as plans
from shared_models.contracts import (
    AuditReport,
    Contract,
    Countersignature,
    FingerprintReport,
    JournalLine,
    PrivacyStatement,
    ReleaseManifest,
    RoundRecord,
    SignedCheckpoint,
    StudyReport,
)
from shared_models.errors import EXIT_CODES_HELP, DocumentError
from shared_models.fingerprint import faults as fingerprint_faults
from shared_models.fingerprint import summed
from shared_models.plan import SignedPlan, StudyPlan, event_of, planned_events
from shared_models.privacy import epsilon, parse_ledger
from shared_models.signing import digest, is_signed_by
from shared_models.weights import digest as weights_digest
from shared_models.weights import flatten, load

app = typer.Typer(
    help="Verify runs, ledgers and reports offline, trusting neither coordinator nor hospital.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Finding = tuple[str, bool]
AnyContract = TypeVar("AnyContract", bound=Contract)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A finished run's folder, or a site's.")],
    key: Annotated[str | None, typer.Option(help="The public key a site has to sign with.")] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="A site's signed checkpoint, kept elsewhere; .jsonl: one a line."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a run: signatures, approvals, every epsilon, the model's digest. Exit 0: all hold.

    Of a fingerprint: what it cost, and that no count tells of too few.

    Of a site (a folder with a site.toml): its journal, its ledger, its people's decisions and the
    coordinator's receipts, one against the other.
    """
    if (folder / "site.toml").exists():
        found = audit_site(folder, key=key, checkpoints=tuple(checkpoint or ()))
    elif key is not None or checkpoint:
        raise typer.BadParameter("--key and --checkpoint are of a site; there is no site.toml")
    elif (folder / "fingerprint.json").exists():
        found = audit_fingerprint(folder)
    else:
        found = audit_run(folder)
    if as_json:
        print(found.model_dump_json())
    else:
        for text in found.passed:
            print(f"  holds  {text}")
        for text in found.failed:
            print(f"  FAILS  {text}")
        print("verified" if not found.failed else f"{len(found.failed)} checks failed")
    raise typer.Exit(1 if found.failed else 0)


@app.command("epsilon")
def epsilon_of_ledger(
    ledger: Annotated[Path, typer.Argument(help="A site's ledger.jsonl.")],
    delta: Annotated[
        float | None, typer.Option(help="State all at this delta; else at the studies' own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute again what each study, and all together, cost a site's patients."""
    from shared_models.terminal import balance

    try:
        entries = parse_ledger(ledger.read_bytes()).reservations
    except OSError as error:
        raise DocumentError(f"cannot read {ledger}: {type(error).__name__}") from error
    if delta is not None and not 0 < delta < 1:
        raise typer.BadParameter(f"expected delta in (0, 1), got {delta}")
    print(balance(entries, as_json=as_json, delta=delta))


def audit_run(run_dir: Path) -> AuditReport:
    """Return every check of a run directory with its verdict.

    Raises:
        DocumentError: if a file a run must have cannot be read at all.
    """
    signed = plans.read(run_dir / "plan.toml")
    report = _parsed(run_dir / "report.json", StudyReport.model_validate_json)
    records = _parsed(run_dir / "rounds.jsonl", _records)
    findings = [
        *_plan_findings(signed, report),
        *_approval_findings(run_dir, signed, records),
        *_privacy_findings(signed.plan, records, report),
        *_model_findings(run_dir, records, report),
    ]
    return _report(digest(signed.plan), findings)


def audit_fingerprint(run_dir: Path) -> AuditReport:
    """Return every check of a fingerprint's run directory with its verdict.

    Raises:
        DocumentError: if a file it must have cannot be read at all.
    """
    signed = plans.read(run_dir / "plan.toml")
    plan = signed.plan
    if plan.fingerprint is None:
        raise DocumentError("the plan asks for no fingerprint; fingerprint.json is of another one")
    report = _parsed(run_dir / "fingerprint.json", FingerprintReport.model_validate_json)
    records = _parsed(run_dir / "rounds.jsonl", _records)
    is_signed = is_signed_by(plan, signed.signature, key=plan.coordinator)
    asked = [record for record in records if record.kind == "fingerprint"]
    told = [reply.fingerprint for reply in report.replies if reply.fingerprint is not None]
    number = sum(reply.num_patients for reply in report.replies)
    is_whole = len(told) == len(report.replies) and report.total == summed(told)
    findings = [
        ("the plan is signed by its coordinator", is_signed),
        ("the fingerprint is of this plan", report.study == digest(plan)),
        ("the plan printed with it is the signed one", _is_of(report.plan_toml, plan)),
        ("nothing was asked under it but the fingerprint", len(asked) == len(records)),
        ("the replies are those of rounds.jsonl", [r.replies for r in asked] == [report.replies]),
        ("the sum is that of the replies", is_whole and report.num_patients == number),
        *_approval_findings(run_dir, signed, records),
        *_told_findings(plan, report),
    ]
    return _report(digest(plan), findings)


def _told_findings(plan: StudyPlan, report: FingerprintReport) -> Iterator[Finding]:
    """Check of each site what its histograms tell, and what that cost."""
    for reply in report.replies:
        found, privacy, site = reply.fingerprint, reply.privacy, reply.site
        if found is None:
            yield f"{site}: it told a fingerprint", False
            continue
        wrong = fingerprint_faults(found, plan, num_patients=reply.num_patients)
        text = "its histograms are those the plan asks for, and tell of nobody by themselves"
        yield f"{site}: {wrong[0] if wrong else text}", not wrong
        if plan.privacy is None:
            yield f"{site}: a fingerprint without privacy claims none", privacy is None
            continue
        least = epsilon(planned_events(plan), delta=plan.privacy.delta)
        stated = None if privacy is None else privacy.epsilon
        is_covered = stated is not None and least <= stated <= plan.privacy.epsilon
        yield f"{site}: epsilon {stated or 0:g} covers {least:g}, within the plan's", is_covered
        is_stated = privacy is not None and _is_statement_of(privacy, plan)
        yield f"{site}: the stated mechanism is the plan's", is_stated


def _is_statement_of(privacy: PrivacyStatement, plan: StudyPlan) -> bool:
    (event,) = planned_events(plan)
    delta = None if plan.privacy is None else plan.privacy.delta
    stated = (privacy.sampler, privacy.sample_rate, privacy.noise_multiplier, privacy.max_grad_norm)
    done = (event.sampler, event.sample_rate, event.noise_multiplier, event.max_grad_norm)
    return stated == done and (privacy.delta, privacy.noise_shares) == (delta, 1)


def audit_site(
    site_dir: Path, *, key: str | None = None, checkpoints: tuple[Path, ...] = ()
) -> AuditReport:
    """Return every check of a site's journal, ledger, decisions and receipts with its verdict.

    Raises:
        DocumentError: if the site.toml, the journal, a decision, a receipt or a checkpoint cannot
            be read at all.
        LedgerError: if the ledger cannot be read whole.
    """
    try:
        site = tomllib.loads(plans.read_text(site_dir / "site.toml"))
        name, state_dir = str(site["name"]), site_dir / str(site["state_dir"])
        coordinator = str(site.get("coordinator", ""))
        content = (state_dir / journal.FILE).read_bytes()
        ledger = parse_ledger(_bytes(state_dir / "ledger.jsonl"))
    except (OSError, ValueError, LookupError) as error:
        raise DocumentError(f"cannot read the site's journal: {type(error).__name__}") from error
    chain = journal.follow(content, key=key, site=name)
    whose = "the key the auditor gave" if key else "the key its first entry states"
    checks = {
        f"the journal's entries follow one another, signed with {whose}": (
            [] if chain.fault is None else [chain.fault]
        ),
        "the journal and the ledger agree": list(journal.ledger_faults(chain.lines, ledger)),
    }
    if chain.lines:
        checks |= _decision_checks(state_dir, chain.lines)
    receipts = _lines(state_dir / journal.RECEIPTS, journal.Receipted)
    if receipts:
        found = journal.receipt_faults(chain.lines, receipts, coordinator=coordinator, key=key)
        checks[f"the journal holds all that {len(receipts)} receipts know of"] = list(found)
    points = [point for file in checkpoints for point in _checkpoints(file)]
    if points:
        faults = list(journal.checkpoint_faults(chain.lines, points, key=key))
        checks[f"the journal holds all that {len(points)} checkpoints know of"] = faults
    findings = [
        finding
        for text, faults in checks.items()
        for finding in ([(fault, False) for fault in faults] or [(text, True)])
    ]
    return _report(name, findings)


def _decision_checks(state_dir: Path, lines: Sequence[JournalLine]) -> dict[str, list[str]]:
    """Return what is wrong with the decisions kept at a site, under the check's name."""
    faults, number = list[str](), 0
    for folder in sorted((state_dir / "studies").glob("*/")):
        decisions = _lines(folder / "decisions.jsonl", Countersignature)
        file = folder / "approval.json"
        standing = _parsed(file, Countersignature.model_validate_json) if file.exists() else None
        number += len({*decisions, *([standing] if standing else [])})
        faults += journal.decision_faults(
            lines, folder.name, decisions=decisions, standing=standing
        )
    name = f"{number} decisions about studies are this site's and journalled"
    return {name: faults} if number else {}


def _checkpoints(file: Path) -> list[SignedCheckpoint]:
    if file.suffix == ".jsonl":
        return _lines(file, SignedCheckpoint)
    return [_parsed(file, SignedCheckpoint.model_validate_json)]


def _lines(file: Path, contract: type[AnyContract]) -> list[AnyContract]:
    """Read whole lines; what stands after the last line end was never told to anybody."""
    whole, _, _ = _bytes(file).rpartition(b"\n")
    try:
        return [contract.model_validate_json(line) for line in whole.splitlines()]
    except ValidationError as error:
        raise DocumentError(f"{file.name} cannot be read; restore it from a copy") from error


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _report(subject: str, findings: list[Finding]) -> AuditReport:
    return AuditReport(
        subject=subject,
        passed=tuple(text for text, holds in findings if holds),
        failed=tuple(text for text, holds in findings if not holds),
    )


def _plan_findings(signed: SignedPlan, report: StudyReport) -> Iterator[Finding]:
    plan = signed.plan
    is_signed = is_signed_by(plan, signed.signature, key=plan.coordinator)
    yield "the plan is signed by its coordinator", is_signed
    yield "the report is of this plan", report.study == digest(plan)
    yield "the plan printed in the report is the signed one", _is_of(report.plan_toml, plan)
    named = [site.name for site in report.sites]
    yield "the report speaks of every site of the plan", named == list(plan.sites)


def _is_of(text: str, plan: StudyPlan) -> bool:
    try:
        return plans.parse(text).plan == plan
    except DocumentError:
        return False


def _approval_findings(
    run_dir: Path, signed: SignedPlan, records: list[RoundRecord]
) -> Iterator[Finding]:
    """Check that every site that answered had approved the plan, whatever it decided later."""
    settings = _parsed(run_dir / "run.json", json.loads)
    answered = {reply.site for record in records for reply in record.replies}
    for site in (site for site in signed.plan.sites if site in answered):
        try:
            key = str(settings["sites"][site]["signing"])
        except (LookupError, TypeError):
            yield f"{site} approved this plan", False
            continue
        yield (
            f"{site} approved this plan",
            any(
                is_signed_by(one.approval, one.signature, key=key)
                and (one.approval.study, one.approval.site) == (digest(signed.plan), site)
                and one.approval.decision == "approved"
                for one in _decisions(run_dir / "approvals", site)
            ),
        )


def _decisions(folder: Path, site: str) -> Iterator[Countersignature]:
    """Yield what a site decided: its newest decision, and those before if they were kept."""
    for file in (folder / f"{site}.json", folder / f"{site}.jsonl"):
        try:
            content = file.read_bytes()
        except OSError:
            continue
        for text in content.splitlines() if file.suffix == ".jsonl" else [content]:
            try:
                yield Countersignature.model_validate_json(text)
            except ValidationError:
                continue


def _privacy_findings(
    plan: StudyPlan, records: list[RoundRecord], report: StudyReport
) -> Iterator[Finding]:
    if plan.privacy is None:
        claims = [s.name for s in report.sites if s.privacy is not None or s.epsilon is not None]
        yield "a study without privacy claims none", not claims
        return
    for site in report.sites:
        steps = _steps_answered(plan, records, site.name)
        if site.privacy is None:
            is_silent = steps == 0 and site.epsilon is None
            yield f"{site.name}: an epsilon is stated for what it trained", is_silent
            continue
        events = (event_of(plan, steps=steps),) if steps else ()
        least = epsilon(events, delta=plan.privacy.delta)
        stated = site.privacy.epsilon
        yield (
            f"{site.name}: epsilon {stated:g} covers the {steps} steps it answered",
            stated >= least,
        )
        yield (
            f"{site.name}: epsilon {stated:g} is within the plan's",
            stated <= plan.privacy.epsilon,
        )
        yield f"{site.name}: the stated mechanism is the plan's", _is_plans(site.privacy, plan)
        printed = (site.epsilon, site.delta) == (stated, site.privacy.delta)
        yield f"{site.name}: the epsilon printed is the one stated", printed


def _steps_answered(plan: StudyPlan, records: list[RoundRecord], site: str) -> int:
    """Return the fewest noisy steps the site must have taken to say what it said."""
    rounds = {"train": 1, "alone": plan.training.num_rounds, "evaluate": 0}
    said = [rounds[r.kind] for record in records for r in record.replies if r.site == site]
    return sum(said) * plan.training.steps_per_round


def _is_plans(privacy: PrivacyStatement, plan: StudyPlan) -> bool:
    terms, training = plan.privacy, plan.training
    return terms is not None and (
        privacy.noise_multiplier,
        privacy.max_grad_norm,
        privacy.sample_rate,
        privacy.images_per_patient,
        privacy.delta,
        privacy.noise_shares,
    ) == (
        terms.noise_multiplier,
        terms.max_grad_norm,
        training.sample_rate,
        training.images_per_patient,
        terms.delta,
        terms.noise_shares,
    )


#: Where the coordinator keeps what a task does not release.
WITHHELD = "withheld.safetensors"


def _model_findings(
    run_dir: Path, records: list[RoundRecord], report: StudyReport
) -> Iterator[Finding]:
    trained = [record for record in records if record.kind == "train"]
    last = trained[-1].weights_digest if trained else ""
    yield "the reported model is the last round's", report.model_digest == last
    manifest = _parsed(run_dir / "model" / "manifest.json", ReleaseManifest.model_validate_json)
    is_of_model = manifest.weights_digest == report.model_digest
    yield "the manifest is of this study", manifest.study == report.study and is_of_model
    stated = {site.name: site.privacy for site in report.sites if site.privacy is not None}
    yield "the manifest states the report's privacy", manifest.privacy == stated
    try:
        released = dict(load(run_dir / "model" / manifest.weights_file))
        rest = dict(load(run_dir / WITHHELD)) if manifest.parts else {}
    except (OSError, ValueError):
        released, rest = {}, {}
    whole = weights_digest(flatten(released | rest))
    yield "the released weights are the reported model", whole == report.model_digest
    if manifest.parts:
        is_stated = weights_digest(flatten(released)) == manifest.released_digest
        is_part = all(name.startswith(manifest.parts) for name in released)
        yield "only the parts that the task releases are released", is_stated and is_part
    curves = [(p.round_, p.seconds, p.received_bytes) for p in report.rounds]
    told = [(r.round_, r.seconds, r.received_bytes) for r in trained]
    yield "the report's rounds are those of rounds.jsonl", curves == told


def _records(lines: str) -> list[RoundRecord]:
    return [RoundRecord.model_validate_json(line) for line in lines.splitlines()]


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(plans.read_text(file))
    except ValueError as error:
        raise DocumentError(
            f"{file.name} cannot be read; the run is unfinished or broken"
        ) from error


def main() -> None:
    """Run the command line; a known error is told in its own words, with its exit code."""
    from shared_models.terminal import run_app

    run_app(app)


if __name__ == "__main__":
    main()

"""A study from its run directory to its report, whoever carries the letters.

Guarantees:
    Killed at any instant and run again, a study goes on where it was.
    A finished study is not run again.
    Two coordinators do not run one study at once.
    Who has approved is read again before each round; an expired plan or too few end the run.

Design: what was done is read from the run directory, at the start as at the end, so that the report
of a resumed run is made as that of an undisturbed one. ``failed.txt`` is for what a person must put
right; a process that dies of anything else may be started again as it is (``server/conduct.py``).
"""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from server import report, rounds, store
from server.release import release
from server.rounds import Ask, Circle, Consortium
from server.start import initial_weights
from server.validate import Validator, final_report, open_validator, validate
from shared_models import tasks
from shared_models.allowlists import STRATEGIES, objections
from shared_models.contracts import (
    OrderKind,
    RoundPoint,
    RoundRecord,
    SiteReply,
    SiteResult,
    StudyReport,
    ValidationReport,
)
from shared_models.errors import ConsiliaError, DocumentError, RunError
from shared_models.plan import SignedPlan, StudyPlan, render
from shared_models.registry import find
from shared_models.signing import digest, load_key
from shared_models.weights import Weights, stowed

log = logging.getLogger(__name__)

PERSONAL_NOTE = (
    "Layers of this model stay with each hospital. What is said of a hospital is of the model with "
    "its own layers; the global validation and the released weights have the first ones instead."
)
SOFTWARE = ("consilia", "flwr", "torch", "monai", "opacus", "dp-accounting", "numpy")


def run(run_dir: Path, connect: Callable[[Circle], Ask]) -> StudyReport:
    """Run the study of ``run_dir``, or what is left of it, and leave its model and report there.

    Args:
        run_dir: see ``store.py``.
        connect: from the sites to what carries letters to them.

    Raises:
        MachineError: if another process runs it.
        ConsiliaError: with what a person should know; the same stands in ``failed.txt``.
    """
    with store.lock(run_dir):
        store.forget_failure(run_dir)
        try:
            return _finished(run_dir) or _run(run_dir, connect)
        except ConsiliaError as error:
            store.write_failure(run_dir, error.objections)
            raise


def _run(run_dir: Path, connect: Callable[[Circle], Ask]) -> StudyReport:
    started = time.monotonic()
    signed, settings = store.read_plan(run_dir), store.read_settings(run_dir)
    plan = signed.plan
    found = objections(plan, today=datetime.now(UTC).date())
    if found:
        raise ConsiliaError(found)
    before = records_of(run_dir, plan)
    expected = frozenset(standing(run_dir, signed).sites)
    validator = open_validator(plan, settings)
    keys = {site: settings.sites[site].node or "" for site in plan.sites if site in settings.sites}
    ask = connect(Circle(keys, expected, plan.rounds.quorum))
    weights = _rounds(
        run_dir, plan, ask, standing=lambda: standing(run_dir, signed), validator=validator
    )
    first = initial_weights(plan, validator.task, run_dir)
    final = final_report(validator, weights, first=first)
    seconds = time.monotonic() - started + sum(record.seconds for record in before)
    finished = _report(signed, settings, store.read_rounds(run_dir), final, seconds=seconds)
    shutil.rmtree(run_dir / "model", ignore_errors=True)  # by a run killed before its report
    manifest = release(
        run_dir / "model",
        signed,
        weights,
        validation=final,
        sites=finished.sites,
        key=load_key(settings.signing_key),
        modalities=validator.modalities,
        parts=validator.task.released,
    )
    finished = finished.model_copy(update={"model_bytes": manifest.num_parameters * 4})
    report.write(finished, run_dir)
    store.drop_checkpoints(run_dir)
    return finished


def standing(run_dir: Path, signed: SignedPlan) -> Consortium:
    """Read who takes part from now on: the sites whose approvals are on file at this moment.

    Raises:
        RunError: if the plan has expired, or they are fewer than it needs.
    """
    plan, settings = signed.plan, store.read_settings(run_dir)
    if plan.expires < datetime.now(UTC).date():
        raise RunError(
            f"the plan expired on {plan.expires}, so no more orders go out; "
            "let the sites approve a new plan"
        )
    approving = store.approvals(run_dir, signed, settings)
    absent = tuple(site for site in sorted(plan.sites) if site not in approving)
    if len(approving) < plan.rounds.quorum:
        raise RunError(
            [
                f"{len(approving)} sites have approved the plan, it needs {plan.rounds.quorum}; "
                "ask the others to run consilia-site approve, then run the study again",
                *(f"{site}: no approval on file" for site in absent),
            ]
        )
    keys = {site: settings.sites[site].signing for site in approving}
    return Consortium(load_key(settings.signing_key), keys, approving, absent)


def _finished(run_dir: Path) -> StudyReport | None:
    """Return the report of a study that has one, with all that should stand or not beside it."""
    if not (run_dir / report.JSON_NAME).exists():
        return None
    found = report.read(run_dir / report.JSON_NAME)
    if not (run_dir / report.HTML_NAME).exists():
        report.write(found, run_dir)
    store.drop_checkpoints(run_dir)
    return found


def records_of(run_dir: Path, plan: StudyPlan) -> list[RoundRecord]:
    """Return what was recorded before this run, and insist that it is of ``plan``."""
    records = store.read_rounds(run_dir)
    said = {each.study for record in records for each in record.replies}
    said |= {each.study for record in records for each in record.refusals}
    if said - {digest(plan)}:
        raise DocumentError(
            f"{run_dir / store.ROUNDS} is of another plan; run this one in a new folder"
        )
    return records


def _rounds(
    run_dir: Path,
    plan: StudyPlan,
    ask: Ask,
    *,
    standing: Callable[[], Consortium],
    validator: Validator,
) -> Weights:
    """Run the rounds that are left, then the final evaluation and, if planned, training alone."""
    first = stowed(initial_weights(plan, validator.task, run_dir), folder=run_dir)
    done = store.read_rounds(run_dir)
    weights = _trained(run_dir, plan, first, ask, done=done, standing=standing, validator=validator)
    tail: list[tuple[OrderKind, Weights]] = [("evaluate", weights)]
    tail += [("alone", first)] if plan.compare_alone else []
    for kind, sent in tail:
        if kind not in {record.kind for record in done}:
            record = rounds.ask_all(plan, sent, ask, kind=kind, consortium=standing())
            store.append_round(run_dir, record)
    return weights


def _trained(
    run_dir: Path,
    plan: StudyPlan,
    first: Weights,
    ask: Ask,
    *,
    done: Sequence[RoundRecord],
    standing: Callable[[], Consortium],
    validator: Validator,
) -> Weights:
    """Run the training rounds that are not ``done``, and return the weights to release."""
    since = store.read_progress(run_dir, done)
    if since is not None:
        log.info("going on after round %d", since.num_rounds)
    weights = first if since is None else since.average
    for round_ in rounds.run(
        plan,
        first,
        ask,
        consortium=standing,
        strategy=find("strategies", plan.strategy.name, builtin=STRATEGIES)(**plan.strategy.params),
        validate=lambda new: validate(validator, new),
        since=since,
        attempts=store.attempts(run_dir),
        folder=run_dir,
    ):
        weights = round_.released
        store.commit_round(run_dir, round_.record, round_.progress)
        log.info("round %d: %d sites", round_.record.round_ + 1, len(round_.record.replies))
    return weights


def _report(
    signed: SignedPlan,
    settings: store.RunSettings,
    records: list[RoundRecord],
    final: ValidationReport,
    *,
    seconds: float,
) -> StudyReport:
    plan = signed.plan
    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN)(**plan.task.params)
    return StudyReport(
        study=digest(plan),
        name=plan.name,
        purpose=plan.purpose,
        description=plan.description,
        task=plan.task.name,
        headline=task.headline,
        created=datetime.now(UTC),
        seed=plan.seed,
        data=settings.data,
        plan_toml=render(plan, signed.signature),
        software={
            "python": platform.python_version(),
            **{name: version(name) for name in SOFTWARE},
        },
        is_private=plan.privacy is not None,
        sites=tuple(_site_result(site, plan, records) for site in plan.sites),
        rounds=tuple(_point(record) for record in records if record.kind == "train"),
        global_=final,
        model_digest=final.weights_digest,
        model_bytes=0,
        seconds=round(seconds, 1),
        notes=settings.notes + ((PERSONAL_NOTE,) if plan.training.personal else ()),
    )


def _site_result(site: str, plan: StudyPlan, records: list[RoundRecord]) -> SiteResult:
    """Gather what one site said over the study."""
    said = [reply for record in records for reply in record.replies if reply.site == site]
    last = _last(said, "evaluate")
    alone = _last(said, "alone")
    privacy = next((reply.privacy for reply in reversed(said) if reply.privacy), None)
    evaluation = last.evaluation if last else None
    apart = alone.evaluation if alone else None
    return SiteResult(
        name=site,
        num_patients=max((reply.num_patients for reply in said), default=0),
        metrics=evaluation.metrics if evaluation else {},
        intervals=evaluation.intervals if evaluation else {},
        num_test_patients=evaluation.num_patients if evaluation else 0,
        alone=apart.metrics if apart else None,
        alone_intervals=apart.intervals if apart else {},
        epsilon=privacy.epsilon if privacy else None,
        delta=privacy.delta if privacy else None,
        unit=privacy.unit if privacy else None,
        privacy=privacy,
        refusals=tuple(r for record in records for r in record.refusals if r.site == site),
    )


def _point(record: RoundRecord) -> RoundPoint:
    evaluated = {r.site: r.evaluation.metrics for r in record.replies if r.evaluation}
    losses = {r.site: r.train_loss for r in record.replies if r.train_loss is not None}
    return RoundPoint(
        round_=record.round_,
        validation=record.validation.metrics if record.validation else {},
        sites=evaluated,
        train_loss=losses,
        seconds=record.seconds,
        slowest_site_seconds=max((r.seconds for r in record.replies), default=0.0),
        sent_bytes=record.sent_bytes,
        received_bytes=record.received_bytes,
        refused={r.site: r.code for r in record.refusals},
    )


def _last(said: list[SiteReply], kind: str) -> SiteReply | None:
    return next((reply for reply in reversed(said) if reply.kind == kind), None)

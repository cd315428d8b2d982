"""A fingerprint study from its run directory to ``fingerprint.json``, whoever carries the letters.

One round: every site that approved is asked for its histograms; they are added up, and what follows
from the sum is proposed (``server.geometry``).

Guarantees:
    Histograms that are not those the plan asks for are refused, and their site is named.
    Killed at any instant and run again, nothing is counted anew: what was told is on disk, or told
    again.
    Fewer sites than the quorum give no fingerprint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table

from server import rounds, store
from server.geometry import cell_at, deviation
from server.rounds import Ask, Circle
from server.study import records_of, standing
from shared_models.allowlists import objections
from shared_models.contracts import FingerprintReport, Refusal, RoundRecord, SiteReply
from shared_models.errors import ConsiliaError, DocumentError, RunError
from shared_models.files import replace
from shared_models.fingerprint import Layout, faults, layouts, summed
from shared_models.plan import SignedPlan, StudyPlan, parse, read_text, render
from shared_models.signing import digest

log = logging.getLogger(__name__)


def run(run_dir: Path, connect: Callable[[Circle], Ask]) -> FingerprintReport:
    """Ask for the fingerprint of the study in ``run_dir`` and leave it there.

    Raises:
        MachineError: if another process runs it.
        ConsiliaError: with what a person should know; the same stands in ``failed.txt``.
    """
    with store.lock(run_dir):
        store.forget_failure(run_dir)
        try:
            return read(run_dir) if store.has_fingerprint(run_dir) else _run(run_dir, connect)
        except ConsiliaError as error:
            store.write_failure(run_dir, error.objections)
            raise


def read(run_dir: Path) -> FingerprintReport:
    """Read ``fingerprint.json``.

    Raises:
        DocumentError: if there is none, or it cannot be read.
    """
    try:
        return FingerprintReport.model_validate_json(read_text(run_dir / store.FINGERPRINT))
    except ValidationError as error:
        raise DocumentError(f"{run_dir / store.FINGERPRINT} cannot be read") from error


def table(report: FingerprintReport) -> Table:
    """Return the histograms as people read them: all patients', and how far sites' medians go."""
    plan = parse(report.plan_toml).plan
    shown = Table()
    shown.add_column("", no_wrap=True)
    for head in ("10 %", "median", "90 %", "medians of sites"):
        shown.add_column(head, justify="right")
    each = [reply.fingerprint for reply in report.replies if reply.fingerprint is not None]
    of_all, of_one = (deviation(plan, num_sites=n) for n in (len(each), 1))
    for number, layout in enumerate(layouts(plan)):
        counts = report.total.histograms[number].counts
        if layout.names:
            whole = (max(0, round(count)) for count in counts)
            words = [f"{name} {n}" for name, n in zip(layout.names, whole, strict=True)]
            shown.add_row(title(layout, plan), "", ", ".join(words), "", "")
            continue
        cells = [cell_at(counts, share, deviation=of_all) for share in (0.1, 0.5, 0.9)]
        theirs = [one.histograms[number].counts for one in each]
        medians = sorted(cell_at(one, 0.5, deviation=of_one) for one in theirs)
        ends = [_in_words(layout, cell) for cell in dict.fromkeys((medians[0], medians[-1]))]
        words = [_in_words(layout, cell) for cell in cells]
        shown.add_row(title(layout, plan), *words, " to ".join(ends))
    return shown


def protection(report: FingerprintReport) -> str:
    """Return what keeps the counts from telling of a patient, in words."""
    said = [reply.privacy for reply in report.replies if reply.privacy is not None]
    if said:
        cost, delta = max(one.epsilon for one in said), max(one.delta for one in said)
        return f"noised: epsilon {cost:g} per patient at delta {delta:g}"
    return f"no count of fewer than {report.total.min_cell}; this is not differential privacy"


def title(layout: Layout, plan: StudyPlan) -> str:
    """Return what a histogram is of, in words."""
    what, _, which = layout.name.partition("-")
    if what == "percentile" and plan.fingerprint is not None:
        asked = plan.fingerprint.intensity
        return "" if asked is None else f"intensity at {asked.percentiles[int(which)]:g} %"
    if what == "class" and which:
        classes = plan.task.params["classes"]
        return f"with {classes[int(which) - 1]}" if isinstance(classes, tuple) else layout.name
    units = {"spacing": "spacing (mm)", "extent": "extent (mm)", "size": "size (voxels)"}
    return f"{units[what]} along {which}" if what in units else what


def _run(run_dir: Path, connect: Callable[[Circle], Ask]) -> FingerprintReport:
    signed, settings = store.read_plan(run_dir), store.read_settings(run_dir)
    plan = signed.plan
    found = objections(plan, today=datetime.now(UTC).date())
    if found:
        raise ConsiliaError(found)
    done = records_of(run_dir, plan)
    if not done:
        consortium = standing(run_dir, signed)
        known = [site for site in plan.sites if site in settings.sites]
        keys = {site: settings.sites[site].node or "" for site in known}
        ask = connect(Circle(keys, frozenset(consortium.sites), plan.rounds.quorum))
        asked = rounds.ask_all(plan, {}, ask, kind="fingerprint", consortium=consortium)
        done = [believed(asked, plan)]
        if len(done[0].replies) < plan.rounds.quorum:
            raise RunError(list(_shortfall(done[0], plan)))
        store.append_round(run_dir, done[0])
    record = done[0]
    report = report_of(signed, record)
    replace(run_dir / store.FINGERPRINT, report.model_dump_json(indent=2).encode())
    log.info("fingerprint: %d sites", len(record.replies))
    return report


def believed(record: RoundRecord, plan: StudyPlan) -> RoundRecord:
    """Return ``record`` with every reply that is not as the plan asks turned into a refusal."""
    good, bad = list[SiteReply](), list[Refusal]()
    for reply in record.replies:
        found = _faults(reply, plan)
        if not found:
            good.append(reply)
            continue
        log.warning("site %s: %s", reply.site, found[0])
        bad.append(
            Refusal(
                study=reply.study,
                round_=reply.round_,
                kind=reply.kind,
                site=reply.site,
                code="bad-reply",
            )
        )
    refusals = (*record.refusals, *bad)
    return record.model_copy(update={"replies": tuple(good), "refusals": refusals})


def report_of(signed: SignedPlan, record: RoundRecord) -> FingerprintReport:
    """Return what ``fingerprint.json`` holds of a round in which at least one site replied."""
    told = [reply.fingerprint for reply in record.replies if reply.fingerprint is not None]
    return FingerprintReport(
        study=digest(signed.plan),
        name=signed.plan.name,
        plan_toml=render(signed.plan, signed.signature),
        created=datetime.now(UTC),
        replies=record.replies,
        refusals=record.refusals,
        total=summed(told),
        num_patients=sum(reply.num_patients for reply in record.replies),
        seconds=record.seconds,
    )


def _faults(reply: SiteReply, plan: StudyPlan) -> list[str]:
    if reply.fingerprint is None:
        return ["it told no fingerprint"]
    if not 1 <= reply.num_patients <= rounds.MOST_PATIENTS:
        return [f"expected from 1 to {rounds.MOST_PATIENTS} patients"]
    return faults(reply.fingerprint, plan, num_patients=reply.num_patients)


def _shortfall(record: RoundRecord, plan: StudyPlan) -> Iterator[str]:
    asked = len(record.replies) + len(record.refusals)
    yield (
        f"fingerprint: {len(record.replies)} of {asked} sites, the plan needs {plan.rounds.quorum}"
    )
    yield from (f"{refusal.site}: {refusal.code}" for refusal in record.refusals)


def _in_words(layout: Layout, cell: int) -> str:
    if cell == 0:
        return f"< {layout.edges[0]:g}"
    is_last = cell == layout.num_cells - 1
    return f">= {layout.edges[-1]:g}" if is_last else f"{layout.middle(cell):.3g}"

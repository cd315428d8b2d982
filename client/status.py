"""How this hospital's site stands, as one value: what ``consilia-site status`` and the page show.

Everything here is of studies, orders and money that is privacy; nothing is of a patient, and no
path, address or free text of anybody is in it.

Guarantees:
    Nothing is written to the site by looking at it.
    No value of the manifest, no path, and no description or note is in the status.
    What is not known is said to be so, never left to look well.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from client import ledger, studies, supervisor, visits
from client.certificate import days_left
from client.config import SiteConfig
from client.confinement import STEPS
from client.running import is_running
from client.studies import Known
from shared_models import journal
from shared_models.contracts import (
    REFUSALS,
    Contract,
    Count,
    DecisionReason,
    Digest,
    JournalEntry,
    JournalLine,
    Name,
    NonNegative,
    OrderKind,
    Probability,
    PublicKey,
    RefusalCode,
    SiteName,
    StudyState,
)
from shared_models.errors import DocumentError, LedgerError
from shared_models.plan import Purpose, StudyPlan, planned_events
from shared_models.privacy import Ledger, epsilon, spent
from shared_models.signing import public_key

ACCOUNTANT = "dp_accounting PLD, pessimistic"
MOST_EVENTS = 200  # shown one by one; all are counted
LATE_S = 300.0
NO_CERTIFICATE = "The site's certificate cannot be read: the coordinator cannot be told anything."
FEW_DAYS, FEW_MB, NEARLY_SPENT = 14, 2048, 0.9


class Cost(Contract):
    """An epsilon per patient of what was charged, and how much of it there may be."""

    epsilon: NonNegative
    limit: NonNegative
    delta: Probability | None
    unit: Literal["patient"] = "patient"
    accountant: str = ACCOUNTANT
    sampler: Literal["poisson"] = "poisson"
    noise_shares: Count = 1

    @property
    def left(self) -> float:
        """What may still be charged."""
        return max(self.limit - self.epsilon, 0.0)

    @property
    def share(self) -> float:
        """How much of the limit is charged, from 0 to 1."""
        return min(self.epsilon / self.limit, 1.0) if self.limit else 1.0


class Charged(Contract):
    """What a study had cost a patient once a round was charged."""

    round_: Count
    kind: OrderKind
    epsilon: NonNegative


class Sent(Contract):
    """How much left for a study in one round."""

    round_: Count
    size_bytes: Count


class Left(Contract):
    """A reply that was handed over to leave the building: when, what for, how large."""

    when: datetime
    study: Digest
    name: str
    round_: Count
    kind: OrderKind
    size_bytes: Count
    digest: Digest


class Refused(Contract):
    """An order this site did not obey, and why."""

    when: datetime
    study: Digest
    name: str
    round_: Count
    kind: OrderKind
    code: RefusalCode
    meaning: str


class StudyStatus(Contract):
    """One study at this site: what was decided, what it cost, what left for it."""

    study: Digest
    name: str
    purpose: Purpose
    task: Name
    net: Name
    sites: tuple[SiteName, ...]
    num_rounds: Count
    expires: date
    status: studies.Status
    who: str | None
    when: datetime | None
    reason: DecisionReason | None
    state: StudyState | None
    num_rounds_done: Count
    is_masked: bool
    cost: Cost | None
    planned_epsilon: NonNegative | None
    charged: tuple[Charged, ...]
    sent: tuple[Sent, ...]
    num_replies: Count
    num_refusals: Count
    sent_bytes: Count

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be trained for it."""
        return self.state == "finished" or self.status not in ("offered", "approved")


class JournalStatus(Contract):
    """Whether all that was asked, decided and sent stands in one unbroken, signed journal."""

    num_entries: Count
    last: datetime | None
    last_kind: str | None
    fault: str | None
    receipt_when: datetime | None
    receipt_index: Count | None
    num_receipts: Count


class Lacking(Contract):
    """A step that the worker could not take on this machine: why, and what would allow it."""

    step: Name
    why: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,40}$")]
    cure: str


class WorkerStatus(Contract):
    """What the process that reads images gave up when the agent last started one."""

    when: datetime
    given_up: tuple[Name, ...]
    lacking: tuple[Lacking, ...]


class Status(Contract):
    """Everything hospital staff are shown."""

    schema_version: Literal[1] = 1
    when: datetime
    name: SiteName
    coordinator: PublicKey
    is_running: bool
    last_visit: datetime | None
    certificate_days: int | None
    free_mb: Count
    lifetime: Cost | None
    studies: tuple[StudyStatus, ...]
    left: tuple[Left, ...]
    refused: tuple[Refused, ...]
    num_left: Count
    num_refused: Count
    sent_bytes: Count
    journal: JournalStatus
    worker: WorkerStatus | None = None
    attention: tuple[str, ...]


def gather(
    config: SiteConfig,
    *,
    key: Ed25519PrivateKey,
    now: datetime,
    certificate_days: int | None = None,
) -> Status:
    """Return how the site stands; a journal or ledger that is broken is part of the answer."""
    lines, charges, fault = _records(config, key)
    entries = [line.entry for line in lines]
    found = studies.known(config, key=key, today=now.date())
    names = {one.study: one.plan.name for one in found}
    left = [_left(e, names) for e in entries if e.kind == "reply"]
    refused = [_refused(e, names) for e in entries if e.kind == "refusal"]
    status = Status(
        when=now,
        name=config.name,
        coordinator=config.coordinator,
        is_running=is_running(config.state_dir),
        last_visit=visits.last_visit(config.state_dir),
        certificate_days=certificate_days,
        free_mb=_free_mb(config.state_dir),
        lifetime=None if charges is None else _cost(charges, config.policy.max_epsilon_lifetime),
        studies=tuple(_study(one, config, charges, entries) for one in found),
        left=tuple(reversed(left[-MOST_EVENTS:])),
        refused=tuple(reversed(refused[-MOST_EVENTS:])),
        num_left=len(left),
        num_refused=len(refused),
        sent_bytes=sum(one.size_bytes for one in left),
        journal=_journal_status(config, lines, fault),
        worker=_worker_status(config.state_dir),
        attention=(),
    )
    return status.model_copy(update={"attention": tuple(_attention(status))})


def _free_mb(state_dir: Path) -> int:
    folder = next(one for one in (state_dir, *state_dir.parents) if one.exists())
    return shutil.disk_usage(folder).free // 2**20


def _records(
    config: SiteConfig, key: Ed25519PrivateKey
) -> tuple[tuple[JournalLine, ...], Ledger | None, str | None]:
    """Return the journal's entries that hold, the ledger, and the first thing that is broken.

    The agent may write meanwhile, so that what is found broken is looked at again.
    """
    file = config.state_dir / journal.FILE
    for attempt in range(3):
        time.sleep(0.1 * attempt)
        content = file.read_bytes() if file.exists() else b""
        lines, fault = _verified(content, public_key(key), config.name) if content else ((), None)
        charges, ledger_fault = _ledger(config)
        if charges is not None:
            fault = fault or next(journal.ledger_faults(lines, charges), None)
        if fault is None and ledger_fault is None:
            break
    return lines, charges, fault or ledger_fault


def _ledger(config: SiteConfig) -> tuple[Ledger | None, str | None]:
    try:
        return ledger.read(config.state_dir), None
    except LedgerError as error:
        return None, str(error)


@lru_cache(maxsize=4)
def _verified(content: bytes, key: str, site: str) -> tuple[tuple[JournalLine, ...], str | None]:
    chain = journal.follow(content, key=key, site=site)
    return chain.lines, chain.fault


def _journal_status(
    config: SiteConfig, lines: Sequence[JournalLine], fault: str | None
) -> JournalStatus:
    receipts = _receipts(config.state_dir)
    if receipts is None:
        fault = fault or "the receipts cannot be read"
    elif fault is None:
        found = journal.receipt_faults(lines, receipts, coordinator=config.coordinator)
        fault = next(found, None)
    last = receipts[-1].receipt.receipt if receipts else None
    entry = lines[-1].entry if lines else None
    return JournalStatus(
        num_entries=len(lines),
        last=None if entry is None else entry.when,
        last_kind=None if entry is None else entry.kind,
        fault=fault,
        receipt_when=None if last is None else last.when,
        receipt_index=None if last is None else last.index,
        num_receipts=len(receipts or ()),
    )


def _worker_status(state_dir: Path) -> WorkerStatus | None:
    found = supervisor.told(state_dir)
    if found is None:
        return None
    lacking = found.confinement.lacking
    return WorkerStatus(
        when=found.when,
        given_up=tuple(step for step in STEPS if step not in lacking),
        lacking=tuple(Lacking(step=s, why=why, cure=STEPS[s][1]) for s, why in lacking.items()),
    )


def _receipts(state_dir: Path) -> list[journal.Receipted] | None:
    file = state_dir / journal.RECEIPTS
    whole, _, _ = (file.read_bytes() if file.exists() else b"").rpartition(b"\n")
    try:
        return [journal.Receipted.model_validate_json(line) for line in whole.splitlines()]
    except ValueError:
        return None


def _study(
    one: Known, config: SiteConfig, charges: Ledger | None, entries: Sequence[JournalEntry]
) -> StudyStatus:
    plan, decision, word = one.plan, one.decision, one.word
    of = [entry for entry in entries if entry.study == one.study]
    return StudyStatus(
        study=one.study,
        name=plan.name,
        purpose=plan.purpose,
        task=plan.task.name,
        net=plan.net.name,
        sites=plan.sites,
        num_rounds=plan.training.num_rounds,
        expires=plan.expires,
        status=one.status,
        who=None if decision is None else decision.who,
        when=None if decision is None else decision.when,
        reason=None if decision is None else decision.reason,
        state=None if word is None else word.state,
        num_rounds_done=0 if word is None else word.num_rounds_done,
        is_masked=plan.rounds.secure_aggregation,
        cost=_study_cost(one, config, charges),
        planned_epsilon=_planned(plan),
        charged=tuple(_charged(of)),
        sent=tuple(_sent(of)),
        num_replies=sum(entry.kind == "reply" for entry in of),
        num_refusals=sum(entry.kind == "refusal" for entry in of),
        sent_bytes=sum(entry.size_bytes or 0 for entry in of if entry.kind == "reply"),
    )


def _study_cost(one: Known, config: SiteConfig, charges: Ledger | None) -> Cost | None:
    if one.plan.privacy is None or charges is None:
        return None
    limit = min(config.policy.max_epsilon_per_study, one.plan.privacy.epsilon)
    return _cost(charges, limit, study=one.study)


def _cost(charges: Ledger, limit: float, *, study: str | None = None) -> Cost:
    counted = [c for c in charges.reservations if study is None or c.study == study]
    total = spent(counted)
    return Cost(
        epsilon=total.epsilon,
        limit=limit,
        delta=total.delta,
        noise_shares=max((entry.event.noise_shares for entry in counted), default=1),
    )


def _planned(plan: StudyPlan) -> float | None:
    if plan.privacy is None:
        return None
    cost = epsilon(planned_events(plan), delta=plan.privacy.delta)
    return cost if cost < float("inf") else None


def _charged(entries: Sequence[JournalEntry]) -> Iterator[Charged]:
    for entry in entries:
        if entry.kind == "reservation" and entry.epsilon is not None and entry.order_kind:
            yield Charged(round_=entry.round_ or 0, kind=entry.order_kind, epsilon=entry.epsilon)


def _sent(entries: Sequence[JournalEntry]) -> Iterator[Sent]:
    replies = [entry for entry in entries if entry.kind == "reply"]
    for round_ in sorted({entry.round_ or 0 for entry in replies}):
        sizes = [entry.size_bytes or 0 for entry in replies if entry.round_ == round_]
        yield Sent(round_=round_, size_bytes=sum(sizes))


def _left(entry: JournalEntry, names: dict[str, str]) -> Left:
    return Left.model_validate(
        {
            "name": names.get(entry.study or "", ""),
            **entry.model_dump(include={"when", "study", "round_", "size_bytes", "digest"}),
            "kind": entry.order_kind,
        }
    )


def _refused(entry: JournalEntry, names: dict[str, str]) -> Refused:
    return Refused.model_validate(
        {
            "name": names.get(entry.study or "", ""),
            **entry.model_dump(include={"when", "study", "round_", "code"}),
            "kind": entry.order_kind,
            "meaning": REFUSALS[entry.code or "failed"],
        }
    )


def _attention(status: Status) -> Iterator[str]:
    """Yield what somebody should see to, the gravest first, each as a sentence."""
    if status.journal.fault is not None:
        yield (
            f"The journal is broken at {status.journal.fault}. Nothing leaves before a person has "
            "looked: consilia-audit verify."
        )
    if status.lifetime is None:
        yield "The privacy ledger cannot be read. Nothing is trained before it is put right."
    elif status.lifetime.share >= NEARLY_SPENT:
        yield "The patients' lifetime budget is nearly spent: further rounds may be refused."
    if not status.is_running:
        yield "The agent is not running: no order is answered. Start it: consilia-site start."
    yield from _link_attention(status)
    for one in () if status.worker is None else status.worker.lacking:
        yield (
            f"The worker that reads images is not confined in its {one.step}: this machine does "
            f"not allow it ({one.why}). To cure that: {one.cure}."
        )
    if status.free_mb < FEW_MB:
        yield f"Only {status.free_mb} MB of disk are free where the site keeps its records."
    waiting = [one.name for one in status.studies if one.status == "offered"]
    if waiting:
        which = f"a study: {waiting[0]}" if len(waiting) == 1 else f"{len(waiting)} studies"
        yield f"The coordinator offers {which}. Nothing runs before this hospital approves it."


def _link_attention(status: Status) -> Iterator[str]:
    days, last = status.certificate_days, status.last_visit
    if days is not None and days < 0:
        yield "The site's certificate has expired: the coordinator cannot be told anything."
    elif days is not None and days < FEW_DAYS:
        yield f"The site's certificate expires in {days} days."
    if status.is_running and last is not None and (status.when - last).total_seconds() > LATE_S:
        yield f"The coordinator has not answered since {last:%Y-%m-%d %H:%M} UTC."


def watcher(config: SiteConfig, *, key: Ed25519PrivateKey) -> Callable[[], Status]:
    """Return a function that gathers the status now, as often as it is asked."""

    def look() -> Status:
        now = datetime.now(UTC)
        try:
            return gather(config, key=key, now=now, certificate_days=days_left(config))
        except DocumentError:
            found = gather(config, key=key, now=now)
            return found.model_copy(update={"attention": (*found.attention, NO_CERTIFICATE)})

    return look

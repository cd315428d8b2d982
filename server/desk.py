"""The coordinator's desk: studies are offered here, and what sites tell in their visits is kept.

Under the office's folder:

studies/<first 12 of digest>/        a run directory (``store.py``) for each study offered
    approvals/<site>.json            the newest decision of each site, approved or not
    approvals/<site>.jsonl           all its decisions in turn, for whoever audits the study
checkpoints/<site>.jsonl             the site's signed checkpoints, each once, never changed
checkpoints/<site>.forks.jsonl       those that contradict them
visits/<site>.json                   when the site was last here, and its health (Seen)

Guarantees:
    A decision is kept only if the site's enrolled key signed it, about a study that names the site.
    An older decision never takes a newer one's place; of two of the same time no approval does.
    A site's journal that goes back, or tells another story, is noted for good and gets no receipt.
    A visit told twice leaves what it left the first time.
    What one site tells fills no disk: its forks and decisions are kept to a number.
    A study that was closed is told to its sites as closed, and cannot be proposed again.

Design: a site that restores an old journal and writes on past the last checkpoint is not found
here, for the desk does not see the journal; ``consilia-audit verify SITE --checkpoint`` with the
site's checkpoints from here finds it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from server import report, store
from server.start import FILE as START
from server.store import RunSettings, SiteKeys
from shared_models import plan as plans
from shared_models.allowlists import objections
from shared_models.contracts import (
    Bulletin,
    Checkpoint,
    Contract,
    Count,
    Countersignature,
    Decision,
    Health,
    Offer,
    Receipt,
    SignedCheckpoint,
    SignedReceipt,
    StudyState,
    Visit,
)
from shared_models.errors import ConsiliaError, SignatureError
from shared_models.files import append_line, in_turn, read_tail, replace
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, is_signed_by, public_key, sign

SHORT = 12
RESTORE = "restore it from a copy"
MOST_OFFERS = 1000  # a bulletin has room for no more
MOST_FORKS = 100  # of one site's journal that are kept: one is enough to have it audited
MOST_DECISIONS = 200  # of one site about one study, after which it can only step back
OPEN: tuple[StudyState, ...] = ("running", "offered")

AnyContract = TypeVar("AnyContract", bound=Contract)

log = logging.getLogger(__name__)


class Desk(NamedTuple):
    """The office's folder, the coordinator's key, and the keys of the sites that are enrolled.

    ``closed`` are the digests of the studies that were closed for good.
    """

    folder: Path
    key: Ed25519PrivateKey
    sites: Mapping[str, SiteKeys]
    closed: Collection[str] = frozenset()


class Study(NamedTuple):
    """A study of the office: where it runs, its plan, and where it stands."""

    run_dir: Path
    study: str
    signed: SignedPlan
    state: StudyState
    num_rounds_done: int


class Seen(Contract):
    """When a site was last here, how its agent fares, and how far its journal had come."""

    when: datetime
    health: Health
    num_entries: Count = 0


class SiteState(NamedTuple):
    """A site's line in the coordinator's table; ``num_forks`` is over 0 if its journal lied."""

    site: str
    seen: Seen | None
    decisions: dict[str, Decision]
    num_forks: int


def visit(desk: Desk, told: Visit, *, site: str, today: date) -> Bulletin:
    """Keep what ``site``, known by its certificate, tells, and return what there is for it.

    Raises:
        SignatureError: if the visit is another site's, or the site is not enrolled.
        OSError: if something cannot be written; the site will tell it again.
    """
    if told.site != site or site not in desk.sites:
        raise SignatureError("the visit is not of the enrolled site that made it")
    with _locked(desk.folder):
        known = studies(desk.folder, today=today, closed=desk.closed)
        offered = [one for one in known if site in one.signed.plan.sites]
        for decided in told.decisions:
            _keep_decision(decided, offered, site, key=desk.sites[site].signing)
        receipt = None if told.checkpoint is None else _receipt(desk, told.checkpoint, site)
        _note_visit(desk.folder, told, site)
    offered.sort(key=lambda one: one.state not in OPEN)
    return Bulletin(
        site=site,
        when=datetime.now(UTC),
        offers=tuple(_offer(one) for one in offered[:MOST_OFFERS]),
        receipt=receipt,
    )


def propose(
    desk: Desk, plan: StudyPlan, *, settings: RunSettings, today: date, start: Path | None = None
) -> Study:
    """Sign a plan and offer it to the sites it names; the same plan again is the same study.

    ``settings`` are this machine's; the sites' keys are put in from the desk. ``start`` is the warm
    start that the plan states, and is copied.

    Raises:
        ConsiliaError: with all that is wrong with the plan; nothing is offered then.
    """
    found = [*objections(plan, today=today), *_own_objections(desk, plan, start)]
    if found:
        raise ConsiliaError(found)
    signed = SignedPlan(plan, sign(plan, key=desk.key))
    study = digest(plan)
    run_dir = desk.folder / "studies" / study[:SHORT]
    with _locked(desk.folder):
        if (run_dir / "plan.toml").exists() and digest(store.read_plan(run_dir).plan) != study:
            raise ConsiliaError(f"{run_dir} holds another study; change the plan's seed")
        if not (run_dir / "plan.toml").exists():
            run_dir.mkdir(parents=True, exist_ok=True)
            if start is not None:
                shutil.copyfile(start, run_dir / START)
            keys = {site: desk.sites[site] for site in plan.sites}
            store.write_settings(run_dir, settings.model_copy(update={"sites": keys}))
            replace(run_dir / "plan.toml", plans.render(plan, signed.signature).encode())
    return Study(run_dir, study, signed, "offered", 0)


def studies(folder: Path, *, today: date, closed: Collection[str] = frozenset()) -> list[Study]:
    """Return the studies of the office; a folder that cannot be read is left out and logged."""
    found = []
    for run_dir in sorted((folder / "studies").glob("*/")):
        try:
            signed = store.read_plan(run_dir)
            done = sum(record.kind == "train" for record in store.read_rounds(run_dir))
        except ConsiliaError:
            log.warning("the study %s cannot be read and is not offered", run_dir.name)
            continue
        study = digest(signed.plan)
        state = _state(run_dir, signed.plan, today=today, is_closed=study in closed)
        found.append(Study(run_dir, study, signed, state, done))
    return found


def sites(desk: Desk, *, today: date) -> list[SiteState]:
    """Return what the coordinator knows of each enrolled site, for its table."""
    known = studies(desk.folder, today=today, closed=desk.closed)
    return [_site_state(desk.folder, site, known) for site in sorted(desk.sites)]


def _site_state(folder: Path, site: str, known: Sequence[Study]) -> SiteState:
    decided = {one.study: decision(one.run_dir, site) for one in known}
    return SiteState(
        site,
        _read(folder / "visits" / f"{site}.json", Seen),
        {study: found for study, found in decided.items() if found is not None},
        len(store.read_lines(_forks(folder, site), SignedCheckpoint, cure=RESTORE)),
    )


def decision(run_dir: Path, site: str) -> Decision | None:
    """Return the site's newest decision about the study that is on file, if there is one."""
    found = _read(run_dir / "approvals" / f"{site}.json", Countersignature)
    return None if found is None else found.approval.decision


def _own_objections(desk: Desk, plan: StudyPlan, start: Path | None) -> Iterator[str]:
    own = public_key(desk.key)
    if digest(plan) in desk.closed:
        yield "the study was closed, for good; to begin another like it, change the plan's seed"
    if plan.coordinator != own:
        yield f"coordinator: the plan names another key; this one is {own}"
    strangers = [site for site in plan.sites if site not in desk.sites]
    if strangers:
        yield f"sites: not enrolled: {', '.join(strangers)}; invite them first"
    if (plan.start is None) is not (start is None):
        yield "start: expected --start with the weights the plan states, and only then"
    if plan.start is not None and start is not None and _digest_of(start) != plan.start:
        yield "start: the weights given are not those that the plan states by their digest"


def _digest_of(start: Path) -> str | None:
    from shared_models.weights import digest as weights_digest
    from shared_models.weights import flatten, load

    try:
        return weights_digest(flatten(load(start)))
    except (OSError, ValueError):
        return None


def _state(run_dir: Path, plan: StudyPlan, *, today: date, is_closed: bool) -> StudyState:
    """Return where a study stands, by what its run left."""
    if (run_dir / report.JSON_NAME).exists() or store.has_fingerprint(run_dir):
        return "finished"
    if is_closed or plan.expires < today:
        return "closed"
    if store.read_failure(run_dir):
        return "failed"
    has_begun = (run_dir / store.ROUNDS).exists() or (run_dir / store.ATTEMPTS).exists()
    return "running" if has_begun else "offered"


def _offer(one: Study) -> Offer:
    text = plans.render(one.signed.plan, one.signed.signature)
    return Offer(plan_toml=text, state=one.state, num_rounds_done=one.num_rounds_done)


def _keep_decision(new: Countersignature, offered: Sequence[Study], site: str, *, key: str) -> None:
    """Keep a site's decision about a study offered to it, unless a newer one is on file."""
    approval = new.approval
    study = next((one for one in offered if one.study == approval.study), None)
    if study is None:
        log.debug("%s decided about a study that is not offered here", site)
        return
    if not is_signed_by(approval, new.signature, key=key) or approval.site != site:
        log.warning("%s: a decision is not signed by the site's enrolled key", site)
        return
    file = study.run_dir / "approvals" / f"{site}.json"
    held = _read(file, Countersignature)
    is_held = held is not None and is_signed_by(held.approval, held.signature, key=key)
    if held is not None and is_held and not _is_newer(new, held):
        return
    file.parent.mkdir(exist_ok=True)
    steps_back = approval.decision != "approved" and _approves(held)
    if not steps_back and _num_lines(file.with_suffix(".jsonl")) >= MOST_DECISIONS:
        log.warning("%s: it has decided too often about one study; it can only step back", site)
        return
    append_line(file.with_suffix(".jsonl"), new.model_dump_json())
    replace(file, new.model_dump_json(indent=2).encode())
    log.info("%s: study %s is %s", site, study.study[:SHORT], approval.decision)


def _approves(held: Countersignature | None) -> bool:
    return held is not None and held.approval.decision == "approved"


def _num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _is_newer(new: Countersignature, held: Countersignature) -> bool:
    if new.approval.when == held.approval.when:
        return new != held and new.approval.decision != "approved"
    return new.approval.when > held.approval.when


def _receipt(desk: Desk, signed: SignedCheckpoint, site: str) -> SignedReceipt | None:
    """Keep a checkpoint that goes on from those before it, and sign a receipt for it."""
    point = signed.checkpoint
    is_theirs = is_signed_by(point, signed.signature, key=desk.sites[site].signing)
    if not is_theirs or point.site != site:
        log.warning("%s: a checkpoint is not signed by the site's enrolled key", site)
        return None
    file = desk.folder / "checkpoints" / f"{site}.jsonl"
    held = _held(file, since=point.index)
    if point not in held:
        if _is_late(point, held):
            return None
        is_fork = _is_fork(point, held)
        if is_fork:
            _append_once(_forks(desk.folder, site), signed)
            log.warning("%s: its journal is not the one it was; have it audited", site)
            return None
        file.parent.mkdir(exist_ok=True)
        append_line(file, signed.model_dump_json())
    receipt = Receipt(
        site=site, checkpoint=digest(point), index=point.index, when=datetime.now(UTC)
    )
    return SignedReceipt(receipt=receipt, signature=sign(receipt, key=desk.key))


def _held(file: Path, *, since: int) -> list[Checkpoint]:
    """Return the checkpoints on file; only the last if ``since`` is past it, as nearly always.

    They stand in the order of their indices, so that a visit costs the same however many there are.
    """
    try:
        last = SignedCheckpoint.model_validate_json(read_tail(file).line).checkpoint
    except (OSError, ValidationError):  # none yet; or else all are read, and the broken one named
        last = None
    if last is not None and last.index < since:
        return [last]
    return [one.checkpoint for one in store.read_lines(file, SignedCheckpoint, cure=RESTORE)]


def _is_late(point: Checkpoint, held: Sequence[Checkpoint]) -> bool:
    """Tell whether a checkpoint is older than the last, as an honest one is that was on its way."""
    last = held[-1] if held else None
    return last is not None and point.index < last.index and point.when < last.when


def _is_fork(point: Checkpoint, held: Sequence[Checkpoint]) -> bool:
    """Tell whether a journal that was where ``held`` says cannot be where ``point`` says."""
    goes_back = bool(held) and point.index < held[-1].index
    return goes_back or any((one.index == point.index) and one.head != point.head for one in held)


def _append_once(file: Path, signed: SignedCheckpoint) -> None:
    file.parent.mkdir(exist_ok=True)
    held = store.read_lines(file, SignedCheckpoint, cure=RESTORE)
    if signed not in held and len(held) < MOST_FORKS:
        append_line(file, signed.model_dump_json())


def _forks(folder: Path, site: str) -> Path:
    return folder / "checkpoints" / f"{site}.forks.jsonl"


def _note_visit(folder: Path, told: Visit, site: str) -> None:
    file = folder / "visits" / f"{site}.json"
    before = _read(file, Seen)
    num_entries = 0 if before is None else before.num_entries
    if told.checkpoint is not None:
        num_entries = told.checkpoint.checkpoint.index + 1
    file.parent.mkdir(exist_ok=True)
    seen = Seen(when=datetime.now(UTC), health=told.health, num_entries=num_entries)
    replace(file, seen.model_dump_json().encode())


def _read(file: Path, contract: type[AnyContract]) -> AnyContract | None:
    try:
        return contract.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep every other visit and proposal away meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with in_turn(folder / "desk.lock"):
        yield

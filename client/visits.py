"""What a site tells the coordinator from time to time, and what it takes from the answer.

A visit carries the newest decision about each plan, a checkpoint of the journal and the agent's
health. The answer brings the studies offered, and a receipt for the checkpoint: from then on
neither side can tell another story of what happened before.

Guarantees:
    Only a plan signed by this site's coordinator, of this coordinator, naming this site, is kept.
    A receipt that is not the coordinator's, of a checkpoint that this site made, is not kept.
    A checkpoint is made when the journal has grown by something else than a checkpoint, once.
    Whatever a bulletin holds, no word of it is logged.
    A visit that fails is made again, later and later, and never ends the agent.
"""

from __future__ import annotations

import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from client import journal, studies
from client.certificate import days_left
from client.config import SiteConfig
from client.studies import Word
from shared_models import plan as plans
from shared_models.contracts import (
    Bulletin,
    Contract,
    Health,
    Offer,
    SignedCheckpoint,
    SignedReceipt,
    Visit,
)
from shared_models.errors import ConsiliaError, DocumentError
from shared_models.files import append_line, read_tail, replace
from shared_models.journal import RECEIPTS, Receipted
from shared_models.plan import SignedPlan
from shared_models.signing import digest, is_signed_by

CHECKPOINT, LAST_VISIT = "checkpoint.json", "visit.json"
EVERY_S, MAX_DELAY_S = 20.0, 300.0
LEAVE_S = 5.0  # how long a visit under way is waited for at the end
NVIDIA = Path("/dev/nvidiactl")  # torch would know more, and the agent imports none of it
MOST_STUDIES = 1000  # a visit has room for no more decisions

log = logging.getLogger(__name__)


class LastVisit(Contract):
    """When the coordinator was last told something and answered."""

    when: datetime


class Agent(NamedTuple):
    """What a visit says of the process that makes it."""

    started_at: datetime
    has_gpu: bool
    certificate_days: int


def health(config: SiteConfig, agent: Agent) -> Health:
    """Return how the agent fares on this machine, now."""
    return Health(
        version=version("consilia"),
        started_at=agent.started_at,
        free_mb=shutil.disk_usage(config.state_dir).free // 2**20,
        has_gpu=agent.has_gpu,
        certificate_days=agent.certificate_days,
    )


def prepare(config: SiteConfig, key: Ed25519PrivateKey, *, health: Health, today: date) -> Visit:
    """Return what there is to tell the coordinator; the same again until something happens.

    Raises:
        DocumentError: if the journal's last line is not this site's own.
        OSError: if a checkpoint cannot be written down.
    """
    found = [
        studies.last_decision(one.study, config, key=key)
        for one in studies.known(config, key=key, today=today)
    ]
    return Visit(
        site=config.name,
        when=datetime.now(UTC),
        decisions=tuple(one for one in found if one is not None)[:MOST_STUDIES],
        checkpoint=_checkpoint(config, key),
        health=health,
    )


def take(
    config: SiteConfig, key: Ed25519PrivateKey, bulletin: Bulletin, *, today: date
) -> list[str]:
    """Keep what a bulletin brings, as far as it holds; return the digests of plans that are new.

    Raises:
        DocumentError: if the bulletin is another site's, or the journal is not this site's own.
        OSError: if something cannot be written.
    """
    if bulletin.site != config.name:
        raise DocumentError("the coordinator's answer is for another site")
    new = list[str]()
    num_known = len(studies.known(config, key=key, today=today))
    for number, offer in enumerate(bulletin.offers):
        signed = _read(offer, config)
        if signed is None:
            log.warning("offer %d is not a plan of this coordinator for this site", number)
            continue
        study = digest(signed.plan)
        word = Word(state=offer.state, num_rounds_done=offer.num_rounds_done, when=bulletin.when)
        if num_known + len(new) >= MOST_STUDIES and not studies.folder_of(config, study).exists():
            log.warning("offer %d is left: %d studies are known already", number, MOST_STUDIES)
        elif studies.keep_offer(signed, word, config, key=key):
            log.info("a new study was offered: %s", study[: studies.SHORT])
            new.append(study)
    if bulletin.receipt is not None:
        _keep_receipt(bulletin.receipt, config)
    return new


def last_receipt(state_dir: Path) -> Receipted | None:
    """Return the newest checkpoint the coordinator gave a receipt for."""
    try:
        return Receipted.model_validate_json(read_tail(state_dir / RECEIPTS).line)
    except (OSError, ValidationError):
        return None


def last_visit(state_dir: Path) -> datetime | None:
    """Return when the coordinator last answered a visit."""
    try:
        return LastVisit.model_validate_json((state_dir / LAST_VISIT).read_bytes()).when
    except (OSError, ValidationError):
        return None


@contextmanager
def in_background(
    config: SiteConfig, key: Ed25519PrivateKey, *, stop: threading.Event
) -> Iterator[None]:
    """Visit the coordinator in a thread until ``stop``; a site that never joined visits nobody."""
    if config.link.control is None:
        log.info("this site has not joined by an invite: it visits nobody and is offered nothing")
        yield
        return
    started_at = datetime.now(UTC)
    thread = threading.Thread(
        target=keep_visiting,
        args=(config, key, lambda told: _call(config, told)),
        kwargs={
            "agent": lambda: _agent(config, started_at),
            "stop": stop,
            "every_s": config.link.visit_every_s,
        },
        name="visits",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LEAVE_S)


def keep_visiting(
    config: SiteConfig,
    key: Ed25519PrivateKey,
    call: Callable[[Visit], Bulletin],
    *,
    agent: Callable[[], Agent],
    stop: threading.Event,
    every_s: float = EVERY_S,
) -> None:
    """Visit the coordinator until ``stop`` is set; after a failure wait longer and longer."""
    num_failed = 0
    while not stop.is_set():
        try:
            visit_once(config, key, call, agent=agent())
            if num_failed:
                log.info("the coordinator answers visits again")
            num_failed = 0
        except Exception as error:  # whatever it was, orders are answered all the same
            level = logging.DEBUG if num_failed else logging.WARNING
            log.log(level, "a visit to the coordinator failed: %s", type(error).__name__)
            num_failed += 1
        stop.wait(pause_s(num_failed, every_s=every_s))


def visit_once(
    config: SiteConfig, key: Ed25519PrivateKey, call: Callable[[Visit], Bulletin], *, agent: Agent
) -> list[str]:
    """Tell the coordinator what there is, keep its answer; return the plans that are new.

    Raises:
        Exception: whatever ``call`` raises, and as ``prepare`` and ``take`` do.
    """
    config.state_dir.mkdir(parents=True, exist_ok=True)
    today = datetime.now(UTC).date()
    visit = prepare(config, key, health=health(config, agent), today=today)
    new = take(config, key, call(visit), today=today)
    last = LastVisit(when=datetime.now(UTC))
    replace(config.state_dir / LAST_VISIT, last.model_dump_json().encode())
    return new


def pause_s(num_failed: int, *, every_s: float = EVERY_S) -> float:
    """Return how long to wait after so many failures in a row; a fifth of it is by chance."""
    delay = min(every_s * 2.0 ** min(num_failed, 10), max(MAX_DELAY_S, every_s))
    return delay * random.uniform(0.9, 1.1)  # so that all sites of a consortium spread


def _call(config: SiteConfig, told: Visit) -> Bulletin:
    """Make a visit with the certificate that is valid now, renewed if few days of it are left."""
    from client import control, join

    try:
        join.renew_if_due(config)
    except ConsiliaError as error:
        log.warning("the certificate was not renewed: %s", type(error).__name__)
    with control.connect(config) as link:
        return control.visit(link, told)


def _agent(config: SiteConfig, started_at: datetime) -> Agent:
    has_gpu = config.performance.device != "cpu" and NVIDIA.exists()
    return Agent(started_at, has_gpu, days_left(config) or 0)


def _read(offer: Offer, config: SiteConfig) -> SignedPlan | None:
    """Return an offer's plan if the coordinator signed it and it is for this site."""
    try:
        signed = plans.parse(offer.plan_toml)
    except DocumentError:
        return None
    plan = signed.plan
    is_signed = is_signed_by(plan, signed.signature, key=config.coordinator)
    is_for_us = plan.coordinator == config.coordinator and config.name in plan.sites
    return signed if is_signed and is_for_us else None


def _checkpoint(config: SiteConfig, key: Ed25519PrivateKey) -> SignedCheckpoint | None:
    """Return a checkpoint of all but checkpoints in the journal, unless its receipt is here."""
    book = journal.Book(config.state_dir, config.name, key)
    made, entry = _made(config.state_dir), journal.last(book).entry
    is_last = entry.kind == "checkpoint" and made is not None
    if made is None or not is_last or entry.digest != digest(made.checkpoint):
        made = journal.checkpoint(book)
        replace(config.state_dir / CHECKPOINT, made.model_dump_json().encode())
    receipt = last_receipt(config.state_dir)
    return None if receipt is not None and receipt.checkpoint == made else made


def _made(state_dir: Path) -> SignedCheckpoint | None:
    try:
        return SignedCheckpoint.model_validate_json((state_dir / CHECKPOINT).read_bytes())
    except (OSError, ValidationError):
        return None


def _keep_receipt(signed: SignedReceipt, config: SiteConfig) -> None:
    made, receipt = _made(config.state_dir), signed.receipt
    before = last_receipt(config.state_dir)
    if before is not None and before.checkpoint == made:
        return
    is_signed = is_signed_by(receipt, signed.signature, key=config.coordinator)
    if made is None or not is_signed or receipt.site != config.name:
        log.warning("a receipt is not the coordinator's for a checkpoint of this site")
    elif (receipt.checkpoint, receipt.index) != (digest(made.checkpoint), made.checkpoint.index):
        log.warning("a receipt is for another checkpoint than this site's last")
    else:
        line = Receipted(checkpoint=made, receipt=signed)
        append_line(config.state_dir / RECEIPTS, line.model_dump_json())

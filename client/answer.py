"""From an order to a reply, inside the hospital.

The order of things is the site's whole security: read and verify, judge, reserve, train, gate,
keep, commit, write down. A refusal is an answer like any other; its reason in words stays in the
site's own log.

The images are read and trained on elsewhere, in a process without keys (``supervisor.py``); what it
answers is numbers, and the gate's to judge.

Guarantees:
    An order to train given again is answered with the same bytes for nothing, or charged again.
    A reply to training that cannot be kept on disk and committed does not leave.
    What was made for a study whose approval was withdrawn meanwhile does not leave.
    What cannot be written in the journal does not leave.
    An earlier round than the last one answered is refused, by an agent started anew as well.
    A plan that asks for a fingerprint is answered with that, and nothing is trained under it.
    A fingerprint without noise is measured once for each plan; asked again, it is the same bytes.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import config as configs
from client import journal, ledger, mapping, masks, outbox, peers, personal, studies
from client.config import SiteConfig
from client.gate import Refused, Result, pass_out, refusal
from client.policy import broken_rules, is_quiet
from client.supervisor import Supervisor, exposed, tell
from client.work import Bench, Cohort, Job, Step, Trainer
from shared_models.contracts import PrivacyEvent, PrivacyStatement, Reservation, RoundOrder
from shared_models.errors import (
    ConsiliaError,
    DataError,
    DocumentError,
    LedgerError,
    MachineError,
    SignatureError,
)
from shared_models.fingerprint import event_of_fingerprint
from shared_models.journal import parse
from shared_models.plan import SignedPlan, StudyPlan, event_of
from shared_models.privacy import events_of, share_of, statement
from shared_models.signing import digest as digest_of
from shared_models.signing import load_key, public_key
from shared_models.weights import Flat, Schema, Weights, digest, is_finite, size_of
from shared_models.wire import Letter, opened, seal

log = logging.getLogger(__name__)

NO_STUDY = "0" * 64
MOST_AHEAD = timedelta(minutes=5)  # as far as two clocks may differ


class Study(NamedTuple):
    """An approved study that the site's rules still allow, and its net's schema."""

    plan: StudyPlan
    schema: Schema


class Site:
    """One hospital's memory between orders: keys, studies it judged, the last round answered.

    ``trainer`` does the work: here in this process, for a site that is served in a worker's.
    """

    def __init__(
        self, config: SiteConfig, *, key: Ed25519PrivateKey, trainer: Trainer | None = None
    ) -> None:
        self.config = config
        self.key = key
        self.trainer = Bench() if trainer is None else trainer
        self.studies: dict[str, Study] = {}
        self.last_round: dict[tuple[str, str], int] = {}
        self.book = journal.Book(config.state_dir, config.name, key)
        self.is_caught_up = False
        self.is_recalled = False

    def note(self, event: journal.Event) -> None:
        """Write ``event`` in the journal, which is first made to agree with the ledger if need be.

        Raises:
            Exception: whatever keeps it from being written; then nothing may leave.
        """
        if not self.is_caught_up:
            journal.catch_up(self.book)
            self.is_caught_up = True
        if not self.is_recalled:
            self.last_round = last_rounds(self.book) | self.last_round
            self.is_recalled = True
        journal.append(self.book, event)

    def note_charge(self, event: journal.Event) -> None:
        """Write down the ledger's newest line, before which the journal had all of it."""
        journal.append(self.book, event)
        self.is_caught_up = True


class Desk(NamedTuple):
    """A site that is open: what answers its letters, refuses what is none, and ends the work."""

    answer: Callable[[Letter], Letter]
    refuse: Callable[[str], Letter]
    cancel: Callable[[], None]


class Seat(NamedTuple):
    """A site in a simulation: its name, its public signing key, and what answers its letters."""

    name: str
    public_key: str
    answer: Callable[[Letter], Letter]


@contextmanager
def open_site(config_file: Path) -> Iterator[Desk]:
    """Open the site of ``config_file``: it answers letters, and has a worker process do the work.

    What a crash left in the ledger is put right first. When this is left, the worker is ended.

    Raises:
        DocumentError: if the configuration, the key or the journal cannot be read.
        MachineError: if no worker can be started.
    """
    config = configs.read(config_file)
    key = load_key(config.signing_key)
    supervisor = Supervisor(config)
    try:
        site = Site(config, key=key, trainer=supervisor)
        ledger.repair(config.state_dir)
        journal.note_config(site.book, config_file)
        tell(supervisor, config.state_dir)
        for secret in exposed(config):
            log.warning("the worker may read %s; keep it out of the images' folder", secret.name)
        yield Desk(
            answer=lambda letter: answer(letter, site),
            refuse=lambda why: refuse(why, site),
            cancel=supervisor.cancel,
        )
    finally:
        supervisor.close()


def introduce(config_file: Path) -> tuple[str, str]:
    """Return a site's name and its public signing key, for its peers at a simulation.

    Raises:
        DocumentError: if the configuration or the key cannot be read.
    """
    config = configs.read(config_file)
    return config.name, public_key(load_key(config.signing_key))


def rehearse(
    config_file: Path,
    *,
    signed: SignedPlan,
    coordinator: str,
    state_dir: Path,
    trusted: Mapping[str, str],
) -> Seat:
    """Seat a site at a simulation on one machine, among ``trusted`` peers (keys by name).

    The site's data, rules and speed are its own; its approvals and ledger go to ``state_dir``, so
    that a rehearsal is neither charged nor mistaken for the real study.

    Raises:
        ConsiliaError: if the site cannot be read, or objects to the plan.
    """
    config = configs.read(config_file)
    known = state_dir / config.name / "peers.toml"
    for name in trusted.keys() - {config.name}:
        peers.trust(known, name=name, key=trusted[name])
    policy = config.policy.model_copy(
        update={"coordinators": (signed.plan.coordinator,), "peers": known}
    )
    changed = {"policy": policy, "coordinator": coordinator, "state_dir": state_dir / config.name}
    site = Site(config.model_copy(update=changed), key=load_key(config.signing_key))
    objections = studies.objections(signed, site.config, today=_today())
    if objections:
        raise ConsiliaError([f"{config.name}: {objection}" for objection in objections])
    studies.approve(signed, site.config, key=site.key, who="rehearsal")
    return Seat(config.name, public_key(site.key), lambda letter: answer(letter, site))


def answer(letter: Letter, site: Site) -> Letter:
    """Return the site's reply to ``letter``, once it stands in the journal."""
    return _noted(_judged(letter, site), site)


def refuse(why: str, site: Site) -> Letter:
    """Return the refusal of an order that is not to be read, once it stands in the journal."""
    log.warning("an order was refused unread (bad-order): %s", why)
    return _noted(seal(refusal(_unknown_order(site), "bad-order"), key=site.key), site)


def _noted(said: Letter, site: Site) -> Letter:
    """Write down what is to be said; if that cannot be done, no more than that is said."""
    event = journal.event_of_letter(said)
    order = _unknown_order(site).model_copy(
        update={"study": event.study, "round_": event.round_, "kind": event.order_kind}
    )
    try:
        return _leaving(said, order, site)
    except Exception as error:
        log.error("the journal cannot be written: %s; nothing leaves", type(error).__name__)
        return seal(refusal(order, "failed"), key=site.key)


def _leaving(said: Letter, order: RoundOrder, site: Site) -> Letter:
    """Write down what is to leave: ``said``, or a refusal if its study is approved no more."""

    def check() -> None:
        if studies.approved(order.study, site.config, key=site.key) is None:
            raise Refused("not-approved", "the approval was withdrawn meanwhile")

    try:
        if said.kind == "reply":
            journal.append(site.book, journal.event_of_letter(said), check=check)
            return said
    except Refused as refused:
        log.warning("round %d refused (%s): %s", order.round_, refused.code, refused)
        said = seal(refusal(order, refused.code), key=site.key)
    journal.append(site.book, journal.event_of_letter(said))  # its ledger may be unreadable
    return said


def _judged(letter: Letter, site: Site) -> Letter:
    """Return what is to be said to ``letter``: a result that passed the gate, or a refusal."""
    order = _unknown_order(site)
    try:
        order, vector = _opened(letter, site)
        site.note(journal.event_of_order(order))
        study = _admitted(order, vector, site)
        log.info("round %d: %s", order.round_, order.kind)
        said = _said_before(order, study.plan, site) or _said_now(order, vector, study, site)
        if said.kind == "reply":
            site.last_round[order.study, order.kind] = order.round_
        return said
    except Refused as refused:
        log.warning("round %d refused (%s): %s", order.round_, refused.code, refused)
        return seal(refusal(order, refused.code), key=site.key)
    except DataError as error:
        log.error("round %d refused (data): %s", order.round_, error)
        return seal(refusal(order, "data"), key=site.key)
    except LedgerError as error:
        log.error("round %d refused (budget): %s", order.round_, error)
        return seal(refusal(order, "budget"), key=site.key)
    except MachineError as error:
        log.error("round %d failed: %s", order.round_, error)
        return seal(refusal(order, "failed"), key=site.key)
    except Exception as error:
        log.error("round %d failed: %s", order.round_, type(error).__name__)
        # the lines of code only: a message may quote a file's name or its content
        log.debug("it failed at\n%s", "".join(traceback.format_tb(error.__traceback__)))
        return seal(refusal(order, "failed"), key=site.key)


def _opened(letter: Letter, site: Site) -> tuple[RoundOrder, Flat]:
    try:
        order, vector = opened(letter, key=site.config.coordinator)
    except ConsiliaError as error:
        raise Refused("bad-signature", str(error)) from error
    if not isinstance(order, RoundOrder) or vector is None:
        raise Refused("bad-order", "expected an order with weights, none of them for a fingerprint")
    if order.site != site.config.name:
        raise Refused("bad-order", "the order is for another site")
    if digest(vector) != order.weights_digest:
        raise Refused("bad-order", "the weights are not those the order announces")
    if not is_finite(vector):
        raise Refused("bad-order", "the weights hold a number that is not finite")
    return order, vector


def _admitted(order: RoundOrder, vector: Flat, site: Site) -> Study:
    """Return the study the order belongs to, or refuse."""
    now = datetime.now(UTC)
    if order.expires_at < now:
        raise Refused("expired", "the order came too late")
    if order.issued_at > now + MOST_AHEAD:
        raise Refused("bad-order", "it is dated ahead of this machine's clock; compare the clocks")
    plan = studies.approved(order.study, site.config, key=site.key)
    if plan is None:
        raise Refused("not-approved", "no approval of this plan by this site")
    if plan.expires < _today():
        raise Refused("expired", "the plan has expired")
    if order.round_ < site.last_round.get((order.study, order.kind), 0):
        raise Refused("out-of-order", "an earlier round than the last one answered")
    if order.kind == "alone" and not plan.compare_alone:
        raise Refused("bad-order", "the plan does not compare with training alone")
    if (order.kind == "fingerprint") != (plan.fingerprint is not None):
        raise Refused("bad-order", "a plan that asks for a fingerprint asks for nothing else")
    last = 0 if order.kind == "fingerprint" else plan.training.num_rounds - (order.kind == "train")
    if order.round_ > last:
        raise Refused("out-of-order", "a later round than the plan has")
    is_first = order.kind == "alone" or (order.kind == "train" and order.round_ == 0)
    if is_first and plan.start not in (None, order.weights_digest):
        raise Refused("bad-order", "the weights are not the start that the plan states")
    if order.study not in site.studies:
        site.studies[order.study] = _ruled(plan, order, site)
    study = site.studies[order.study]
    if vector.size != (0 if order.kind == "fingerprint" else 4 * size_of(study.schema)):
        raise Refused("bad-order", "the weights do not fit the plan's net")
    return study


def _ruled(plan: StudyPlan, order: RoundOrder, site: Site) -> Study:
    """Return ``plan`` with its net's schema, if the site's rules still allow it, or refuse."""
    objections = broken_rules(plan, site.config)
    if not objections:
        outcome, _ = site.trainer(_job("judge", plan, order, site), None)
        objections = list(outcome.objections)
    if objections:
        raise Refused("policy", "; ".join(objections))
    return Study(plan, outcome.tensors)


def _counted(order: RoundOrder, plan: StudyPlan, site: Site) -> Cohort:
    """Have the site's patients read, and return their number if there are enough for the order."""
    step: Step = "measure" if order.kind == "fingerprint" else "prepare"
    outcome, _ = site.trainer(_job(step, plan, order, site), None)
    cohort = outcome.cohort
    if cohort is None:
        raise MachineError("expected a count of the patients, got none")
    fewest = max(plan.min_patients, site.config.policy.min_patients)
    if plan.fingerprint is not None:
        fewest = max(fewest, plan.fingerprint.min_cell, site.config.policy.min_cell)
    if cohort.num_patients < fewest:
        raise Refused(
            "too-few-patients",
            f"expected at least {fewest} patients to train on, got {cohort.num_patients}; list "
            "more of them, or stay out of this study",
        )
    if plan.privacy is not None and plan.privacy.delta >= 1 / cohort.num_patients:
        raise Refused(
            "policy",
            f"expected delta under one over the {cohort.num_patients} patients here, "
            f"got {plan.privacy.delta:g}; ask for a plan with a smaller one",
        )
    if plan.privacy is not None and cohort.is_mixed:
        raise Refused(
            "policy", "patients meet inside the net; name one whose layers keep them apart"
        )
    return cohort


def _said_before(order: RoundOrder, plan: StudyPlan, site: Site) -> Letter | None:
    """Return the reply kept of this very order, if the ledger has it where it has to."""
    if order.kind == "evaluate":
        return None
    config = site.config
    found = outbox.find(config.state_dir, order, policy=config.policy, key=public_key(site.key))
    if found is None:
        return None
    reply = digest_of(found.document.encode())
    if plan.privacy is not None and not ledger.is_committed(config.state_dir, reply):
        return None
    log.info("round %d: asked again, the same reply", order.round_)
    return found


def _said_now(order: RoundOrder, vector: Flat, study: Study, site: Site) -> Letter:
    """Do what the order asks, and keep and commit what of it may leave."""
    config = site.config
    if is_quiet(config.policy, datetime.now(UTC)):
        raise Refused("quiet-hours", "nothing is trained at this hour; see policy.quiet_hours")
    result = _obey(order, vector, study, site)
    passed = pass_out(result, order=order, plan=study.plan, site=config, schema=study.schema)
    if not isinstance(passed, tuple):
        return seal(passed, key=site.key)
    letter = seal(passed[0], key=site.key, vector=passed[1])
    if result.own:
        personal.keep(config.state_dir, order, result.own)
    if order.kind != "evaluate":
        outbox.keep(config.state_dir, order, letter=letter, policy=config.policy)
    if result.charge is not None:
        site.is_caught_up = False  # until the journal has what the ledger has
        commit = ledger.commit(config.state_dir, result.charge, reply=digest_of(passed[0]))
        site.note_charge(journal.event_of_charge(commit))
    return letter


def _obey(order: RoundOrder, vector: Flat, study: Study, site: Site) -> Result:
    """Have done what the order asks: evaluate, train, or train alone."""
    plan = study.plan
    _refuse_another_fingerprint(order, plan, site)
    cohort = _counted(order, plan, site)
    started = time.monotonic()
    state_dir = site.config.state_dir
    began = personal.begin(vector, order, plan=plan, schema=study.schema, state_dir=state_dir)
    is_masked = order.kind == "train" and plan.rounds.secure_aggregation
    mask = masks.mask_for(order, plan, site.config) if is_masked else None
    charge, privacy = _charge(order, study, site)
    given = None if order.kind == "fingerprint" else began
    outcome, trained = site.trainer(_job(order.kind, plan, order, site), given)
    if outcome.cohort != cohort:
        raise MachineError("the number of patients changed during the round")
    update: Weights | None = None
    own: Weights | None = None
    if trained is not None:
        update, own = personal.split(trained, began, plan=plan, schema=study.schema)
    return Result(
        cohort.num_patients,
        time.monotonic() - started,
        train_loss=outcome.loss,
        update=update,
        evaluation=outcome.evaluation,
        privacy=privacy,
        charge=charge,
        mask=mask,
        fingerprint=outcome.fingerprint,
        own=own,
    )


def _refuse_another_fingerprint(order: RoundOrder, plan: StudyPlan, site: Site) -> None:
    """Refuse to count again without noise: two counts tell who came between them."""
    is_told = (order.study, order.kind) in site.last_round
    if order.kind == "fingerprint" and plan.privacy is None and is_told:
        raise Refused(
            "out-of-order",
            "a fingerprint without noise is told once; propose another plan, or one with noise",
        )


def _job(step: Step, plan: StudyPlan, order: RoundOrder, site: Site) -> Job:
    """Return what the one who trains is told: of the site no more than where its images are."""
    config = site.config
    left_s = (order.expires_at - datetime.now(UTC)).total_seconds()
    num_rounds = plan.training.num_rounds if step == "alone" else 1
    most_s = 60 * config.limits.max_minutes_per_round * num_rounds
    return Job(
        step=step,
        study=order.study,
        plan=plan,
        site=config.name,
        data=config.data,
        performance=config.performance,
        plugins=config.policy.plugins,
        today=_today(),
        round_=order.round_,
        noise_multiplier=_noise_multiplier(plan, step),
        min_cell=config.policy.min_cell,
        limit_s=max(min(left_s, most_s), 1e-3),
        labels=_labels(site),
        cache=config.cache,
    )


def _labels(site: Site) -> mapping.Pairs:
    """Return what labels here are called in plans; a mapping nobody vouches for stops the work."""
    try:
        return mapping.read(site.config, key=site.key)
    except (DocumentError, SignatureError) as error:
        raise DataError(error.objections) from error


def _noise_multiplier(plan: StudyPlan, step: Step) -> float:
    """Return the noise this site adds by itself: all of it, or its share; 0 without privacy."""
    if plan.privacy is None or step not in ("train", "alone", "fingerprint"):
        return 0.0
    return share_of(_event(plan, step))


def _event(plan: StudyPlan, kind: str) -> PrivacyEvent:
    """Return what obeying one order of that kind does to the patients, under privacy terms."""
    if kind == "fingerprint":
        return event_of_fingerprint(plan)
    terms = plan.training
    steps = terms.steps_per_round * (terms.num_rounds if kind == "alone" else 1)
    return event_of(plan, steps=steps, purpose=kind)


def _charge(
    order: RoundOrder, study: Study, site: Site
) -> tuple[Reservation, PrivacyStatement] | tuple[None, None]:
    """Reserve the cost of the coming steps, on disk, before any of them."""
    privacy = study.plan.privacy
    if privacy is None or order.kind == "evaluate":
        return None, None
    policy = site.config.policy
    site.is_caught_up = False  # until the journal has what the ledger has
    charged = ledger.reserve(
        site.config.state_dir,
        study=order.study,
        round_=order.round_,
        event=_event(study.plan, order.kind),
        budget=ledger.Budget(
            per_study=min(policy.max_epsilon_per_study, privacy.epsilon),
            lifetime=policy.max_epsilon_lifetime,
            delta=privacy.delta,
        ),
    )
    stated = statement(events_of(charged), delta=privacy.delta)
    site.note_charge(journal.event_of_charge(charged[-1], epsilon=stated.epsilon))
    return charged[-1], stated


def last_rounds(book: journal.Book) -> dict[tuple[str, str], int]:
    """Return the last round answered of each study and kind of order, as the journal has it.

    Raises:
        DocumentError: if the journal cannot be read whole.
    """
    found: dict[tuple[str, str], int] = {}
    for entry in (line.entry for line in parse(book.file.read_bytes())):
        if entry.kind == "reply":
            about = (str(entry.study), str(entry.order_kind))
            found[about] = max(found.get(about, 0), entry.round_ or 0)
    return found


def _unknown_order(site: Site) -> RoundOrder:
    """Return what a refusal names when the order itself could not be trusted."""
    now = datetime.now(UTC)
    return RoundOrder(
        study=NO_STUDY,
        round_=0,
        kind="train",
        site=site.config.name,
        weights_digest=NO_STUDY,
        issued_at=now,
        expires_at=now,
    )


def _today() -> date:
    return datetime.now(UTC).date()

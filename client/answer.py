"""From an order to a reply, inside the hospital.

The order of things is the site's whole security: read and verify, judge, reserve, train, gate,
keep, commit, write down. A refusal is an answer like any other; its reason in words stays in the
site's own log.

Guarantees:
    An order to train given again is answered with the same bytes for nothing, or charged again.
    A reply to training that cannot be kept on disk and committed does not leave.
    What cannot be written in the journal does not leave.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import config as configs
from client import journal, ledger, masks, outbox, peers, studies
from client.config import SiteConfig
from client.gate import Refused, Result, pass_out, refusal
from client.policy import broken_rules, is_quiet
from shared_models.catalogue import objections as unsound
from shared_models.contracts import PrivacyStatement, Reservation, RoundOrder
from shared_models.errors import ConsiliaError, DataError, LedgerError
from shared_models.plan import SignedPlan, StudyPlan, event_of
from shared_models.privacy import events_of, share_of, statement
from shared_models.signing import digest as digest_of
from shared_models.signing import load_key, public_key
from shared_models.weights import (
    Array,
    Schema,
    digest,
    is_finite,
    schema_of,
    size_of,
    subtract,
    unflatten,
)
from shared_models.wire import Letter, seal, unseal

log = logging.getLogger(__name__)

NO_STUDY = "0" * 64


class Study(NamedTuple):
    """An approved study, made ready: its plan, task, patients by split, and its net's schema."""

    plan: StudyPlan
    task: Any
    cohort: Any
    schema: Schema


class Site:
    """One hospital's memory between orders: keys, loaded studies, the last round answered."""

    def __init__(self, config: SiteConfig, *, key: Ed25519PrivateKey) -> None:
        self.config = config
        self.key = key
        self.studies: dict[str, Study] = {}
        self.last_round: dict[tuple[str, str], int] = {}
        self.book = journal.Book(config.state_dir, config.name, key)
        self.is_caught_up = False

    def note(self, event: journal.Event) -> None:
        """Write ``event`` in the journal, which is first made to agree with the ledger if need be.

        Raises:
            Exception: whatever keeps it from being written; then nothing may leave.
        """
        if not self.is_caught_up:
            journal.catch_up(self.book)
            self.is_caught_up = True
        journal.append(self.book, event)

    def note_charge(self, event: journal.Event) -> None:
        """Write down the ledger's newest line, before which the journal had all of it."""
        journal.append(self.book, event)
        self.is_caught_up = True


class Seat(NamedTuple):
    """A site in a simulation: its name, its public signing key, and what answers its letters."""

    name: str
    public_key: str
    answer: Callable[[Letter], Letter]


def open_site(config_file: Path) -> Callable[[Letter], Letter]:
    """Return the function that answers letters for the site of ``config_file``.

    What a crash left in the ledger is put right first.

    Raises:
        DocumentError: if the configuration, the key or the journal cannot be read.
    """
    config = configs.read(config_file)
    site = Site(config, key=load_key(config.signing_key))
    ledger.repair(config.state_dir)
    journal.note_config(site.book, config_file)
    return lambda letter: answer(letter, site)


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
    said = _judged(letter, site)
    event = journal.event_of_letter(said)
    try:
        journal.append(site.book, event)  # a refusal may be of a ledger that cannot be read
    except Exception as error:
        log.error("the journal cannot be written: %s; nothing leaves", type(error).__name__)
        order = _unknown_order(site).model_copy(
            update={"study": event.study, "round_": event.round_, "kind": event.order_kind}
        )
        return seal(refusal(order, "failed"), key=site.key)
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
    except Exception as error:
        log.error("round %d failed: %s", order.round_, type(error).__name__)
        # the lines of code only: a message may quote a file's name or its content
        log.debug("it failed at\n%s", "".join(traceback.format_tb(error.__traceback__)))
        return seal(refusal(order, "failed"), key=site.key)


def _opened(letter: Letter, site: Site) -> tuple[RoundOrder, Array]:
    try:
        order, vector = unseal(letter, key=site.config.coordinator)
    except ConsiliaError as error:
        raise Refused("bad-signature", str(error)) from error
    if not isinstance(order, RoundOrder) or vector is None:
        raise Refused("bad-order", "expected an order with weights")
    if order.site != site.config.name:
        raise Refused("bad-order", "the order is for another site")
    if digest(vector) != order.weights_digest:
        raise Refused("bad-order", "the weights are not those the order announces")
    if not is_finite(vector):
        raise Refused("bad-order", "the weights hold a number that is not finite")
    return order, vector


def _admitted(order: RoundOrder, vector: Array, site: Site) -> Study:
    """Return the study the order belongs to, or refuse."""
    if order.expires_at < datetime.now(UTC):
        raise Refused("expired", "the order came too late")
    plan = studies.approved(order.study, site.config, key=site.key)
    if plan is None:
        raise Refused("not-approved", "no approval of this plan by this site")
    if plan.expires < _today():
        raise Refused("expired", "the plan has expired")
    if order.round_ < site.last_round.get((order.study, order.kind), 0):
        raise Refused("out-of-order", "an earlier round than the last one answered")
    if order.kind == "alone" and not plan.compare_alone:
        raise Refused("bad-order", "the plan does not compare with training alone")
    if order.round_ > plan.training.num_rounds - (order.kind == "train"):
        raise Refused("out-of-order", "a later round than the plan has")
    is_first = order.kind == "alone" or (order.kind == "train" and order.round_ == 0)
    if is_first and plan.start not in (None, order.weights_digest):
        raise Refused("bad-order", "the weights are not the start that the plan states")
    if order.study not in site.studies:
        plugins = site.config.policy.plugins
        objections = broken_rules(plan, site.config)
        objections += unsound(plan, today=_today(), plugins=plugins)
        if objections:
            raise Refused("policy", "; ".join(objections))
        site.studies[order.study] = _prepared(plan, site)
    study = site.studies[order.study]
    if vector.shape != (size_of(study.schema),):
        raise Refused("bad-order", "the weights do not fit the plan's net")
    return study


def _prepared(plan: StudyPlan, site: Site) -> Study:
    """Read the site's patients for ``plan`` and check that it can be trained on them."""
    import torch

    from client.probe import mixes_images
    from shared_models import cohort, nets, tasks
    from shared_models.nets.base import weights_of
    from shared_models.registry import find

    plugins = site.config.policy.plugins
    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN, plugins=plugins)(**plan.task.params)
    data = site.config.data
    patients = cohort.load(
        data.manifest,
        root=data.root,
        plan=plan,
        task=task,
        splits=("train", "test"),
        plugins=plugins,
    )
    num_patients = len(patients["train"])
    if num_patients < max(plan.min_patients, site.config.policy.min_patients):
        raise Refused(
            "too-few-patients",
            f"expected at least {max(plan.min_patients, site.config.policy.min_patients)} patients "
            f"to train on, got {num_patients}; list more of them, or stay out of this study",
        )
    if plan.privacy is not None and plan.privacy.delta >= 1 / num_patients:
        raise Refused(
            "policy",
            f"expected delta under one over the {num_patients} patients here, "
            f"got {plan.privacy.delta:g}; ask for a plan with a smaller one",
        )
    net = nets.make(
        plan.net.name, plan.net.params, seed=0, num_outputs=task.num_outputs, plugins=plugins
    )
    first = torch.cat([patient.images[:1] for patient in patients["train"][:2]])
    if plan.privacy is not None and mixes_images(net, first):
        raise Refused(
            "policy", "patients meet inside the net; name one whose layers keep them apart"
        )
    return Study(plan, task, patients, schema_of(weights_of(net)))


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


def _said_now(order: RoundOrder, vector: Array, study: Study, site: Site) -> Letter:
    """Do what the order asks, and keep and commit what of it may leave."""
    config = site.config
    if is_quiet(config.policy, datetime.now(UTC)):
        raise Refused("quiet-hours", "nothing is trained at this hour; see policy.quiet_hours")
    result = _obey(order, unflatten(vector, study.schema), study, site)
    passed = pass_out(result, order=order, plan=study.plan, site=config, schema=study.schema)
    if not isinstance(passed, tuple):
        return seal(passed, key=site.key)
    letter = seal(passed[0], key=site.key, vector=passed[1])
    if order.kind != "evaluate":
        outbox.keep(config.state_dir, order, letter=letter, policy=config.policy)
    if result.charge is not None:
        site.is_caught_up = False  # until the journal has what the ledger has
        commit = ledger.commit(config.state_dir, result.charge, reply=digest_of(passed[0]))
        site.note_charge(journal.event_of_charge(commit))
    return letter


def _obey(order: RoundOrder, weights: dict[str, Array], study: Study, site: Site) -> Result:
    """Do what the order asks: evaluate, train, or train alone."""
    import torch

    from shared_models import nets
    from shared_models.evaluation import evaluate
    from shared_models.nets.base import load_weights, weights_of

    plan, device = study.plan, device_of(site.config)
    torch.set_num_threads(site.config.performance.threads)
    net = nets.make(
        plan.net.name,
        plan.net.params,
        seed=0,
        num_outputs=study.task.num_outputs,
        plugins=site.config.policy.plugins,
    )
    load_weights(net, weights)
    started = time.monotonic()
    test, train = study.cohort["test"], study.cohort["train"]
    if order.kind == "evaluate":
        evaluation = evaluate(net, test, task=study.task, device=device, with_intervals=True)
        return Result(len(train), time.monotonic() - started, evaluation=evaluation)
    if order.kind == "alone":
        charge, privacy = _charge(order, study, site, rounds=plan.training.num_rounds)
        loss = _train(net, study, site, range(plan.training.num_rounds), "alone")
        evaluation = evaluate(net, test, task=study.task, device=device, with_intervals=True)
        return Result(
            len(train),
            time.monotonic() - started,
            train_loss=_shown(loss, plan),
            evaluation=evaluation,
            privacy=privacy,
            charge=charge,
        )
    mask = masks.mask_for(order, plan, site.config) if plan.rounds.secure_aggregation else None
    evaluation = evaluate(net, test, task=study.task, device=device)
    charge, privacy = _charge(order, study, site, rounds=1)
    mean_loss = _train(net, study, site, [order.round_], "train")
    return Result(
        len(train),
        time.monotonic() - started,
        train_loss=_shown(mean_loss, plan),
        update=subtract(weights_of(net), weights),
        evaluation=evaluation,
        privacy=privacy,
        charge=charge,
        mask=mask,
    )


def _train(net: Any, study: Study, site: Site, rounds: Sequence[int], purpose: str) -> float:
    from client.train import Performance, randomness_of, train

    settings = site.config.performance
    trained = train(
        net,
        study.cohort["train"],
        plan=study.plan,
        task=study.task,
        rounds=rounds,
        randomness=randomness_of(
            study.plan, site=site.config.name, round_=rounds[0], purpose=purpose
        ),
        noise_multiplier=_noise_multiplier(study.plan, purpose),
        performance=Performance(
            device=device_of(site.config),
            autocast=settings.autocast,
            most_images=settings.most_images,
            engine=settings.engine,
        ),
    )
    if trained.num_non_finite:
        log.warning("round %d: some patients' gradients were not finite, left out", rounds[-1])
    return trained.loss


def _noise_multiplier(plan: StudyPlan, purpose: str) -> float:
    """Return the noise this site adds by itself: all of it, or its share; 0 without privacy."""
    return 0.0 if plan.privacy is None else share_of(event_of(plan, steps=1, purpose=purpose))


def _shown(loss: float, plan: StudyPlan) -> float | None:
    """Return the training loss if it may leave: it is not noised, so not under privacy terms."""
    return loss if plan.privacy is None else None


def _charge(
    order: RoundOrder, study: Study, site: Site, *, rounds: int
) -> tuple[Reservation, PrivacyStatement] | tuple[None, None]:
    """Reserve the cost of the coming steps, on disk, before any of them."""
    privacy = study.plan.privacy
    if privacy is None:
        return None, None
    steps = rounds * study.plan.training.steps_per_round
    policy = site.config.policy
    site.is_caught_up = False  # until the journal has what the ledger has
    charged = ledger.reserve(
        site.config.state_dir,
        study=order.study,
        round_=order.round_,
        event=event_of(study.plan, steps=steps, purpose=order.kind),
        budget=ledger.Budget(
            per_study=min(policy.max_epsilon_per_study, privacy.epsilon),
            lifetime=policy.max_epsilon_lifetime,
            delta=privacy.delta,
        ),
    )
    stated = statement(events_of(charged), delta=privacy.delta)
    site.note_charge(journal.event_of_charge(charged[-1], epsilon=stated.epsilon))
    return charged[-1], stated


def device_of(config: SiteConfig) -> str:
    """Return the torch device the configuration means on this machine."""
    import torch

    wanted = config.performance.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


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


def _today() -> Any:
    return datetime.now(UTC).date()


def warm_up(config: SiteConfig) -> None:
    """Import what training needs once, before the first order."""
    import opacus  # noqa: F401
    import torch
    from monai.networks.nets import densenet, unet  # noqa: F401

    torch.set_num_threads(config.performance.threads)

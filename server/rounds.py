"""The round loop, with no network in it.

``ask`` carries letters to sites and yields their answers one at a time: Flower in a consortium
(``server.link``), plain functions in a simulation (``server.simulate``). Answers are taken in the
order of the sites' names, so the same answers give the same model bit for bit; each update is added
up and dropped before the next is fetched, so memory does not grow with the number of sites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared_models.contracts import (
    Evaluation,
    OrderKind,
    Refusal,
    RefusalCode,
    RoundOrder,
    RoundRecord,
    SiteReply,
)
from shared_models.errors import ConsiliaError, RunError
from shared_models.plan import StudyPlan
from shared_models.signing import digest as digest_of
from shared_models.weights import Array, Weights, digest, flatten, is_finite, schema_of, unflatten
from shared_models.wire import Letter, seal, to_buckets, unseal
from strategies.base import State, Strategy, Update

#: (letters by site, deadline_s) to (site, answer or None), in the order of the sites' names.
Ask = Callable[[Mapping[str, Letter], float], Iterator[tuple[str, Letter | None]]]
Validate = Callable[[Weights], Evaluation]
#: More training patients than this are not believed of one site.
MOST_PATIENTS = 10_000_000


class Consortium(NamedTuple):
    """Who takes part: the coordinator's key, and the sites' public signing keys by name."""

    key: Ed25519PrivateKey
    sites: Mapping[str, str]


class Answer(NamedTuple):
    """One site's checked answer: a reply with its update, or a refusal."""

    said: SiteReply | Refusal
    update: Update | None
    size_bytes: int


class Round(NamedTuple):
    """What a round left: the record for the run directory and the new weights and state."""

    record: RoundRecord
    weights: Weights
    state: State


def run(
    plan: StudyPlan,
    weights: Weights,
    ask: Ask,
    *,
    consortium: Consortium,
    strategy: Strategy,
    validate: Validate,
) -> Iterator[Round]:
    """Yield each training round of ``plan`` in turn, starting from ``weights``.

    Raises:
        RunError: if a round does not reach the plan's quorum; it names each site and its reason.
    """
    state = strategy.init(weights)
    for round_ in range(plan.training.num_rounds):
        result = train_round(
            plan, weights, ask, round_=round_, consortium=consortium, strategy=strategy, state=state
        )
        record = result.record.model_copy(update={"validation": validate(result.weights)})
        weights, state = result.weights, result.state
        yield Round(record, weights, state)


def train_round(
    plan: StudyPlan,
    weights: Weights,
    ask: Ask,
    *,
    round_: int,
    consortium: Consortium,
    strategy: Strategy,
    state: State,
) -> Round:
    """Ask every site to train once and turn their updates into new weights."""
    started, answers = time.monotonic(), list[Answer]()
    orders = orders_for(plan, weights, kind="train", round_=round_, consortium=consortium)

    def updates() -> Iterator[Update]:
        for answer in answered(ask, orders, plan=plan, weights=weights, consortium=consortium):
            answers.append(answer._replace(update=None))
            if answer.update is not None:
                yield answer.update
            del answer  # nothing of one site lives on while the next one is fetched

    try:
        new, state = strategy.step(weights, updates(), state)
    except ValueError as error:
        raise RunError(_shortfall(plan, answers, round_)) from error
    if sum(isinstance(a.said, SiteReply) for a in answers) < plan.rounds.quorum:
        raise RunError(_shortfall(plan, answers, round_))
    record = recorded(answers, orders, kind="train", round_=round_, weights=new, started=started)
    return Round(record, new, state)


def ask_all(
    plan: StudyPlan,
    weights: Weights,
    ask: Ask,
    *,
    kind: OrderKind,
    consortium: Consortium,
) -> RoundRecord:
    """Ask every site to evaluate ``weights``, or to train alone from them; aggregate nothing."""
    started, round_ = time.monotonic(), plan.training.num_rounds
    orders = orders_for(plan, weights, kind=kind, round_=round_, consortium=consortium)
    answers = list(answered(ask, orders, plan=plan, weights=weights, consortium=consortium))
    return recorded(answers, orders, kind=kind, round_=round_, weights=weights, started=started)


def orders_for(
    plan: StudyPlan, weights: Weights, *, kind: OrderKind, round_: int, consortium: Consortium
) -> dict[str, Letter]:
    """Return one signed order for each site; all share one copy of the weights."""
    vector = flatten(weights)
    buckets = to_buckets(vector)
    now = datetime.now(UTC)
    deadline_s = _deadline_s(plan, kind)
    return {
        site: seal(
            RoundOrder(
                study=digest_of(plan),
                round_=round_,
                kind=kind,
                site=site,
                weights_digest=digest(vector),
                issued_at=now,
                expires_at=now + timedelta(seconds=deadline_s),
            ),
            key=consortium.key,
        )._replace(buckets=buckets)
        for site in sorted(consortium.sites)
    }


def answered(
    ask: Ask,
    orders: Mapping[str, Letter],
    *,
    plan: StudyPlan,
    weights: Weights,
    consortium: Consortium,
) -> Iterator[Answer]:
    """Yield each site's checked answer; a bad or missing one is a refusal with its reason."""
    orders_by_site = {
        site: RoundOrder.model_validate_json(letter.document) for site, letter in orders.items()
    }
    deadline_s = _deadline_s(plan, next(iter(orders_by_site.values())).kind)
    for site, letter in ask(orders, deadline_s):
        order = orders_by_site[site]
        if letter is None:
            yield Answer(_refusal(order, "no-answer"), None, 0)
            continue
        yield _answer(letter, order=order, key=consortium.sites[site], weights=weights)
        del letter


def _answer(letter: Letter, *, order: RoundOrder, key: str, weights: Weights) -> Answer:
    try:
        said, update = checked(letter, order=order, key=key, weights=weights)
    except (ConsiliaError, ValueError):
        return Answer(_refusal(order, "bad-reply"), None, letter.size_bytes)
    return Answer(said, update, letter.size_bytes)


def checked(
    letter: Letter, *, order: RoundOrder, key: str, weights: Weights
) -> tuple[SiteReply | Refusal, Update | None]:
    """Open a site's letter and believe nothing in it that cannot be checked.

    Raises:
        ConsiliaError: if it is unreadable or not signed by the site.
        ValueError: if it answers another order, or its update is not what it announces.
    """
    said, vector = unseal(letter, key=key)
    if isinstance(said, Refusal):
        return _refusal(order, said.code), None
    if not isinstance(said, SiteReply):
        raise ValueError("expected a reply or a refusal")
    answers_to = (said.study, said.round_, said.kind, said.site)
    if answers_to != (order.study, order.round_, order.kind, order.site):
        raise ValueError("expected the answer to the order sent")
    if order.kind != "train":
        return said, None
    return said, _update(said, vector, weights)


def recorded(
    answers: list[Answer],
    orders: Mapping[str, Letter],
    *,
    kind: OrderKind,
    round_: int,
    weights: Weights,
    started: float,
) -> RoundRecord:
    """Return the round's line for the run directory; seconds count from ``started`` (monotonic)."""
    return RoundRecord(
        round_=round_,
        kind=kind,
        replies=tuple(a.said for a in answers if isinstance(a.said, SiteReply)),
        refusals=tuple(a.said for a in answers if isinstance(a.said, Refusal)),
        weights_digest=digest(flatten(weights)),
        seconds=round(time.monotonic() - started, 3),
        sent_bytes=sum(letter.size_bytes for letter in orders.values()),
        received_bytes=sum(a.size_bytes for a in answers),
    )


def _update(said: SiteReply, vector: Array | None, weights: Weights) -> Update:
    if vector is None or said.update_digest != digest(vector):
        raise ValueError("expected the update the reply announces")
    if not is_finite(vector):
        raise ValueError("expected finite numbers")
    if not 1 <= said.num_patients <= MOST_PATIENTS:
        raise ValueError(f"expected from 1 to {MOST_PATIENTS} patients")
    return Update(said.site, said.num_patients, unflatten(vector, schema_of(weights)))


def _refusal(order: RoundOrder, code: RefusalCode) -> Refusal:
    return Refusal(
        study=order.study, round_=order.round_, kind=order.kind, site=order.site, code=code
    )


def _deadline_s(plan: StudyPlan, kind: OrderKind) -> float:
    """Training alone takes as long as all rounds together."""
    rounds = plan.training.num_rounds if kind == "alone" else 1
    return plan.rounds.deadline_s * rounds


def _shortfall(plan: StudyPlan, answers: list[Answer], round_: int) -> list[str]:
    replies = sum(isinstance(a.said, SiteReply) for a in answers)
    lines = [
        f"round {round_}: {replies} of {len(answers)} sites, the plan needs {plan.rounds.quorum}"
    ]
    return lines + [f"{a.said.site}: {a.said.code}" for a in answers if isinstance(a.said, Refusal)]

"""The round loop, with no network in it.

``ask`` carries letters to sites and yields their answers one at a time: Flower in a consortium
(``server.link``), plain functions in a simulation (``server.simulate``). Answers are taken in the
order of the sites' names, so the same answers give the same model bit for bit; each update is added
up and dropped before the next is fetched, so memory does not grow with the number of sites. Weights
lie in a file while they are not computed with, so that beside a strategy's sums there is no model.

Under secure aggregation the masked updates are added up before anything can be read, and become one
update of all sites together. If a site is missing, the round is asked again of the others, who are
charged again; so a site that is known to be away is not asked in the first place.

Where a run stands is a value, ``Progress``: kept and given back, the run goes on bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared_models.contracts import (
    Countersignature,
    Evaluation,
    OrderKind,
    Refusal,
    RefusalCode,
    RoundOrder,
    RoundRecord,
    SiteReply,
)
from shared_models.errors import ConsiliaError, RunError
from shared_models.masking import Masked
from shared_models.masking import opened as unmasked
from shared_models.plan import StudyPlan
from shared_models.signing import digest as digest_of
from shared_models.weights import (
    STRETCH_BYTES,
    Buffer,
    Flat,
    Weights,
    digest,
    flat_of,
    is_finite,
    packed,
    schema_of,
    size_of,
    spooled,
    stowed,
    unpacked,
)
from shared_models.wire import Letter, in_buckets, opened, seal
from strategies.base import State, Strategy, Update

#: (letters by site, deadline_s) to (site, answer or None), in the order of the sites' names.
Ask = Callable[[Mapping[str, Letter], float], Iterator[tuple[str, Letter | None]]]
Validate = Callable[[Weights], Evaluation]


@runtime_checkable
class KnowsWhoIsAway(Protocol):
    """A way to ask that can tell, before anybody is asked, which sites would not hear."""

    def away(self) -> Collection[str]:
        """Return the sites that are out of reach, and have been for some time."""


#: From a round to the attempts it was not asked under yet; each is noted before it is given.
Attempts = Callable[[int], Iterator[int]]
#: More training patients than this are not believed of one site.
MOST_PATIENTS = 10_000_000


class Consortium(NamedTuple):
    """Who takes part: the coordinator's key, and by name the sites' public signing keys.

    ``approvals`` are their countersignatures, which secure aggregation hands on to their peers.
    ``absent`` are the plan's other sites: no approval of theirs is on file, so no order is theirs.
    """

    key: Ed25519PrivateKey
    sites: Mapping[str, str]
    approvals: Mapping[str, Countersignature] = {}
    absent: tuple[str, ...] = ()


class Circle(NamedTuple):
    """Whom a run may ask: all sites' node keys (OpenSSH lines), and who is expected at its start.

    A round that fewer than ``quorum`` sites have answered is worth waiting for.
    """

    keys: Mapping[str, str]
    expected: frozenset[str]
    quorum: int


class Answer(NamedTuple):
    """One site's checked answer: a reply with its update's numbers, masked or not, or a refusal."""

    said: SiteReply | Refusal
    vector: Flat | None
    size_bytes: int


class Tally:
    """What was sent and answered in one round, without the updates; some were refused before."""

    def __init__(self, refused: Iterable[Refusal] = ()) -> None:
        self.answers = [Answer(refusal, None, 0) for refusal in refused]
        self.sent_bytes = 0
        self.received_bytes = 0

    def sent(self, orders: Mapping[str, Letter]) -> None:
        """Count orders that go out."""
        self.sent_bytes += sum(letter.size_bytes for letter in orders.values())

    def add(self, answer: Answer) -> None:
        """Note an answer."""
        self.answers.append(answer._replace(vector=None))
        self.received_bytes += answer.size_bytes

    def forget_replies(self) -> None:
        """Keep only the refusals: the round is asked again of the sites that replied."""
        self.answers = [a for a in self.answers if isinstance(a.said, Refusal)]


class Progress(NamedTuple):
    """Where a run stands: so many rounds are done, and this is what the next one begins with."""

    num_rounds: int
    weights: Weights
    state: State
    average: Weights


class Round(NamedTuple):
    """What a round left: the record for the run directory, the new weights and state.

    ``released`` are the weights to validate and release: the new ones, or the plan's average.
    """

    record: RoundRecord
    weights: Weights
    state: State
    released: Weights

    @property
    def progress(self) -> Progress:
        """Where the run stands after this round."""
        return Progress(self.record.round_ + 1, self.weights, self.state, self.released)


def count_anew(round_: int) -> Iterator[int]:
    """Return the attempts of a round that was never asked before."""
    return count()


def run(
    plan: StudyPlan,
    weights: Weights,
    ask: Ask,
    *,
    consortium: Callable[[], Consortium],
    strategy: Strategy,
    validate: Validate,
    since: Progress | None = None,
    attempts: Attempts = count_anew,
    folder: Path | None = None,
) -> Iterator[Round]:
    """Yield each training round of ``plan`` in turn, starting from ``weights``.

    Who takes part is asked of ``consortium`` before each round; what it raises ends the run.

    A run that was interrupted goes on ``since`` the last round it finished. A site uses a mask only
    once, so ``attempts`` must then remember those before; without masks a round asked again is the
    same order, and gets the same bytes. Weights lie in files without a name in ``folder``.

    Raises:
        RunError: if a round does not reach the plan's quorum; it names each site and its reason.
    """
    if since is None:
        kept = stowed(weights, folder=folder)
        since = Progress(0, kept, strategy.init(kept), kept)
    first, weights, state, average = since
    del since
    for round_ in range(first, plan.training.num_rounds):
        result = train_round(
            plan,
            weights,
            ask,
            round_=round_,
            consortium=consortium(),
            strategy=strategy,
            state=state,
            attempts=attempts,
            folder=folder,
        )
        weights, state = result.weights, result.state
        if plan.rounds.averaging:
            mean = averaged(average, weights, decay=plan.rounds.averaging, round_=round_)
            average = stowed(mean, folder=folder)
            del mean
        else:
            average = weights
        record = result.record.model_copy(
            update={"validation": validate(average), "weights_digest": digest(packed(average))}
        )
        yield result._replace(record=record, released=average)


def averaged(average: Weights, weights: Weights, *, decay: float, round_: int) -> Weights:
    """Return the moving average with ``weights`` in it; the first rounds' decay is smaller."""
    if decay == 0:
        return weights
    kept = np.float32(min(decay, (1 + round_) / (10 + round_)))
    return {name: kept * average[name] + (1 - kept) * weights[name] for name in weights}


def train_round(
    plan: StudyPlan,
    weights: Weights,
    ask: Ask,
    *,
    round_: int,
    consortium: Consortium,
    strategy: Strategy,
    state: State,
    attempts: Attempts = count_anew,
    folder: Path | None = None,
) -> Round:
    """Ask every site to train once and turn their updates into new weights, put in ``folder``."""
    started = time.monotonic()
    absent = consortium.absent
    tally = Tally(_refused(plan, absent, code="not-approved", kind="train", round_=round_))
    summed = partial(_summed_updates, attempts=attempts, folder=folder)
    updates = summed if plan.rounds.secure_aggregation else _single_updates
    try:
        new, state = strategy.step(
            weights,
            updates(plan, weights, ask, tally, round_=round_, consortium=consortium),
            state,
        )
    except ValueError as error:
        raise RunError(_shortfall(plan, tally.answers, round_)) from error
    if sum(isinstance(a.said, SiteReply) for a in tally.answers) < plan.rounds.quorum:
        raise RunError(_shortfall(plan, tally.answers, round_))
    kept = stowed({n: np.asarray(v, np.float32) for n, v in new.items()}, folder=folder)
    state = stowed(state, folder=folder)
    record = recorded(tally, kind="train", round_=round_, weights=kept, started=started)
    return Round(record, kept, state, kept)


def _single_updates(
    plan: StudyPlan,
    weights: Weights,
    ask: Ask,
    tally: Tally,
    *,
    round_: int,
    consortium: Consortium,
) -> Iterator[Update]:
    """Yield each site's update as it is answered."""
    schema = schema_of(weights)
    orders = orders_for(plan, weights, kind="train", round_=round_, consortium=consortium)
    tally.sent(orders)
    for answer in answered(ask, orders, plan=plan, weights=weights, consortium=consortium):
        tally.add(answer)
        if answer.vector is not None and isinstance(answer.said, SiteReply):
            yield Update(
                answer.said.site, answer.said.num_patients, unpacked(answer.vector, schema)
            )
        del answer  # nothing of one site lives on while the next one is fetched


def _summed_updates(
    plan: StudyPlan,
    weights: Weights,
    ask: Ask,
    tally: Tally,
    *,
    round_: int,
    consortium: Consortium,
    attempts: Attempts,
    folder: Path | None = None,
) -> Iterator[Update]:
    """Yield the one update of all sites, once all that were asked have answered.

    Raises:
        ValueError: if fewer than the quorum are left to be asked.
    """
    reached = within_reach(consortium, ask, quorum=plan.rounds.quorum)
    away = sorted(consortium.sites.keys() - reached.sites.keys())
    for refusal in _refused(plan, away, code="no-answer", kind="train", round_=round_):
        tally.add(Answer(refusal, None, 0))
    consortium = reached
    for attempt in attempts(round_):
        orders = orders_for(
            plan, weights, kind="train", round_=round_, consortium=consortium, attempt=attempt
        )
        tally.sent(orders)
        total = np.zeros(size_of(schema_of(weights)), np.uint64)
        num_patients, present = 0, set[str]()
        for answer in answered(ask, orders, plan=plan, weights=weights, consortium=consortium):
            tally.add(answer)
            if answer.vector is not None and isinstance(answer.said, SiteReply):
                _add(total, answer.vector)
                num_patients += answer.said.num_patients
                present.add(answer.said.site)
            del answer
        if len(present) < plan.rounds.quorum:
            raise ValueError("expected more sites")
        if present == set(orders):
            mean = spooled(_mean(total, num_patients), folder=folder)
            del total
            yield Update("all", num_patients, unpacked(mean, schema_of(weights)))
            return
        tally.forget_replies()
        left = {site: key for site, key in consortium.sites.items() if site in present}
        consortium = consortium._replace(sites=left)


def within_reach(consortium: Consortium, ask: Ask, *, quorum: int) -> Consortium:
    """Leave out the sites that ``ask`` knows to be away, if ``quorum`` sites are left then.

    A site that has come back is in the next round's consortium as before.
    """
    away = ask.away() if isinstance(ask, KnowsWhoIsAway) else ()
    left = {site: key for site, key in consortium.sites.items() if site not in away}
    return consortium._replace(sites=left) if len(left) >= quorum else consortium


def _add(total: Masked, vector: Flat) -> None:
    """Add a masked vector to ``total``, in place."""
    start = 0
    for stretch in vector.stretches():
        numbers = np.frombuffer(stretch, "<u8")
        total[start : start + len(numbers)] += numbers
        start += len(numbers)


def _mean(total: Masked, num_patients: int) -> Iterator[Buffer]:
    """Yield the mean update that masked sums stand for, as float32."""
    step = STRETCH_BYTES // total.itemsize
    for start in range(0, len(total), step):
        mean = unmasked(total[start : start + step]) / num_patients
        yield from flat_of(mean.astype(np.float32)).stretches()


def ask_all(
    plan: StudyPlan,
    weights: Weights,
    ask: Ask,
    *,
    kind: OrderKind,
    consortium: Consortium,
) -> RoundRecord:
    """Ask every site to evaluate ``weights``, or to train alone from them; aggregate nothing.

    A fingerprint, which needs no weights, is asked for in round 0.
    """
    started = time.monotonic()
    round_ = 0 if kind == "fingerprint" else plan.training.num_rounds
    orders = orders_for(plan, weights, kind=kind, round_=round_, consortium=consortium)
    absent = consortium.absent
    tally = Tally(_refused(plan, absent, code="not-approved", kind=kind, round_=round_))
    tally.sent(orders)
    for answer in answered(ask, orders, plan=plan, weights=weights, consortium=consortium):
        tally.add(answer)
    return recorded(tally, kind=kind, round_=round_, weights=weights, started=started)


def orders_for(
    plan: StudyPlan,
    weights: Weights,
    *,
    kind: OrderKind,
    round_: int,
    consortium: Consortium,
    attempt: int = 0,
) -> dict[str, Letter]:
    """Return one signed order for each site; their weights are those, where they lie."""
    is_summed = kind == "train" and plan.rounds.secure_aggregation
    participants = tuple(consortium.approvals[s] for s in sorted(consortium.sites) if is_summed)
    vector = packed(weights)
    buckets, digest_ = in_buckets(vector), digest(vector)
    now = datetime.now(UTC)
    deadline_s = _deadline_s(plan, kind)
    return {
        site: seal(
            RoundOrder(
                study=digest_of(plan),
                round_=round_,
                kind=kind,
                site=site,
                weights_digest=digest_,
                attempt=attempt,
                participants=participants,
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
        answer = _answer(letter, order=order, key=consortium.sites[site], weights=weights)
        del letter  # the vector is all that is needed of it
        yield answer
        del answer


def _answer(letter: Letter, *, order: RoundOrder, key: str, weights: Weights) -> Answer:
    try:
        said, found = checked(letter, order=order, key=key, weights=weights)
    except (ConsiliaError, ValueError):
        return Answer(_refusal(order, "bad-reply"), None, letter.size_bytes)
    return Answer(said, found, letter.size_bytes)


def checked(
    letter: Letter, *, order: RoundOrder, key: str, weights: Weights
) -> tuple[SiteReply | Refusal, Flat | None]:
    """Open a site's letter and believe nothing in it that cannot be checked.

    Raises:
        ConsiliaError: if it is unreadable or not signed by the site.
        ValueError: if it answers another order, or its update is not what it announces.
    """
    said, vector = opened(letter, key=key)
    if isinstance(said, Refusal):
        return _refusal(order, said.code), None
    if not isinstance(said, SiteReply):
        raise ValueError("expected a reply or a refusal")
    answers_to = (said.study, said.round_, said.kind, said.site, said.attempt)
    if answers_to != (order.study, order.round_, order.kind, order.site, order.attempt):
        raise ValueError("expected the answer to the order sent")
    if (said.fingerprint is not None) != (order.kind == "fingerprint"):
        raise ValueError("expected a fingerprint where it was asked for, and only there")
    if order.kind != "train":
        return said, None
    return said, _update(said, vector, order, weights)


def recorded(
    tally: Tally,
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
        replies=tuple(a.said for a in tally.answers if isinstance(a.said, SiteReply)),
        refusals=tuple(a.said for a in tally.answers if isinstance(a.said, Refusal)),
        weights_digest=digest(packed(weights)),
        seconds=round(time.monotonic() - started, 3),
        sent_bytes=tally.sent_bytes,
        received_bytes=tally.received_bytes,
    )


def _update(said: SiteReply, vector: Flat | None, order: RoundOrder, weights: Weights) -> Flat:
    if said.is_masked != bool(order.participants):
        raise ValueError("expected a masked update under secure aggregation, and only then")
    if vector is None or vector.size != size_of(schema_of(weights)) * (8 if said.is_masked else 4):
        raise ValueError("expected one number for each weight")
    if said.update_digest != digest(vector):
        raise ValueError("expected the update the reply announces")
    if not said.is_masked and not is_finite(vector):
        raise ValueError("expected finite numbers")
    if not 1 <= said.num_patients <= MOST_PATIENTS:
        raise ValueError(f"expected from 1 to {MOST_PATIENTS} patients")
    return vector


def _refused(
    plan: StudyPlan, sites: Iterable[str], *, code: RefusalCode, kind: OrderKind, round_: int
) -> list[Refusal]:
    """Return a refusal for each of the sites that get no order, and why."""
    study = digest_of(plan)
    return [Refusal(study=study, round_=round_, kind=kind, site=site, code=code) for site in sites]


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

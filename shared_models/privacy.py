"""What private training costs: events in, epsilon out.

What was done is a value (``PrivacyEvent``), what it costs is a function: any accountant can replay
the events. Epsilon is by dp_accounting's privacy loss distributions, discretized pessimistically,
for adding or removing one patient, or one whole site where an event's unit says so; RDP stands
beside it as a second opinion. No torch, no Flower.

Guarantees:
    Epsilon is rounded up and never down.
    Epsilon grows with steps and sample rate and falls with noise.
    A calibrated noise multiplier never gives less privacy than asked.
    Events that are not Poisson sampled are never accounted as Poisson.
    Epsilons of different units are never composed.
    The shares of all who add one sum to at least the noise that is accounted.

Design: under secure aggregation several sites' shares of noise add up to the noise of the sum, and
epsilon is that of the sum. What it rests on is stated with it, and what it would be without.

References:
    Doroshenko et al. 2022, Connect the dots: tighter discrete approximations of privacy loss
    distributions, https://arxiv.org/abs/2207.04380. Chua et al. 2024, How private are DP-SGD
    implementations?, https://arxiv.org/abs/2403.17673.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from shared_models.contracts import Commit, PrivacyEvent, PrivacyStatement, PrivacyUnit, Reservation
from shared_models.errors import LedgerError

#: Discretization of the privacy loss; 1e-3 agrees with 1e-4 to four digits at a tenth of the time.
PLD_INTERVAL = 1e-3
#: Epsilon is rounded up to this many decimals.
DECIMALS = 4
#: What is not accounted but called infinite, so that a hostile plan cannot keep the accountant
#: busy for hours: more steps than this, or a plain bound on epsilon (RDP of order 2) beyond this.
MOST_STEPS = 1_000_000
MOST_EPSILON = 5_000.0
#: Larger noise multipliers overflow in the accountant and are accounted as this one.
MOST_NOISE = 1e6

COVERS = "every model update this site sent, and training alone where the plan compares with it"
DOES_NOT_COVER = (
    "the presence of test patients in evaluation metrics, the patient counts, "
    "and choices of hyper-parameters made before the study"
)
#: The same where the noise is split over sites, and only sums over sites are seen.
COVERS_SUMS = (
    "every model update this site sent, for whoever sees only sums over sites, the coordinator "
    "included, as long as at least {noise_shares} of the sites taking part add their share of the "
    "noise and keep it to themselves; and training alone where the plan compares with it"
)
DOES_NOT_COVER_SUMS = (
    "this site's update seen by itself (epsilon_unmasked is for that), sums with fewer shares of "
    f"noise, as for a site that takes out its own, {DOES_NOT_COVER}"
)
#: The same where the unit is a whole site, which no noise of its own can hide from who reads it.
COVERS_SITES = (
    "every model made from sums of the sites' updates, for whoever sees no update by itself, as "
    "long as all shares of the noise are added"
)
DOES_NOT_COVER_SITES = (
    "which sites take part, an update seen by itself, evaluation metrics, the patient counts, and "
    "choices of hyper-parameters made before the study"
)
#: The same of a fingerprint, under whose plan nothing is trained.
COVERS_FINGERPRINT = "every histogram of the fingerprint this site sent"
DOES_NOT_COVER_FINGERPRINT = "the number of patients, which is told beside it as it is"


_LINE: TypeAdapter[Reservation | Commit] = TypeAdapter(
    Reservation | Commit, config=ConfigDict(hide_input_in_errors=True)
)


class Ledger(NamedTuple):
    """What a site's ledger holds, oldest first. Every reservation counts, committed or not."""

    reservations: tuple[Reservation, ...] = ()
    commits: tuple[Commit, ...] = ()


class Spent(NamedTuple):
    """An epsilon per patient and the delta it is stated at; no delta where nothing was spent."""

    epsilon: float
    delta: float | None


def epsilon(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """Return the epsilon of all ``events`` together at ``delta``, rounded up; 0 for none.

    Infinite where the accountant cannot bound it, and where it would protect nobody
    (``MOST_STEPS``, ``MOST_EPSILON``).

    Raises:
        ValueError: if delta is no probability, the events are of different units, or one of them
            cannot be accounted.
    """
    if not 0 < delta < 1:
        raise ValueError(f"expected delta in (0, 1), got {delta}")
    merged = _merged(events)
    return math.inf if _is_beyond(merged) else _pld(merged, delta)


def epsilon_rdp(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """Return the epsilon by Renyi differential privacy: safe, looser, computed another way."""
    return _rdp(_merged(events), delta)


def statement(events: Sequence[PrivacyEvent], *, delta: float) -> PrivacyStatement:
    """Return the epsilon of ``events`` with everything it needs to mean something.

    Where the events differ, the weakest setting is stated (least noise, highest rate, most images,
    most shares of noise).

    Raises:
        ValueError: if there are no events, or no finite epsilon.
    """
    if not events:
        raise ValueError("expected at least one privacy event, got none")
    total = epsilon(events, delta=delta)
    if not math.isfinite(total):
        raise ValueError("expected a finite epsilon; the events are not differentially private")
    noise_shares = max(e.noise_shares for e in events)
    covers, does_not_cover = sentences_for(
        noise_shares,
        unit=events[0].unit,
        is_fingerprint=all(e.purpose == "fingerprint" for e in events),
    )
    return PrivacyStatement(
        epsilon=total,
        delta=delta,
        unit=events[0].unit,
        sampler="all" if any(e.sampler == "all" for e in events) else "poisson",
        epsilon_rdp=epsilon_rdp(events, delta=delta),
        noise_multiplier=min(e.noise_multiplier for e in events),
        sample_rate=max(e.sample_rate for e in events),
        max_grad_norm=max(e.max_grad_norm for e in events),
        images_per_patient=max(e.images_per_patient for e in events),
        steps=sum(e.steps for e in events),
        noise_shares=noise_shares,
        epsilon_unmasked=_unmasked(events, delta),
        covers=covers,
        does_not_cover=does_not_cover,
    )


def sentences_for(
    noise_shares: int, *, unit: PrivacyUnit = "patient", is_fingerprint: bool = False
) -> tuple[str, str]:
    """Return what a statement covers and what not, for a noise of that many sites' shares."""
    if is_fingerprint:
        return COVERS_FINGERPRINT, DOES_NOT_COVER_FINGERPRINT
    if unit == "site":
        return COVERS_SITES, DOES_NOT_COVER_SITES
    if noise_shares == 1:
        return COVERS, DOES_NOT_COVER
    return COVERS_SUMS.format(noise_shares=noise_shares), DOES_NOT_COVER_SUMS


def share_of(event: PrivacyEvent) -> float:
    """Return the noise multiplier a site adds by itself, rounded up in its last bit.

    Against t sites that tell their shares, split over the number of sites less t, and let all add.
    """
    share = event.noise_multiplier / math.sqrt(event.noise_shares)
    while event.noise_shares * Fraction(share) ** 2 < Fraction(event.noise_multiplier) ** 2:
        share = math.nextafter(share, math.inf)
    return share


def parse_ledger(content: bytes) -> Ledger:
    """Return what a ledger file holds: JSON lines, each a reservation or a commit.

    The reservations of one round for one purpose are numbered from 0 without a gap; one written
    before they were numbered takes the next number. A commit follows its reservation, once.

    Design: a last line without its end is refused, for whoever reads cannot tell a crash from a
    copy that lacks something. Only the site, which holds the lock, knows that nothing followed
    from it, and puts it right (``client.ledger``).

    Raises:
        LedgerError: if any line is broken, cut short or contradicts those before it; it names the
            line and repeats nothing of it. What cannot be read whole proves nothing.
    """
    if content and not content.endswith(b"\n"):
        raise LedgerError(
            "the ledger's last line was cut short; the site puts it right when its agent starts"
        )
    reservations, commits = list[Reservation](), list[Commit]()
    attempts, committed = Counter[tuple[str, int, str]](), set[tuple[str, int, str, int]]()
    for number, line in enumerate(content.splitlines(), start=1):
        entry = _line(line, number)
        if isinstance(entry, Reservation):
            asked = (entry.study, entry.round_, entry.event.purpose)
            if "attempt" not in entry.model_fields_set:
                entry = entry.model_copy(update={"attempt": attempts[asked]})
            if entry.attempt != attempts[asked]:
                raise LedgerError(f"line {number} of the ledger repeats or skips an attempt")
            attempts[asked] += 1
            reservations.append(entry)
        else:
            asked = (entry.study, entry.round_, entry.purpose)
            if entry.attempt >= attempts[asked]:
                raise LedgerError(f"line {number} of the ledger commits what was not reserved")
            if (*asked, entry.attempt) in committed:
                raise LedgerError(f"line {number} of the ledger commits what is committed already")
            committed.add((*asked, entry.attempt))
            commits.append(entry)
    return Ledger(tuple(reservations), tuple(commits))


def _line(line: bytes, number: int) -> Reservation | Commit:
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        raise LedgerError(
            f"line {number} of the ledger is neither a reservation nor a commit"
        ) from error


def events_of(
    ledger: Sequence[Reservation], *, study: str | None = None
) -> tuple[PrivacyEvent, ...]:
    """Return the events of one study, or of all."""
    return tuple(entry.event for entry in ledger if study is None or entry.study == study)


def spent(
    ledger: Sequence[Reservation], *, study: str | None = None, delta: float | None = None
) -> Spent:
    """Return the epsilon of one study, or of all together.

    It is stated at ``delta``, or else at the smallest delta agreed for what is counted: a larger
    one would make it look cheaper.

    Raises:
        LedgerError: if an event's unit is not the patient: a site's ledger counts nothing else.
    """
    counted = [entry for entry in ledger if study is None or entry.study == study]
    if any(entry.event.unit != "patient" for entry in counted):
        raise LedgerError("the ledger charges something else than patients; have it checked")
    if not counted:
        return Spent(0.0, delta)
    stated_at = min(entry.delta for entry in counted) if delta is None else delta
    return Spent(epsilon([entry.event for entry in counted], delta=stated_at), stated_at)


def studies_of(ledger: Sequence[Reservation]) -> list[str]:
    """Return the digests of the studies charged, in the order of their first charge."""
    return list(dict.fromkeys(entry.study for entry in ledger))


def calibrate(*, epsilon_target: float, delta: float, sample_rate: float, steps: int) -> float:
    """Return a noise multiplier with which ``steps`` Poisson steps cost at most ``epsilon_target``.

    Rounded up to three decimals, then checked: never gives less privacy than asked.

    Raises:
        ValueError: if the target is no positive number, or cannot be met with a noise multiplier
            of 512.
    """
    if not 0 < epsilon_target < math.inf:
        raise ValueError(f"expected a positive, finite epsilon, got {epsilon_target}")

    def cost(noise_multiplier: float) -> float:
        event = PrivacyEvent(
            sample_rate=sample_rate,
            noise_multiplier=noise_multiplier,
            max_grad_norm=1.0,
            images_per_patient=1,
            steps=steps,
        )
        return epsilon((event,), delta=delta)

    low, high = 0.2, 1.0
    while cost(high) > epsilon_target:
        low, high = high, high * 2
        if high > 1000:
            raise ValueError(f"expected a reachable epsilon, got {epsilon_target} at delta {delta}")
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > epsilon_target else (low, middle)
    thousandths = math.ceil(high * 1000)
    while cost(thousandths / 1000) > epsilon_target:
        thousandths += 1
    return thousandths / 1000


def _unmasked(events: Sequence[PrivacyEvent], delta: float) -> float | None:
    """Return the epsilon with this site's own noise alone; none if infinite, or if that is all."""
    if all(e.noise_shares == 1 for e in events):
        return None
    own = [e.model_copy(update={"noise_multiplier": share_of(e)}) for e in events]
    value = epsilon(own, delta=delta)
    return value if math.isfinite(value) else None


def _merged(events: Sequence[PrivacyEvent]) -> tuple[tuple[float, float, int], ...]:
    """Add up the steps of events that are alike in what they cost.

    Where all take part there is nothing to draw, which is Poisson sampling at a rate of one.
    """
    units = {event.unit for event in events}
    if len(units) > 1:
        raise ValueError(
            f"expected events of one unit, got {' and '.join(sorted(units))}; state an epsilon of "
            "each"
        )
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        is_sampled = event.sampler == "poisson" or (event.sampler, event.sample_rate) == ("all", 1)
        if not is_sampled or event.relation != "add-or-remove-one":
            raise ValueError(
                "only Poisson sampling, or all in every step, under add-or-remove-one can be "
                "accounted"
            )
        like = (event.sample_rate, min(event.noise_multiplier, MOST_NOISE))
        steps[like] = steps.get(like, 0) + event.steps
    return tuple(sorted((rate, noise, count) for (rate, noise), count in steps.items()))


def _is_beyond(merged: tuple[tuple[float, float, int], ...]) -> bool:
    """Tell whether there is no point in accounting; see ``MOST_EPSILON``.

    Order 2 of Mironov et al. 2019, Renyi differential privacy of the sampled Gaussian mechanism,
    https://arxiv.org/abs/1908.10530, section 3.3: log(1 + q^2 (exp(1 / sigma^2) - 1)) a step.
    """
    bound = 0.0
    for rate, noise, steps in merged:
        exponent = min(noise**-2, 1e6)
        overlap = 2 * math.log(rate) + exponent  # of q^2 exp(1 / sigma^2), as a logarithm
        bound += steps * (overlap if overlap > 50 else math.log1p(rate**2 * math.expm1(exponent)))
    return bound > MOST_EPSILON or sum(steps for _, _, steps in merged) > MOST_STEPS


@lru_cache(maxsize=256)
def _pld(merged: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from dp_accounting import NeighboringRelation, pld

    accountant = pld.PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=PLD_INTERVAL
    )
    return _compose(accountant, merged, delta)


@lru_cache(maxsize=256)
def _rdp(merged: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from dp_accounting import NeighboringRelation, rdp

    # It tells of every fractional order that it leaves out, which only makes the bound looser.
    with _quiet("absl"):
        accountant = rdp.RdpAccountant(None, NeighboringRelation.ADD_OR_REMOVE_ONE)
        return _compose(accountant, merged, delta)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


def _compose(accountant: Any, merged: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    if not merged:
        return 0.0
    for rate, noise, steps in merged:
        step = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
        accountant.compose(SelfComposedDpEvent(step, steps))
    value = float(accountant.get_epsilon(delta))
    if not math.isfinite(value):
        return math.inf
    return float(Decimal(value).quantize(Decimal(1).scaleb(-DECIMALS), rounding=ROUND_CEILING))

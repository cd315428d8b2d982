"""What private training costs: events in, epsilon out.

What was done is a value (``PrivacyEvent``), what it costs is a function: any accountant can replay
the events. Epsilon is by dp_accounting's privacy loss distributions, discretized pessimistically,
for adding or removing one patient; RDP stands beside it as a second opinion. No torch, no Flower.

Guarantees:
    Epsilon is rounded up and never down.
    Epsilon grows with steps and sample rate and falls with noise.
    A calibrated noise multiplier never gives less privacy than asked.
    Events that are not Poisson sampled are never accounted as Poisson.

References:
    Doroshenko et al. 2022, Connect the dots: tighter discrete approximations of privacy loss
    distributions, https://arxiv.org/abs/2207.04380. Chua et al. 2024, How private are DP-SGD
    implementations?, https://arxiv.org/abs/2403.17673.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import ValidationError

from shared_models.contracts import PrivacyEvent, PrivacyStatement, Reservation
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


class Spent(NamedTuple):
    """An epsilon per patient and the delta it is stated at; no delta where nothing was spent."""

    epsilon: float
    delta: float | None


def epsilon(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """Return the epsilon of all ``events`` together at ``delta``, rounded up; 0 for none.

    Infinite where the accountant cannot bound it, and where it would protect nobody
    (``MOST_STEPS``, ``MOST_EPSILON``).
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

    Where the events differ, the weakest setting is stated (least noise, highest rate, most images).

    Raises:
        ValueError: if there are no events, or no finite epsilon.
    """
    if not events:
        raise ValueError("expected at least one privacy event, got none")
    total = epsilon(events, delta=delta)
    if not math.isfinite(total):
        raise ValueError("expected a finite epsilon; the events are not differentially private")
    return PrivacyStatement(
        epsilon=total,
        delta=delta,
        epsilon_rdp=epsilon_rdp(events, delta=delta),
        noise_multiplier=min(e.noise_multiplier for e in events),
        sample_rate=max(e.sample_rate for e in events),
        max_grad_norm=max(e.max_grad_norm for e in events),
        images_per_patient=max(e.images_per_patient for e in events),
        steps=sum(e.steps for e in events),
        covers=COVERS,
        does_not_cover=DOES_NOT_COVER,
    )


def parse_ledger(content: bytes) -> tuple[Reservation, ...]:
    """Return the reservations of a ledger file (JSON lines), oldest first.

    Raises:
        LedgerError: if any line is broken or cut short; what cannot be read whole proves nothing.
    """
    if content and not content.endswith(b"\n"):
        raise LedgerError("the ledger's last line was cut short; have it checked by hand")
    try:
        return tuple(Reservation.model_validate_json(line) for line in content.splitlines())
    except ValidationError as error:
        raise LedgerError("the ledger holds a line that is no reservation") from error


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
    """
    counted = [entry for entry in ledger if study is None or entry.study == study]
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
    rounded = math.ceil(high * 1000) / 1000
    return rounded if cost(rounded) <= epsilon_target else rounded + 1e-3


def _merged(events: Sequence[PrivacyEvent]) -> tuple[tuple[float, float, int], ...]:
    """Add up the steps of events that are alike in what they cost."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if event.sampler != "poisson" or event.relation != "add-or-remove-one":
            raise ValueError("only Poisson sampling under add-or-remove-one can be accounted")
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

    return _compose(rdp.RdpAccountant(None, NeighboringRelation.ADD_OR_REMOVE_ONE), merged, delta)


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

"""Known ways to count privacy wrongly, each with the figures that show it and what ours says.

Held elsewhere: epsilon rounded up, calibration and rounds charged one by one (``test_privacy.py``);
a statement that counts every round before (``client/test_answer.py``); a draw that is Poisson and
drops nobody (``client/test_train.py``); batches cut for memory (``client/test_dp.py``); shares of
noise that add up (``client/test_noise.py``).
"""

from __future__ import annotations

import math
import warnings
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    dp_event,
    pld,
    rdp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import create_accountant
from scipy.optimize import brentq
from scipy.stats import binom, norm

from shared_models.contracts import PrivacyEvent, Reservation
from shared_models.privacy import epsilon, epsilon_rdp, spent, statement

ADD_OR_REMOVE, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
#: Rate, noise, steps, delta; epsilon by dp_accounting's PLD, and by Opacus's GDP accountant.
TABLE = [
    (0.1, 1.0, 500, 5e-4, 13.14, 13.27),
    (0.064, 1.0, 938, 1e-4, 12.47, 12.24),
    (0.0512, 1.0, 781, 2e-5, 9.46, 8.94),
    (0.0512, 1.0, 586, 5e-6, 8.73, 8.02),
    (0.064, 0.6, 938, 1e-4, 40.7, 56.5),
]
STUDIES = [(0.1, 1.0, 300, 10.81), (0.1, 1.5, 471, 7.07), (0.2, 2.0, 247, 7.28)]  # at delta 1e-4


def event(rate: float = 0.1, noise: float = 1.0, steps: int = 500, **changes: Any) -> PrivacyEvent:
    fields = {"max_grad_norm": 1.0, "images_per_patient": 4, "steps": steps}
    return PrivacyEvent.model_validate(
        {"sample_rate": rate, "noise_multiplier": noise} | fields | changes
    )


def by_opacus(name: str, *, rate: float, noise: float, steps: int, delta: float) -> float:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GDP accounting is experimental")
        accountant = create_accountant(name)
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    return float(accountant.get_epsilon(delta=delta))


def by_pld(step: Any, *, steps: int, delta: float, relation: Any = ADD_OR_REMOVE) -> float:
    accountant = pld.PLDAccountant(relation, value_discretization_interval=1e-3)
    accountant.compose(SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


# --- accountants that understate


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "tight", "gdp"), TABLE)
def test_gaussian_dp_may_understate_and_is_never_what_we_state(
    rate: float, noise: float, steps: int, delta: float, tight: float, gdp: float
) -> None:
    ours = epsilon([event(rate, noise, steps)], delta=delta)
    setting = {"rate": rate, "noise": noise, "steps": steps, "delta": delta}
    assert ours == pytest.approx(tight, abs=0.006 if tight < 40 else 0.06)
    assert by_opacus("gdp", **setting) == pytest.approx(gdp, abs=0.06)
    assert by_opacus("prv", **setting) == pytest.approx(ours, abs=0.04)
    assert ours < epsilon_rdp([event(rate, noise, steps)], delta=delta)


def test_in_three_of_the_five_settings_gaussian_dp_is_below_every_sound_accountant() -> None:
    assert sum(gdp < tight for *_, tight, gdp in TABLE) == 3


# --- samplers that are not what they are accounted as


@pytest.mark.parametrize("sampler", ["shuffle", "fixed", "fixed-size", "without-replacement", ""])
def test_shuffling_and_batches_of_fixed_size_cannot_be_accounted(sampler: str) -> None:
    with pytest.raises(ValueError, match="Input should be 'poisson' or 'all'"):
        event(sampler=sampler)


def test_shuffling_costs_more_than_twice_what_poisson_sampling_does() -> None:
    """Chua et al. 2024, theorem 4.3: whether any of T batches is over a threshold, as the test.

    One epoch of 1,000 batches, noise 0.5, delta 1e-6. The batch with the patient has mean 2 or 1.
    """
    thresholds, batches, sigma, delta = np.linspace(0, 8, 4001), 1000, 0.5, 1e-6

    def over(mean: float) -> Any:
        others = (batches - 1) * norm.logcdf(thresholds / sigma)
        return -np.expm1(norm.logcdf((thresholds - mean) / sigma) + others)

    with_patient, without = over(2.0), over(1.0)
    at_least = brentq(lambda e: np.max(with_patient - math.exp(e) * without) - delta, 0, 30)
    ours = epsilon([event(1 / batches, sigma, batches)], delta=delta)
    assert ours == pytest.approx(4.24, abs=0.01)
    assert at_least == pytest.approx(11.0, abs=0.01)


def test_batches_of_fixed_size_cost_more_than_twice_what_poisson_sampling_does() -> None:
    accountant = rdp.RdpAccountant(None, REPLACE)
    step = dp_event.SampledWithoutReplacementDpEvent(200, 20, GaussianDpEvent(1.0))
    accountant.compose(SelfComposedDpEvent(step, 500))
    assert accountant.get_epsilon(5e-4) == pytest.approx(32.7, abs=0.05)
    assert epsilon([event()], delta=5e-4) == pytest.approx(13.14, abs=0.006)


@pytest.mark.parametrize(("cap", "cost"), [(40, 13.15), (30, 15.45), (25, 26.7), (20, 48.3)])
def test_dropping_patients_from_large_draws_is_paid_for(cap: int, cost: float) -> None:
    """200 patients at a rate of 0.1; which is why we split large draws and drop from none."""
    step = dp_event.TruncatedSubsampledGaussianDpEvent(200, 0.1, cap, 1.0)
    assert by_pld(step, steps=500, delta=5e-4) == pytest.approx(cost, abs=0.05)
    assert epsilon([event()], delta=5e-4) <= cost


# --- what epsilon is about


def test_replacing_a_patient_costs_about_twice_what_adding_or_removing_one_does() -> None:
    said = statement([event()], delta=5e-4)
    step = PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0))
    twice = by_pld(step, steps=500, delta=5e-4, relation=REPLACE)
    assert said.relation == "add-or-remove-one"
    assert twice == pytest.approx(24.0, abs=0.05)
    assert 1.7 < twice / said.epsilon < 2.1


@pytest.mark.parametrize(("images", "cost"), [(2, 34.5), (4, 98.5)])
def test_images_as_the_unit_protect_a_patient_of_several_far_worse(
    images: int, cost: float
) -> None:
    """Each image drawn and clipped by itself: a patient of k enters a step 0 to k times over."""
    entering = np.arange(images + 1)
    step = dp_event.MixtureOfGaussiansDpEvent(
        1.0, entering.tolist(), binom(images, 0.1).pmf(entering).tolist()
    )
    found = by_pld(step, steps=500, delta=5e-4)
    assert found == pytest.approx(cost, abs=0.1)
    assert found > 1.2 * images * epsilon([event(images_per_patient=images)], delta=5e-4)


def test_whole_sites_as_the_unit_are_hopeless_with_six_hospitals() -> None:
    all_of_them = event(1.0, 1.5, 100, unit="site", sampler="all")
    ours = epsilon([all_of_them], delta=1e-2)
    assert ours == pytest.approx(36.9, abs=0.05)
    assert ours == pytest.approx(by_pld(GaussianDpEvent(1.5), steps=100, delta=1e-2), abs=1e-4)


# --- composition


def test_three_studies_as_one_ledger_cost_less_than_their_sum() -> None:
    events = [event(rate, noise, steps) for rate, noise, steps, _ in STUDIES]
    each = [epsilon([e], delta=1e-4) for e in events]
    together = epsilon(events, delta=1e-4)
    assert each == pytest.approx([cost for *_, cost in STUDIES], abs=0.01)
    assert sum(each) == pytest.approx(25.2, abs=0.05)  # and three deltas
    assert together == pytest.approx(16.7, abs=0.05)


kinds = st.tuples(st.floats(0.01, 0.5), st.floats(0.8, 4.0), st.integers(1, 60))


@given(settings_=st.lists(kinds, min_size=2, max_size=3))
@settings(max_examples=8)
def test_studies_together_never_cost_less_than_the_dearest(
    settings_: list[tuple[float, float, int]],
) -> None:
    events = [event(*each) for each in settings_]
    together = epsilon(events, delta=1e-4)
    assert together >= max(epsilon([e], delta=1e-4) for e in events)


def charge(study: str, year: int, *, steps: int = 100) -> Reservation:
    when = datetime(year, 3, 1, tzinfo=UTC)
    one = event(0.1, 1.5, steps)
    return Reservation(study=study * 64, round_=0, event=one, delta=1e-4, when=when)


def test_years_forgive_nothing() -> None:
    apart = [charge("a", 2026), charge("b", 2031), charge("c", 2046)]
    at_once = [charge("a", 2026, steps=300)]
    assert spent(apart) == spent(at_once)
    assert spent(apart).epsilon > spent(apart[1:]).epsilon > spent(apart[2:]).epsilon > 0


def test_the_epsilon_of_a_study_grows_with_every_round() -> None:
    rounds = [event(steps=10) for _ in range(5)]
    said = [statement(rounds[: count + 1], delta=1e-4) for count in range(5)]
    assert [s.steps for s in said] == [10, 20, 30, 40, 50]
    assert all(a.epsilon < b.epsilon for a, b in pairwise(said))
    assert said[-1].epsilon == epsilon([event(steps=50)], delta=1e-4)
    assert said[-1].epsilon < 5 * said[0].epsilon

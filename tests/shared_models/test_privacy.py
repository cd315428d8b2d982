"""Epsilon against other people's accountants, and what must hold of any epsilon."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from shared_models import privacy
from shared_models.contracts import Commit, PrivacyEvent, Reservation
from shared_models.errors import LedgerError
from shared_models.privacy import (
    calibrate,
    epsilon,
    epsilon_rdp,
    events_of,
    parse_ledger,
    sentences_for,
    share_of,
    spent,
    statement,
    studies_of,
)

#: (sample rate, noise multiplier, steps, delta, what Opacus's PRV accountant says).
TABLE = [
    (0.1, 1.0, 500, 5e-4, 13.16),
    (0.064, 1.0, 938, 1e-4, 12.48),
    (0.0512, 1.0, 781, 2e-5, 9.47),
    (0.0512, 1.0, 586, 5e-6, 8.74),
    (0.064, 0.6, 938, 1e-4, 40.7),
]
NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

rates = st.floats(0.01, 0.5)
noises = st.floats(0.8, 5.0)
counts = st.integers(1, 100)


def event(rate: float = 0.1, noise: float = 1.0, steps: int = 100, **changes: Any) -> PrivacyEvent:
    fields = {"max_grad_norm": 1.0, "images_per_patient": 4, "steps": steps}
    return PrivacyEvent.model_validate(
        {"sample_rate": rate, "noise_multiplier": noise} | fields | changes
    )


def by_dp_accounting(accountant: Any, *, events: list[PrivacyEvent], delta: float) -> float:
    for e in events:
        step = dp_accounting.PoissonSampledDpEvent(
            e.sample_rate, dp_accounting.GaussianDpEvent(e.noise_multiplier)
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, e.steps))
    return float(accountant.get_epsilon(delta))


def fine_pld() -> Any:
    return pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )


def by_opacus(accountant: Any, *, events: list[PrivacyEvent], delta: float) -> float:
    for e in events:
        for _ in range(e.steps):
            accountant.step(noise_multiplier=e.noise_multiplier, sample_rate=e.sample_rate)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return float(accountant.get_epsilon(delta=delta))


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "prv"), TABLE)
def test_epsilon_is_that_of_opacus_prv_accountant(
    rate: float, noise: float, steps: int, delta: float, prv: float
) -> None:
    one = event(rate, noise, steps)
    ours = epsilon([one], delta=delta)
    theirs = by_opacus(PRVAccountant(), events=[one], delta=delta)
    assert theirs == pytest.approx(prv, abs=0.06)
    assert ours == pytest.approx(theirs, abs=0.04)


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "prv"), TABLE)
def test_epsilon_is_a_little_over_that_of_a_ten_times_finer_discretization(
    rate: float, noise: float, steps: int, delta: float, prv: float
) -> None:
    one = event(rate, noise, steps)
    fine = by_dp_accounting(fine_pld(), events=[one], delta=delta)
    assert fine <= epsilon([one], delta=delta) <= fine * 1.001


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "prv"), TABLE)
def test_the_second_opinion_is_looser_and_that_of_opacus_rdp_accountant(
    rate: float, noise: float, steps: int, delta: float, prv: float
) -> None:
    one = event(rate, noise, steps)
    second = epsilon_rdp([one], delta=delta)
    theirs = by_opacus(RDPAccountant(), events=[one], delta=delta)
    assert epsilon([one], delta=delta) < second
    assert second == pytest.approx(theirs, rel=0.1)


def test_events_of_several_kinds_compose_to_less_than_their_sum() -> None:
    events = [event(0.1, 1.2, 200), event(0.05, 0.9, 100), event(0.2, 2.0, 150)]
    together = epsilon(events, delta=1e-4)
    fine = by_dp_accounting(fine_pld(), events=events, delta=1e-4)
    assert fine <= together <= fine * 1.002
    assert together == pytest.approx(by_opacus(PRVAccountant(), events=events, delta=1e-4), abs=0.1)
    assert together < sum(epsilon([e], delta=1e-4) for e in events)


class Saying:
    """An accountant that answers what it is told to."""

    def __init__(self, value: float) -> None:
        self.value = value

    def compose(self, _: Any) -> None:
        pass

    def get_epsilon(self, _: float) -> float:
        return self.value


@given(value=st.floats(0, 1e6))
def test_epsilon_is_rounded_up_and_never_down(value: float) -> None:
    rounded = privacy._compose(Saying(value), ((0.1, 1.0, 1),), 1e-5)
    assert Decimal(rounded) >= Decimal(value)
    assert rounded - value < 1.1e-4 + 1e-9
    assert round(rounded, 4) == rounded


def test_an_epsilon_the_accountant_cannot_bound_is_infinite() -> None:
    assert privacy._compose(Saying(math.inf), ((0.1, 1.0, 1),), 1e-5) == math.inf


@given(rate=rates, noise=noises, steps=counts, more=st.integers(1, 200))
@settings(max_examples=8)
def test_epsilon_grows_with_steps(rate: float, noise: float, steps: int, more: int) -> None:
    few, many = event(rate, noise, steps), event(rate, noise, steps + more)
    assert epsilon([few], delta=1e-4) <= epsilon([many], delta=1e-4)


@given(rate=rates, factor=st.floats(1.01, 2), noise=noises, steps=counts)
@settings(max_examples=8)
def test_epsilon_grows_with_sample_rate(
    rate: float, factor: float, noise: float, steps: int
) -> None:
    rare, often = event(rate, noise, steps), event(min(rate * factor, 1.0), noise, steps)
    assert epsilon([rare], delta=1e-4) <= epsilon([often], delta=1e-4)


@given(rate=rates, noise=noises, factor=st.floats(1.01, 2), steps=counts)
@settings(max_examples=8)
def test_epsilon_falls_with_noise(rate: float, noise: float, factor: float, steps: int) -> None:
    quiet, loud = event(rate, noise, steps), event(rate, noise * factor, steps)
    assert epsilon([quiet], delta=1e-4) >= epsilon([loud], delta=1e-4)


@given(split=st.integers(1, 99))
@settings(max_examples=10)
def test_rounds_charged_one_by_one_cost_what_they_cost_together(split: int) -> None:
    parts = [event(steps=split), event(steps=100 - split)]
    assert epsilon(parts, delta=1e-4) == epsilon([event(steps=100)], delta=1e-4)


@given(order=st.permutations([event(0.1), event(0.2), event(0.1, 2.0)]))
def test_the_order_of_events_changes_nothing(order: list[PrivacyEvent]) -> None:
    assert epsilon(order, delta=1e-4) == epsilon(order[::-1], delta=1e-4)


def test_the_clipping_norm_and_the_number_of_images_cost_nothing_of_themselves() -> None:
    other = event(max_grad_norm=7.0, images_per_patient=1, purpose="alone")
    assert epsilon([other], delta=1e-4) == epsilon([event()], delta=1e-4)


def test_nothing_done_costs_nothing() -> None:
    assert epsilon([], delta=1e-5) == 0.0
    assert epsilon_rdp([], delta=1e-5) == 0.0


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    """Balle and Wang 2018, theorem 8: the exact delta of the Gaussian mechanism."""
    from scipy.stats import norm

    sigma, value = 2.0, epsilon([event(1.0, 2.0, 1)], delta=1e-5)
    exact = norm.cdf(1 / (2 * sigma) - value * sigma) - math.exp(value) * norm.cdf(
        -1 / (2 * sigma) - value * sigma
    )
    assert exact == pytest.approx(1e-5, rel=0.01)
    assert exact <= 1e-5


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 2.0, math.nan, math.inf])
def test_a_delta_outside_zero_to_one_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="expected delta in"):
        epsilon([event()], delta=delta)


@pytest.mark.parametrize("change", [{"sampler": "shuffled"}, {"relation": "replace-one"}])
def test_events_that_are_not_poisson_sampled_are_never_accounted_as_poisson(
    change: dict[str, str],
) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        event(**change)
    smuggled = event().model_copy(update=change)
    for cost in (epsilon, epsilon_rdp):
        with pytest.raises(ValueError, match="only Poisson sampling"):
            cost([smuggled], delta=1e-5)


@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [(0.1, 1e-9, 10), (0.1, 0.01, 10), (0.5, 1.0, 10**9), (1e-5, 1.0, 10**7)],
)
def test_what_would_keep_the_accountant_busy_for_hours_is_infinite_at_once(
    rate: float, noise: float, steps: int
) -> None:
    assert epsilon([event(rate, noise, steps)], delta=1e-5) == math.inf


def test_a_cost_just_short_of_that_is_accounted() -> None:
    assert 1000 < epsilon([event(1.0, 0.3, 250)], delta=1e-5) < privacy.MOST_EPSILON


def test_noise_that_overflows_is_accounted_as_less_noise() -> None:
    assert 0 <= epsilon([event(noise=1e300)], delta=1e-5) < 0.01


@given(
    target=st.floats(0.2, 3),
    rate=st.floats(0.1, 0.3),
    steps=st.integers(50, 100),
    delta=st.sampled_from([1e-2, 1e-5]),
)
@settings(max_examples=6)
def test_a_calibrated_noise_multiplier_never_gives_less_privacy_than_asked(
    target: float, rate: float, steps: int, delta: float
) -> None:
    noise = calibrate(epsilon_target=target, delta=delta, sample_rate=rate, steps=steps)
    assert epsilon([event(rate, noise, steps)], delta=delta) <= target


@pytest.mark.parametrize(("target", "noise"), [(1.0, 8.44), (3.0, 3.25), (8.0, 1.55)])
def test_calibration_wastes_next_to_nothing(target: float, noise: float) -> None:
    """500 patients, sample rate 0.1, 500 steps, delta 1e-5: as dp_accounting calibrates."""
    found = calibrate(epsilon_target=target, delta=1e-5, sample_rate=0.1, steps=500)
    assert found == pytest.approx(noise, abs=0.006)
    assert epsilon([event(0.1, found - 0.003, 500)], delta=1e-5) > target


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_target_that_is_no_positive_number_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="expected a positive, finite epsilon"):
        calibrate(epsilon_target=target, delta=1e-5, sample_rate=0.1, steps=10)


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a reachable epsilon, got 1e-05"):
        calibrate(epsilon_target=1e-5, delta=1e-9, sample_rate=1.0, steps=1000)


def test_a_statement_carries_all_that_epsilon_needs_and_the_weakest_setting() -> None:
    events = [event(0.1, 2.0, 10), event(0.2, 1.5, 20, max_grad_norm=3.0, images_per_patient=9)]
    said = statement(events, delta=1e-4)
    assert said.epsilon == epsilon(events, delta=1e-4)
    assert said.epsilon_rdp == epsilon_rdp(events, delta=1e-4)
    assert (said.noise_multiplier, said.sample_rate, said.max_grad_norm) == (1.5, 0.2, 3.0)
    assert (said.images_per_patient, said.steps, said.delta) == (9, 30, 1e-4)
    assert (said.unit, said.relation, said.sampler) == ("patient", "add-or-remove-one", "poisson")


def test_there_is_no_statement_of_nothing_or_of_no_privacy() -> None:
    with pytest.raises(ValueError, match="at least one privacy event"):
        statement([], delta=1e-5)
    with pytest.raises(ValueError, match="finite epsilon"):
        statement([event(0.1, 1e-6, 10)], delta=1e-5)


# --- noise split over sites


@given(noise=st.floats(1e-6, 1e6), shares=st.integers(1, 1000))
@settings(max_examples=300)
def test_the_shares_of_all_who_add_one_sum_to_at_least_the_noise_that_is_accounted(
    noise: float, shares: int
) -> None:
    share = share_of(event(noise=noise, noise_shares=shares))
    assert shares * Fraction(share) ** 2 >= Fraction(noise) ** 2  # variances add up
    assert share == pytest.approx(noise / math.sqrt(shares), rel=1e-15)


def test_a_site_that_adds_all_the_noise_adds_what_is_accounted_to_the_last_bit() -> None:
    assert share_of(event(noise=1.1)) == 1.1


def test_split_noise_costs_what_the_sum_costs_and_says_what_that_rests_on() -> None:
    whole, split = event(0.5, 3.0, 20), event(0.5, 3.0, 20, noise_shares=5)
    said = statement([split], delta=1e-4)
    assert said.epsilon == statement([whole], delta=1e-4).epsilon
    assert said.noise_shares == 5
    assert (said.covers, said.does_not_cover) == sentences_for(5) != sentences_for(4)
    assert "at least 5 of the sites taking part add their share" in said.covers
    assert "this site's update seen by itself" in said.does_not_cover


def test_what_an_unmasked_update_would_cost_is_stated_beside() -> None:
    split, local = event(0.5, 3.0, 20, noise_shares=5), event(0.5, 3.0 / math.sqrt(5), 20)
    whole = event(0.5, 3.0, 20, purpose="alone")
    said = statement([split, whole], delta=1e-4)
    assert said.epsilon_unmasked == epsilon([local, whole], delta=1e-4) > said.epsilon


def test_nothing_is_said_of_unmasked_updates_where_there_are_none_or_no_bound() -> None:
    ordinary = statement([event()], delta=1e-4)
    assert (ordinary.noise_shares, ordinary.epsilon_unmasked) == (1, None)
    assert (ordinary.covers, ordinary.does_not_cover) == sentences_for(1)
    assert (ordinary.covers, ordinary.does_not_cover) == (privacy.COVERS, privacy.DOES_NOT_COVER)
    thin = statement([event(1.0, 2.0, 50, noise_shares=1000)], delta=1e-4)
    assert thin.epsilon_unmasked is None


# --- whole sites as the unit


def site_event(noise: float = 1.5, steps: int = 100, **changes: Any) -> PrivacyEvent:
    return event(1.0, noise, steps, **{"unit": "site", "sampler": "all"} | changes)


def test_epsilons_of_different_units_are_never_composed() -> None:
    for cost in (epsilon, epsilon_rdp, statement):
        with pytest.raises(ValueError, match="of one unit, got patient and site"):
            cost([event(), site_event()], delta=1e-4)


def test_all_take_part_only_at_a_rate_of_one() -> None:
    with pytest.raises(ValueError, match="expected a sample_rate of 1 where the sampler is 'all'"):
        site_event(sample_rate=0.5)
    smuggled = site_event().model_copy(update={"sample_rate": 0.5})
    with pytest.raises(ValueError, match="only Poisson sampling"):
        epsilon([smuggled], delta=1e-4)


def test_where_all_take_part_it_is_the_gaussian_mechanism_repeated() -> None:
    """A hundred steps with noise 15 are one with noise 1.5."""
    once = epsilon([site_event(1.5, 1)], delta=1e-4)
    assert epsilon([site_event(15.0, 100)], delta=1e-4) == pytest.approx(once, abs=0.01)


def test_a_ledger_charges_patients_and_nothing_else() -> None:
    of_sites = entry("a", 0, sample_rate=1.0, unit="site", sampler="all")
    for ledger in ([of_sites], [*LEDGER, of_sites]):
        with pytest.raises(LedgerError, match="something else than patients"):
            spent(ledger)


def test_a_statement_about_sites_is_told_from_one_about_patients() -> None:
    said = statement([site_event()], delta=1e-2)
    assert (said.unit, said.sampler, said.sample_rate) == ("site", "all", 1.0)
    assert (said.covers, said.does_not_cover) == sentences_for(1, unit="site") != sentences_for(1)


def entry(study: str, round_: int, **changes: Any) -> Reservation:
    return Reservation(
        study=study * 64, round_=round_, event=event(**changes), delta=1e-4, when=NOON
    )


LEDGER = [entry("a", 0, steps=10), entry("b", 0, steps=20), entry("a", 1, steps=30)]


def commit(study: str, round_: int, attempt: int = 0, purpose: str = "train") -> Commit:
    return Commit.model_validate(
        {"study": study * 64, "round_": round_, "attempt": attempt}
        | {"purpose": purpose, "reply": "e" * 64, "when": NOON}
    )


def written(entries: Sequence[Reservation | Commit]) -> bytes:
    return b"".join(e.model_dump_json().encode() + b"\n" for e in entries)


def test_a_ledger_is_read_as_it_was_written_oldest_first() -> None:
    commits = [commit("b", 0), commit("a", 0)]
    found = parse_ledger(written([*LEDGER[:2], *commits, LEDGER[2]]))
    assert found == (tuple(LEDGER), tuple(commits))


def test_an_empty_ledger_holds_nothing() -> None:
    assert parse_ledger(b"") == ((), ())


@given(keep=st.integers(1, len(written(LEDGER)) - 1))
def test_a_ledger_cut_anywhere_but_between_lines_is_refused(keep: int) -> None:
    content = written(LEDGER)[:keep]
    if content.endswith(b"\n"):
        assert parse_ledger(content).reservations == tuple(LEDGER[: content.count(b"\n")])
    else:
        with pytest.raises(LedgerError, match="cut short"):
            parse_ledger(content)


LINE = json.loads(LEDGER[0].model_dump_json())


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"null",
        b"[]",
        json.dumps(LINE)[:-1].encode(),
        json.dumps(LINE | {"patient": "x"}).encode(),
        json.dumps(LINE | {"event": LINE["event"] | {"sampler": "shuffled"}}).encode(),
        json.dumps(LINE | {"event": LINE["event"] | {"noise_multiplier": math.nan}}).encode(),
        json.dumps(LINE | {"event": LINE["event"] | {"noise_multiplier": math.inf}}).encode(),
        json.dumps(LINE | {"event": LINE["event"] | {"steps": -10}}).encode(),
        json.dumps(LINE | {"event": LINE["event"] | {"steps": 0}}).encode(),
        json.dumps(LINE | {"attempt": -1}).encode(),
        json.dumps(LINE | {"kind": "commit"}).encode(),
        json.dumps(LINE | {"kind": "refund"}).encode(),
        commit("a", 0).model_dump_json().replace("commit", "reservation").encode(),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_one_broken_line_refuses_the_whole_ledger(line: bytes, place: int) -> None:
    lines = written(LEDGER).splitlines()
    content = b"".join(each + b"\n" for each in [*lines[:place], line, *lines[place:]])
    with pytest.raises(LedgerError, match=f"line {place + 1} of .* neither a reservation nor"):
        parse_ledger(content)


def again(attempt: int, **changes: Any) -> Reservation:
    return entry("a", 0, **changes).model_copy(update={"attempt": attempt})


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([again(0), again(0)], "line 2 .* repeats or skips"),
        ([again(1)], "line 1 .* repeats or skips"),
        ([again(0), again(2)], "line 2 .* repeats or skips"),
        ([again(0), again(1, purpose="alone")], "line 2 .* repeats or skips"),
        ([commit("a", 0), again(0)], "line 1 .* not reserved"),
        ([again(0), commit("a", 1)], "line 2 .* not reserved"),
        ([again(0), commit("b", 0)], "line 2 .* not reserved"),
        ([again(0), commit("a", 0, 1)], "line 2 .* not reserved"),
        ([again(0), commit("a", 0, purpose="alone")], "line 2 .* not reserved"),
        ([again(0), commit("a", 0), again(1), commit("a", 0)], "line 4 .* committed already"),
    ],
)
def test_a_ledger_that_contradicts_itself_is_refused(
    lines: list[Reservation | Commit], wrong: str
) -> None:
    with pytest.raises(LedgerError, match=wrong) as caught:
        parse_ledger(written(lines))
    assert "aaaa" not in str(caught.value)


def test_attempts_are_counted_for_each_study_round_and_purpose() -> None:
    lines = [again(0), again(1), entry("a", 1), entry("b", 0), again(0, purpose="alone"), again(2)]
    assert parse_ledger(written(lines)).reservations == tuple(lines)


def test_charges_from_before_they_were_numbered_are_numbered_as_they_come() -> None:
    old = json.dumps({k: v for k, v in LINE.items() if k not in ("kind", "attempt")}).encode()
    found = parse_ledger(b"\n".join([old, old, written([again(2)])])).reservations
    assert [e.attempt for e in found] == [0, 1, 2]
    assert spent(found).epsilon == epsilon([event(steps=10)] * 2 + [event()], delta=1e-4)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_an_uncommitted_reservation_costs_the_same_as_a_committed_one(kept: int) -> None:
    lines = [*LEDGER, *[commit("a", round_) for round_ in range(kept)]]
    assert spent(parse_ledger(written(lines)).reservations) == spent(LEDGER)


def test_a_study_is_charged_for_its_own_events_and_the_site_for_all() -> None:
    assert studies_of(LEDGER) == ["a" * 64, "b" * 64]
    assert events_of(LEDGER, study="a" * 64) == (LEDGER[0].event, LEDGER[2].event)
    assert events_of(LEDGER) == tuple(e.event for e in LEDGER)
    assert spent(LEDGER, delta=1e-4, study="a" * 64).epsilon == epsilon(
        [event(steps=40)], delta=1e-4
    )
    assert spent(LEDGER).epsilon == epsilon([event(steps=60)], delta=1e-4)
    assert spent(LEDGER, study="c" * 64) == (0.0, None)


def test_the_second_opinion_is_dp_accountings_own() -> None:
    events = [event(0.1, 1.2, 50)]
    theirs = by_dp_accounting(
        rdp.RdpAccountant(None, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE),
        events=events,
        delta=1e-4,
    )
    assert theirs <= epsilon_rdp(events, delta=1e-4) <= theirs + 1e-4

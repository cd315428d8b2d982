"""Noise that protects patients is normal, unpredictable and never drawn twice from one key."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client import noise
from client.noise import secure
from shared_models.contracts import PrivacyEvent
from shared_models.privacy import share_of
from shared_models.randomness import seeded

NUM = 200_000
#: A sound source fails a test below this share about once in a hundred million runs.
CHANCE = 1e-8

sources = pytest.mark.parametrize(
    "source", [secure(), seeded(1, "north")], ids=["secure", "seeded"]
)


@sources
def test_normal_draws_have_mean_0_and_the_stated_standard_deviation(source) -> None:
    draws = source.normal(NUM)
    assert draws.dtype == np.float64
    assert abs(draws.mean()) < 6 / np.sqrt(NUM)
    assert abs(draws.var() - 1) < 6 * np.sqrt(2 / NUM)


@sources
def test_normal_draws_are_normal(source) -> None:
    draws = source.normal(NUM)
    assert stats.kstest(draws, "norm").pvalue > CHANCE
    assert stats.kurtosistest(draws).pvalue > CHANCE
    assert stats.skewtest(draws).pvalue > CHANCE


@sources
def test_normal_draws_do_not_depend_on_each_other(source) -> None:
    draws = source.normal(NUM)
    halves = draws[: NUM // 2], draws[NUM // 2 :]
    lags = (1, 512, 512 * 8, 512 * 60)  # neighbours, and sums of the same sixty-four draws
    for left, right in (halves, *((draws[:-lag], draws[lag:]) for lag in lags)):
        for power in (1, 2):
            assert stats.pearsonr(left**power, right**power).pvalue > CHANCE


@sources
def test_uniform_draws_lie_in_0_to_1_without_1(source) -> None:
    draws = source.uniform(NUM)
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > CHANCE


def test_even_all_bits_set_stay_below_1(monkeypatch: pytest.MonkeyPatch) -> None:
    class AllBitsSet:
        def __init__(self, *_: object) -> None: ...

        def encryptor(self) -> AllBitsSet:
            return self

        def update(self, data: bytes) -> bytes:
            return b"\xff" * len(data)

    monkeypatch.setattr(noise, "Cipher", AllBitsSet)
    assert secure().uniform(3).tolist() == [1 - 2.0**-53] * 3
    assert np.isfinite(secure().normal(3)).all()


def test_the_edges_of_box_and_muller_are_finite() -> None:
    edges = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint32)
    draws = noise._pairs(np.array(np.meshgrid(edges, edges)).reshape(2, -1).astype(np.uint32))
    assert np.isfinite(draws).all()
    assert np.abs(draws).max() < 7


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 1001])
def test_as_many_draws_come_as_were_asked_for(n: int) -> None:
    source = secure()
    assert source.normal(n).shape == (n,)
    assert source.uniform(n).shape == (n,)


def test_the_last_of_an_odd_number_is_as_wide_as_the_others() -> None:
    source = secure()
    last = np.array([source.normal(3)[-1] for _ in range(20_000)])
    assert stats.kstest(last, "norm").pvalue > CHANCE


def test_each_normal_draw_is_a_sum_of_sixty_four_and_they_cannot_be_solved_for() -> None:
    matrix = noise._mixed(np.eye(64)).reshape(60, 64)
    assert np.array_equal(np.abs(matrix), np.full((60, 64), 1 / 8))
    assert np.array_equal(matrix @ matrix.T, np.eye(60))  # independent, and four are missing


def test_what_is_dropped_is_never_drawn() -> None:
    draws = np.random.default_rng(0).standard_normal((2, 32 * 5))
    assert noise._mixed(draws).shape == (60 * 5,)


def test_few_at_a_time_are_drawn_from_where_the_last_ended() -> None:
    source = secure()
    draws = np.concatenate([source.normal(n) for n in (1, 7, 30_000, 3, 40_000)])
    assert len(np.unique(draws)) == len(draws) == 70_011


def share(noise_multiplier: float, shares: int) -> float:
    """Return what one of so many sites adds."""
    return share_of(
        PrivacyEvent(
            sample_rate=0.5,
            noise_multiplier=noise_multiplier,
            max_grad_norm=1.0,
            images_per_patient=1,
            steps=1,
            noise_shares=shares,
        )
    )


@pytest.mark.parametrize(("sites", "told"), [(1, 0), (5, 0), (5, 1), (12, 3)])
def test_the_shares_of_all_sites_less_those_that_tell_are_the_noise_accounted(
    sites: int, told: int
) -> None:
    each = share(1.3, sites - told)
    shares = [each * secure().normal(NUM) for _ in range(sites)]
    unknown = np.sum(shares[told:], axis=0)
    assert abs(unknown.var() / 1.3**2 - 1) < 6 * np.sqrt(2 / NUM)
    assert abs(unknown.mean()) < 6 * 1.3 / np.sqrt(NUM)
    assert stats.kstest(unknown / 1.3, "norm").pvalue > CHANCE
    assert np.sum(shares, axis=0).var() > unknown.var() * 0.99


def test_two_secure_sources_never_share_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []
    urandom = os.urandom

    def spied(size: int) -> bytes:
        drawn.append(urandom(size))
        return drawn[-1]

    monkeypatch.setattr(noise.os, "urandom", spied)
    made = [secure().uniform(4).tolist() for _ in range(100)]
    keys = [key for key in drawn if len(key) == 32]
    assert len(set(keys)) == len(keys) == 100
    assert len({tuple(draws) for draws in made}) == 100


def test_a_stream_does_not_come_round_again() -> None:
    source = secure()
    draws = np.concatenate([source.uniform(5000) for _ in range(20)])
    assert len(np.unique(draws)) == len(draws)


def test_secure_draws_ignore_every_global_seed() -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        made.append(secure().normal(8))
    assert not np.array_equal(*made)


parts = st.one_of(st.integers(0, 2**32), st.text(max_size=20))


@settings(deadline=None, derandomize=True)
@given(st.lists(parts, min_size=1, max_size=4))
def test_the_same_parts_give_the_same_draws(given_parts: list[int | str]) -> None:
    one, two = seeded(*given_parts), seeded(*given_parts)
    assert np.array_equal(one.uniform(5), two.uniform(5))
    assert np.array_equal(one.normal(5), two.normal(5))


def test_another_seed_site_round_or_purpose_gives_other_draws() -> None:
    asked = [
        (0, "north", 0, "train"),
        (1, "north", 0, "train"),
        (0, "south", 0, "train"),
        (0, "north", 1, "train"),
        (0, "north", 0, "alone"),
    ]
    draws = sorted(seeded(*parts).uniform(1)[0] for parts in asked)
    assert all(low < high for low, high in pairwise(draws))


def test_seeded_draws_leave_the_global_state_alone() -> None:
    before = np.random.get_state()[1].copy()
    seeded(1).normal(10)
    assert np.array_equal(before, np.random.get_state()[1])

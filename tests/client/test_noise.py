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
from client.noise import secure, seeded

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
    halves = draws[: NUM // 2], draws[NUM // 2 :]  # sines and cosines of the same angles
    neighbours = draws[:-1], draws[1:]
    for left, right in (halves, neighbours):
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


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-53])
def test_the_box_muller_edges_are_finite(edge: float) -> None:
    draws = noise._box_muller(lambda n: np.full(n, edge), 4)
    assert np.isfinite(draws).all()
    assert np.abs(draws).max() < 9


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 1001])
def test_as_many_draws_come_as_were_asked_for(n: int) -> None:
    source = secure()
    assert source.normal(n).shape == (n,)
    assert source.uniform(n).shape == (n,)


def test_the_last_of_an_odd_number_is_as_wide_as_the_others() -> None:
    source = secure()
    last = np.array([source.normal(3)[-1] for _ in range(20_000)])
    assert stats.kstest(last, "norm").pvalue > CHANCE


def test_each_normal_draw_is_a_sum_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = iter([1.0, 2.0, 3.0, 6.0])
    monkeypatch.setattr(noise, "_box_muller", lambda _, n: np.full(n, next(parts)))
    assert secure().normal(2).tolist() == [6.0, 6.0]  # 12 over the root of 4
    assert next(parts, None) is None


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

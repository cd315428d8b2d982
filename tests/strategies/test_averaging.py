"""A mean is a mean: against numpy, in any order, within bounds, one update at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from strategies import Strategy, Update
from strategies.averaging import fedavg, fedprox

SHAPES = {"a": (2, 3), "b": (4,), "c": ()}
numbers = st.floats(-1e3, 1e3, width=32)


def weights_like(draw: st.DrawFn) -> dict[str, np.ndarray]:
    return {
        name: draw(hnp.arrays(np.float32, shape, elements=numbers))
        for name, shape in SHAPES.items()
    }


@st.composite
def studies(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], list[Update]]:
    count = draw(st.integers(1, 5))
    updates = [
        Update(f"s{n}", draw(st.integers(1, 1000)), weights_like(draw)) for n in range(count)
    ]
    return weights_like(draw), updates


def averaged(
    weights: dict[str, np.ndarray], updates: list[Update], *, strategy: Strategy | None = None
) -> dict[str, np.ndarray]:
    chosen = strategy or fedavg()
    return chosen.step(weights, iter(updates), chosen.init(weights))[0]


@given(study=studies())
def test_the_mean_is_numpys_weighted_average(
    study: tuple[dict[str, np.ndarray], list[Update]],
) -> None:
    weights, updates = study
    counts = [update.num_patients for update in updates]
    new = averaged(weights, updates)
    for name in SHAPES:
        stacked = np.stack([update.arrays[name].astype(float) for update in updates])
        expected = weights[name] + np.average(stacked, axis=0, weights=counts)
        assert np.allclose(new[name], expected, rtol=1e-6, atol=1e-4)


@given(study=studies(), order=st.randoms(use_true_random=False))
def test_the_order_of_the_sites_changes_nothing_beyond_the_last_bit(
    study: tuple[dict[str, np.ndarray], list[Update]], order: object
) -> None:
    weights, updates = study
    shuffled = list(updates)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    for name, value in averaged(weights, updates).items():
        other = averaged(weights, shuffled)[name]
        last_bit = np.spacing(np.maximum(np.abs(value), np.float32(1e-3)))
        assert (np.abs(value - other) <= last_bit).all()


@given(study=studies())
def test_each_weight_moves_no_further_than_the_site_that_moves_it_most(
    study: tuple[dict[str, np.ndarray], list[Update]],
) -> None:
    weights, updates = study
    for name, value in averaged(weights, updates).items():
        moves = np.stack([update.arrays[name] for update in updates]).astype(float)
        low, high = weights[name] + moves.min(axis=0), weights[name] + moves.max(axis=0)
        rounding = np.spacing(np.abs(value))
        assert (value >= low - rounding).all()
        assert (value <= high + rounding).all()


@given(study=studies(), site=st.integers(0, 4), share=st.integers(1, 999))
def test_a_hospital_in_two_halves_counts_as_one(
    study: tuple[dict[str, np.ndarray], list[Update]], site: int, share: int
) -> None:
    weights, updates = study
    whole = updates[site % len(updates)]
    rest = [update for update in updates if update is not whole]
    half = whole.num_patients * share // 1000
    parts = [whole._replace(num_patients=n) for n in (half, whole.num_patients - half) if n]
    split = averaged(weights, [*rest, *parts])
    for name, value in averaged(weights, updates).items():
        assert np.allclose(value, split[name], rtol=1e-6, atol=1e-4)


def test_one_site_alone_is_followed_exactly() -> None:
    weights = {"a": np.array([1.0, 2.0], np.float32)}
    update = Update("north", 7, {"a": np.array([0.5, -0.25], np.float32)})
    assert averaged(weights, [update])["a"].tolist() == [1.5, 1.75]


def test_small_changes_are_not_lost_among_many_sites() -> None:
    """Ten thousand sites, added up in float64: in float32 the sum would have stopped growing."""
    weights = {"a": np.zeros(1, np.float32)}
    big = Update("big", 2**25, {"a": np.ones(1, np.float32)})
    small = [Update("small", 1, {"a": np.ones(1, np.float32)})] * 10_000
    assert averaged(weights, [big, *small])["a"].tolist() == [1.0]


@given(study=studies())
def test_arguments_are_left_alone_and_the_result_is_float32_of_the_same_shapes(
    study: tuple[dict[str, np.ndarray], list[Update]],
) -> None:
    weights, updates = study
    before = {name: value.copy() for name, value in weights.items()}
    first = {name: value.copy() for name, value in updates[0].arrays.items()}
    new = averaged(weights, updates)
    assert all(np.array_equal(weights[name], before[name]) for name in SHAPES)
    assert all(np.array_equal(updates[0].arrays[name], first[name]) for name in SHAPES)
    assert {name: (value.dtype, value.shape) for name, value in new.items()} == {
        name: (np.dtype(np.float32), shape) for name, shape in SHAPES.items()
    }
    assert not any(np.shares_memory(new[name], weights[name]) for name in SHAPES)


@pytest.mark.parametrize(
    "updates", [[], [Update("north", 0, {"a": np.ones(1, np.float32)})]], ids=["none", "empty"]
)
def test_no_patients_are_no_mean(updates: list[Update]) -> None:
    with pytest.raises(ValueError, match="expected at least one update with patients"):
        averaged({"a": np.zeros(1, np.float32)}, updates)


def test_fedprox_averages_as_fedavg_does() -> None:
    weights = {"a": np.zeros(3, np.float32)}
    updates = [Update("s", n, {"a": np.full(3, n, np.float32)}) for n in (1, 2, 5)]
    new = averaged(weights, updates, strategy=fedprox())
    assert np.array_equal(new["a"], averaged(weights, updates)["a"])


@pytest.mark.parametrize("num_sites", [2, 50])
def test_memory_does_not_grow_with_the_number_of_sites(num_sites: int) -> None:
    """When a site's update is asked for, none of those before is alive any more."""
    weights = {"a": np.zeros(8, np.float32)}
    given_out: list[weakref.ref[np.ndarray]] = []

    def updates() -> Iterator[Update]:
        for number in range(num_sites):
            assert [ref for ref in given_out if ref() is not None] == []
            array = np.full(8, number, np.float32)
            given_out.append(weakref.ref(array))
            update = Update(f"s{number}", 1, {"a": array})
            del array
            yield update
            del update

    new, _ = fedavg().step(weights, updates(), {})
    assert len(given_out) == num_sites
    assert new["a"][0] == (num_sites - 1) / 2

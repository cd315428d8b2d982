"""A mean is a mean: against numpy, in any order, within bounds, one update at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from strategies import Strategy, Update
from strategies.averaging import fedavg, fedavgm, fedprox

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


# --- FedAvgM


def rounds_of(num_rounds: int, *, seed: int = 0) -> list[list[Update]]:
    """Return the updates of three sites in each of many rounds."""
    random = np.random.default_rng(seed)
    return [
        [
            Update(
                f"s{n}",
                n + 1,
                {name: random.normal(size=s).astype(np.float32) for name, s in SHAPES.items()},
            )
            for n in range(3)
        ]
        for _ in range(num_rounds)
    ]


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_fedavgm_steps_as_torchs_gradient_descent_with_momentum(momentum: float) -> None:
    """Its gradients are the mean updates, the other way round, and its learning rate is one."""
    strategy, weights = fedavgm(momentum=momentum), zeros()
    state = strategy.init(weights)
    theirs = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=1.0, momentum=momentum)
    for updates in rounds_of(8):
        weights, state = strategy.step(weights, iter(updates), state)
        for name, parameter in theirs.items():
            stacked = np.stack([update.arrays[name].astype(float) for update in updates])
            mean = np.average(stacked, axis=0, weights=[1, 2, 3])
            parameter.grad = -torch.as_tensor(mean, dtype=torch.float64)
        optimizer.step()
        for name, parameter in theirs.items():
            assert weights[name] == pytest.approx(parameter.numpy(), rel=1e-6, abs=1e-5)
            assert weights[name].dtype == np.float32


def test_fedavgm_without_momentum_is_fedavg() -> None:
    (updates,) = rounds_of(1)
    plain, other = (
        averaged(zeros(), updates),
        averaged(zeros(), updates, strategy=fedavgm(momentum=0.0)),
    )
    assert all(np.array_equal(plain[name], other[name]) for name in SHAPES)


def test_a_state_saved_and_loaded_continues_bit_for_bit(tmp_path: Path) -> None:
    strategy, rounds = fedavgm(), rounds_of(6)
    weights, state = zeros(), strategy.init(zeros())
    for number, updates in enumerate(rounds):
        if number == 3:
            np.savez(tmp_path / "state.npz", **state)
            np.savez(tmp_path / "weights.npz", **weights)
        weights, state = strategy.step(weights, iter(updates), state)
    resumed, saved = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("weights", "state"))
    for updates in rounds[3:]:
        resumed, saved = fedavgm().step(resumed, iter(updates), saved)
    assert all(np.array_equal(weights[name], resumed[name]) for name in SHAPES)
    assert all(np.array_equal(state[name], saved[name]) for name in SHAPES)


def test_fedavgm_leaves_its_state_and_weights_alone() -> None:
    strategy, weights = fedavgm(), zeros()
    first, second = rounds_of(2)
    weights, state = strategy.step(weights, iter(first), strategy.init(weights))
    before = [{n: v.copy() for n, v in each.items()} for each in (weights, state)]
    strategy.step(weights, iter(second), state)
    for each, kept in zip((weights, state), before, strict=True):
        assert all(np.array_equal(each[name], kept[name]) for name in SHAPES)


def test_fedavgm_moves_on_when_updates_have_stopped() -> None:
    still = [Update("s", 1, {"a": np.zeros(1, np.float32)})]
    strategy, weights = fedavgm(momentum=0.5), {"a": np.zeros(1, np.float32)}
    state = strategy.init(weights)
    moved = []
    for updates in ([Update("s", 1, {"a": np.ones(1, np.float32)})], still, still):
        weights, state = strategy.step(weights, iter(updates), state)
        moved.append(float(weights["a"][0]))
    assert moved == [1.0, 1.5, 1.75]


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0, float("nan")])
def test_a_momentum_that_never_ends_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"expected a momentum in \[0, 1\)"):
        fedavgm(momentum=momentum)


def test_no_patients_are_no_mean_for_fedavgm_either() -> None:
    with pytest.raises(ValueError, match="expected at least one update with patients"):
        averaged(zeros(), [], strategy=fedavgm())

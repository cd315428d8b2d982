"""Lloyd's step is scikit-learn's, whoever holds the patients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from strategies.base import Update
from strategies.lloyd import lloyd


def told(points: np.ndarray, centres: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a site with ``points`` sends: sums of offsets, counts, as shares of its own."""
    nearest = np.square(points[:, None] - centres[None]).sum(axis=2).argmin(axis=1)
    sums = np.zeros_like(centres)
    np.add.at(sums, nearest, points - centres[nearest])
    counts = np.bincount(nearest, minlength=len(centres))[None]
    return {
        "centres": np.zeros_like(centres, dtype=np.float32),
        "sums.weight": (sums / len(points)).astype(np.float32),
        "counts.weight": (counts / len(points)).astype(np.float32),
    }


def weights_of(centres: np.ndarray) -> dict[str, np.ndarray]:
    k, d = centres.shape
    zeros = {"sums.weight": np.zeros((k, d)), "counts.weight": np.zeros((1, k))}
    return {n: v.astype(np.float32) for n, v in ({"centres": centres} | zeros).items()}


@given(seed=st.integers(0, 1000), cut=st.integers(5, 55))
def test_a_step_over_sites_is_scikit_learns_step_on_all_points(seed: int, cut: int) -> None:
    random = np.random.default_rng(seed)
    points = random.normal(size=(60, 3)) + 3 * random.integers(0, 3, size=(60, 1))
    centres = points[random.choice(60, 3, replace=False)]
    updates = [
        Update(site, len(part), told(part, centres))
        for site, part in (("a", points[:cut]), ("b", points[cut:]))
    ]
    strategy = lloyd(smallest_share=1e-6)
    moved, _ = strategy.step(weights_of(centres), updates, strategy.init(weights_of(centres)))
    labels = np.square(points[:, None] - centres[None]).sum(axis=2).argmin(axis=1)
    expected = np.stack([points[labels == k].mean(axis=0) for k in range(3)])
    assert moved["centres"] == pytest.approx(expected, abs=1e-4)
    assert not moved["sums.weight"].any()
    assert not moved["counts.weight"].any()


def test_steps_end_where_scikit_learn_ends() -> None:
    random = np.random.default_rng(0)
    middles = np.repeat([[0.0, 0.0], [4.0, 8.0], [12.0, 0.0]], 50, axis=0)
    points = middles + random.normal(size=(150, 2))
    centres = points[[0, 60, 110]]
    weights, strategy = weights_of(centres), lloyd(smallest_share=1e-6)
    for _ in range(20):
        now = weights["centres"].astype(float)
        halves = (("a", points[::2]), ("b", points[1::2]))
        updates = [Update(site, len(half), told(half, now)) for site, half in halves]
        weights, _ = strategy.step(weights, updates, {})
    found = KMeans(3, init=centres, n_init=1, max_iter=20).fit(points).cluster_centers_
    assert weights["centres"] == pytest.approx(found, abs=1e-3)


def test_a_centre_of_hardly_anybody_moves_as_if_it_had_the_smallest_share() -> None:
    weights = weights_of(np.zeros((2, 1)))
    update = weights_of(np.zeros((2, 1))) | {
        "sums.weight": np.array([[0.5], [0.02]], np.float32),
        "counts.weight": np.array([[1.0, -0.01]], np.float32),
    }
    moved, _ = lloyd(smallest_share=0.04).step(weights, [Update("a", 10, update)], {})
    assert moved["centres"].ravel() == pytest.approx([0.5, 0.5])


def test_a_net_without_centres_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a net of centres"):
        lloyd().step({"a": np.zeros(2, np.float32)}, [], {})


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="expected a smallest_share in"):
        lloyd(smallest_share=share)

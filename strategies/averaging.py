"""Weighted averages of updates.

References:
    McMahan et al. 2017, Communication-efficient learning of deep networks from decentralized data,
    https://arxiv.org/abs/1602.05629. Li et al. 2020, Federated optimization in heterogeneous
    networks, https://arxiv.org/abs/1812.06127. Hsu, Qi and Brown 2019, Measuring the effects of
    non-identical data distribution, https://arxiv.org/abs/1909.06335 (FedAvgM).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from shared_models.weights import Array, Weights
from strategies.base import State, Strategy, Update


def fedavg() -> Strategy:
    """Return the mean of the updates, weighted by each site's number of training patients.

    Guarantees:
        Memory does not grow with the number of sites.
        The order of the sites changes nothing beyond the last bit.
        Each weight moves no further than the site that moves it most.
    """
    return Strategy(_no_state, _average)


def fedprox() -> Strategy:
    """Return FedProx: the same mean; its pull towards the global weights acts at the sites.

    The strength is the plan's ``training.proximal_mu``.
    """
    return fedavg()


def fedavgm(*, momentum: float = 0.9) -> Strategy:
    """Return FedAvgM: the mean update joins what is left of those before it, and moves the weights.

    Where every round is one step of plain gradient descent, this is gradient descent with momentum.

    Raises:
        ValueError: if ``momentum`` is not in [0, 1).
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"expected a momentum in [0, 1), got {momentum}")

    def init(weights: Weights) -> State:
        return {name: np.zeros(value.shape, np.float64) for name, value in weights.items()}

    def step(
        weights: Weights, updates: Iterable[Update], state: State
    ) -> tuple[dict[str, Array], State]:
        mean = _mean(weights, updates)
        velocity = {name: momentum * state[name] + mean.pop(name) for name in weights}
        moved = {
            name: (value + velocity[name]).astype(np.float32) for name, value in weights.items()
        }
        return moved, velocity

    return Strategy(init, step)


def _no_state(weights: Weights) -> State:
    return {}


def _average(
    weights: Weights, updates: Iterable[Update], state: State
) -> tuple[dict[str, Array], State]:
    mean = _mean(weights, updates)
    return {n: (value + mean.pop(n)).astype(np.float32) for n, value in weights.items()}, state


def _mean(weights: Weights, updates: Iterable[Update]) -> dict[str, NDArray[np.float64]]:
    sums = {name: np.zeros(value.shape, np.float64) for name, value in weights.items()}
    total = 0
    for update in updates:
        total += update.num_patients
        _add(sums, update)
        del update  # or it would live on while the next one is fetched
    if total <= 0:
        raise ValueError("expected at least one update with patients, got none")
    for value in sums.values():
        value /= total
    return sums


def _add(sums: dict[str, NDArray[np.float64]], update: Update) -> None:
    for name, value in update.arrays.items():
        sums[name] += update.num_patients * value.astype(np.float64)

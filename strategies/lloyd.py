"""Lloyd's step of k-means, from the sums and counts that sites send as updates.

References:
    Lloyd 1982, Least squares quantization in PCM, IEEE Transactions on Information Theory 28(2).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shared_models.weights import Array, Weights
from strategies.averaging import _mean, _no_state
from strategies.base import State, Strategy, Update

CENTRES, SUMS, COUNTS = "centres", "sums.weight", "counts.weight"


def lloyd(*, smallest_share: float = 0.01) -> Strategy:
    """Return the strategy that moves each centre to the mean of what is nearest to it.

    ``sums.weight`` (k, d) holds the offsets from each centre, summed, and ``counts.weight`` (1, k)
    how many there are, both as shares of all patients; they begin each round at zero. A centre
    whose share is under ``smallest_share`` moves as if it had that: noise on a small count would
    throw it far off.

    Raises:
        ValueError: if ``smallest_share`` is not in (0, 1).
    """
    if not 0 < smallest_share < 1:
        raise ValueError(f"expected a smallest_share in (0, 1), got {smallest_share}")

    def step(
        weights: Weights, updates: Iterable[Update], state: State
    ) -> tuple[dict[str, Array], State]:
        missing = [name for name in (CENTRES, SUMS, COUNTS) if name not in weights]
        if missing:
            raise ValueError(f"expected a net of centres, it lacks {', '.join(missing)}")
        mean = _mean(weights, updates)
        shares = np.maximum(mean[COUNTS].reshape(-1, 1), smallest_share)
        moved = {name: value.astype(np.float32) for name, value in weights.items()}
        moved[CENTRES] = (weights[CENTRES] + mean[SUMS] / shares).astype(np.float32)
        return moved, state

    return Strategy(_no_state, step)

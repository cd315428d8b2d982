"""Where random numbers come from: two functions, whoever draws behind them.

What is private draws from ``client.noise.secure``, which has the same face.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Randomness(NamedTuple):
    """``uniform(n)``: float64 (n,) in [0, 1); ``normal(n)``: float64 (n,), mean 0, deviation 1."""

    uniform: Callable[[int], NDArray[np.float64]]
    normal: Callable[[int], NDArray[np.float64]]


def seeded(*parts: int | str) -> Randomness:
    """Return a reproducible source; never for noise that protects anybody."""
    words = [p if isinstance(p, int) else int.from_bytes(p.encode(), "big") for p in parts]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
    return Randomness(generator.random, generator.standard_normal)

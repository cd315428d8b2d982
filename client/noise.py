"""Randomness that protects privacy: AES-256 in counter mode, keyed by the operating system.

``secure()`` is the only source the private path uses. ``seeded(seed)`` has the same face for tests
and for training without privacy, where the same seed must give the same model.

Guarantees:
    Normal draws have mean 0 and the stated standard deviation.
    Two secure sources never share a key.

References:
    Mironov 2012, On significance of the least significant bits for differential privacy; Holohan
    and Braghin 2021, Secure random sampling in differential privacy, https://arxiv.org/abs/2107.10138:
    a sum of several draws cannot be inverted to the uniforms it came from. Four are summed here, as
    in Opacus's secure mode. Not covered: side channels by timing, and the rounding of the float32
    sum the noise is added to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

NUM_SUMMED = 4


class Randomness(NamedTuple):
    """``uniform(n)``: float64 (n,) in [0, 1); ``normal(n)``: float64 (n,), mean 0, deviation 1."""

    uniform: Callable[[int], NDArray[np.float64]]
    normal: Callable[[int], NDArray[np.float64]]


def secure() -> Randomness:
    """Return a cryptographically secure source with a fresh key from the operating system."""
    cipher = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16)))
    stream = cipher.encryptor()

    def uniform(n: int) -> NDArray[np.float64]:
        raw = np.frombuffer(stream.update(bytes(8 * n)), dtype="<u8")
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(n: int) -> NDArray[np.float64]:
        total = np.zeros(n)
        for _ in range(NUM_SUMMED):
            total += _box_muller(uniform, n)
        total /= np.sqrt(NUM_SUMMED)
        return total

    return Randomness(uniform, normal)


def seeded(*parts: int | str) -> Randomness:
    """Return a reproducible source; never for noise that protects anybody."""
    words = [p if isinstance(p, int) else int.from_bytes(p.encode(), "big") for p in parts]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
    return Randomness(generator.random, generator.standard_normal)


def _box_muller(uniform: Callable[[int], NDArray[np.float64]], n: int) -> NDArray[np.float64]:
    half = (n + 1) // 2
    radius = np.sqrt(-2 * np.log(1 - uniform(half)))  # 1 - u is in (0, 1]
    angle = 2 * np.pi * uniform(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]

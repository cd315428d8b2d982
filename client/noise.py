"""Randomness that protects privacy: AES-256 in counter mode, keyed by the operating system.

``secure()`` is the only source the private path uses. ``seeded`` (``shared_models.randomness``) has
the same face for tests and for training without privacy, where a seed must give the same model.

Computed noise is not the real-valued noise of the proof: a guessed sum, taken away from what was
released, may leave a number no draw could have given (Mironov), and the last digits of what was
released may tell those of the sum (Haney et al.). Two things stand against that. Every draw is a
sum of sixty-four, and of sixty-four such sums four are thrown away, so that the others cannot be
solved for what they were made of. And ``client.dp.add_noise`` adds in float64, then rounds to a
grid that depends on the noise's deviation only.

Not covered: the rounding of the float32 sums of gradients before noise is added, by which one
patient's influence may exceed the clipping norm in its last digits; timing; whoever can read this
process's memory; a broken operating system or OpenSSL.

Guarantees:
    Normal draws have mean 0 and the stated standard deviation.
    Two secure sources never share a key.
    Each normal draw is a sum of sixty-four, and they cannot be solved for.

Design: a turn of sixty-four independent normal draws by an orthogonal matrix is again sixty-four
independent normal draws. That costs one draw a number where the plain sum of four (Opacus's secure
mode) costs four. 32 pairs of some 50 random bits each make 60 numbers, each released as one of some
2^24 (a grid of 2^-20 of the deviation, eight deviations to either side): about 2^160 draws lead to
any one release. Radius and angle are float32, their products and sums float64, so that the sums lie
on no lattice near as coarse as the grid.

References:
    Mironov 2012, On significance of the least significant bits for differential privacy; Holohan
    and Braghin 2021, Secure random sampling in differential privacy,
    https://arxiv.org/abs/2107.10138, section 5: sums of several draws; Haney et al. 2022,
    Precision-based attacks and interval refining, https://arxiv.org/abs/2207.13793: what the last
    digits tell.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from shared_models.randomness import Randomness

NUM_MIXED, NUM_DROPPED = 64, 4
#: As many draws at once as stay in a processor's cache.
_AT_ONCE = NUM_MIXED * 512
_SIGNS = np.array([[1.0, 1.0], [1.0, -1.0]])
_HADAMARD = np.kron(np.kron(_SIGNS, _SIGNS), _SIGNS)  # (8, 8); its square is 8 times the identity


def secure() -> Randomness:
    """Return a cryptographically secure source with a fresh key from the operating system."""
    cipher = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16)))
    stream = cipher.encryptor()
    blank, unused = bytes(4 * _AT_ONCE), np.empty(0)

    def uniform(n: int) -> NDArray[np.float64]:
        raw = np.frombuffer(stream.update(bytes(8 * n)), dtype="<u8")
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(n: int) -> NDArray[np.float64]:
        nonlocal unused
        drawn, done = np.empty(n), 0
        while done < n:
            if not len(unused):
                bits = np.frombuffer(stream.update(blank), dtype="<u4")
                unused = _mixed(_pairs(bits.reshape(2, -1)))
            taken = unused[: n - done]
            drawn[done : done + len(taken)] = taken
            unused, done = unused[len(taken) :], done + len(taken)
        return drawn

    return Randomness(uniform, normal)


def _pairs(bits: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return normal draws by Box and Muller: random bits (2, n) to radius times cosine and sine."""
    radius = bits[0].astype(np.float32)
    radius += np.float32(0.5)  # the middle of one of 2^32 steps from 0 to 1, never 0
    radius *= np.float32(2.0**-32)
    np.log(radius, out=radius)
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle = bits[1].view(np.int32).astype(np.float32)
    angle *= np.float32(np.pi * 2.0**-31)
    draws: NDArray[np.float64] = np.empty(bits.shape)
    draws[0], draws[1] = np.cos(angle), np.sin(angle)
    draws *= radius.astype(np.float64)
    return draws


def _mixed(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn draws by sixty-fours and drop four of each: (2, n) to (60/64 of 2 n,).

    The matrix is the Kronecker product of two of (8, 8), applied one after the other.
    """
    once = np.matmul(_HADAMARD / 8, draws.reshape(8, -1))
    twice: NDArray[np.float64] = np.matmul(_HADAMARD, once.reshape(8, 8, -1))
    return twice.reshape(NUM_MIXED, -1)[: NUM_MIXED - NUM_DROPPED].ravel()

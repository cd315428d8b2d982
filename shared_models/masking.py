"""Secure aggregation: vectors that say nothing by themselves and add up to the truth together.

Every two sites share a secret (X25519). From it and the round's label both draw the same pad; one
adds it, the other takes it away, so that all pads vanish from the sum over all sites and only
there. Numbers are whole steps of a grid, modulo 2**64, where adding is exact.

Guarantees:
    The sum of all masked vectors is the sum of the vectors, to half a step of the grid each.
    A masked vector is uniformly random to whoever lacks the pad it shares with one honest site.
    Another label makes other pads; who uses a label twice gives the difference away.

Design: pads of a site that drops out are not recovered. The round is asked again, under another
label and with fresh noise, of those that are left: no shares of secrets to store, and no way to
make an honest site look lost so as to open its vector.

References:
    Bonawitz et al. 2017, Practical secure aggregation for privacy-preserving machine learning,
    section 4.0.1, https://doi.org/10.1145/3133956.3133982.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from shared_models.errors import DocumentError
from shared_models.signing import write_secret

#: What a whole number stands for. Far below any noise that protects anybody.
GRID = 2.0**-32
#: The largest size of a number that can be masked, so that a thousand sites' sums never wrap.
LARGEST = 2.0**20

Masked = NDArray[np.uint64]


def masked(
    values: NDArray[np.floating], *, own: X25519PrivateKey, peers: Iterable[str], label: str
) -> Masked:
    """Return ``values`` on the grid, hidden under one pad for each of ``peers``.

    Args:
        values: float (n,).
        own: this site's masking key.
        peers: the other sites' public masking keys, hexadecimal.
        label: the same for all, and never used before.

    Raises:
        OverflowError: if a number is over ``LARGEST``, or not finite.
        ValueError: if there is no peer, or a key is not a public masking key of somebody else.
    """
    keys, mine = sorted(set(peers)), public_mask_key(own)
    if not keys or mine in keys:
        raise ValueError("expected the masking keys of other sites, at least one")
    exact = np.asarray(values, dtype=np.float64)
    if not (np.abs(exact) <= LARGEST).all():
        raise OverflowError(f"expected finite numbers of at most {LARGEST:g}")
    total: Masked = np.rint(exact / GRID).astype(np.int64).view(np.uint64)
    for key in keys:
        pad = _pad(own, key, label, len(total))
        total = total + pad if mine < key else total - pad
    return total


def opened(total: Masked) -> NDArray[np.float64]:
    """Return the sum that the masked vectors of all sites together stand for: float64 (n,)."""
    return total.view(np.int64).astype(np.float64) * GRID


def create_mask_key(file: Path) -> X25519PrivateKey:
    """Make a masking key and write it to ``file``, readable by its owner alone.

    Raises:
        FileExistsError: if ``file`` exists; keys are never overwritten.
    """
    key = X25519PrivateKey.generate()
    write_secret(file, key.private_bytes_raw())
    return key


def load_mask_key(file: Path) -> X25519PrivateKey:
    """Read a masking key.

    Raises:
        DocumentError: if the file is missing or holds no such key.
    """
    try:
        return X25519PrivateKey.from_private_bytes(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise DocumentError(f"cannot read the masking key {file}: {type(error).__name__}") from None


def public_mask_key(key: X25519PrivateKey) -> str:
    """Return the public half of ``key``, in hexadecimal."""
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return raw.hex()


def _pad(own: X25519PrivateKey, peer: str, label: str, size: int) -> Masked:
    """Draw the pad of two sites: AES-256 in counter mode, keyed by their secret and the label."""
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(peer)))
    except ValueError:
        raise ValueError("expected public masking keys") from None
    derive = HKDF(hashes.SHA256(), length=32, salt=None, info=b"consilia pad v1\n" + label.encode())
    cipher = Cipher(algorithms.AES256(derive.derive(secret)), modes.CTR(bytes(16)))
    return np.frombuffer(cipher.encryptor().update(bytes(8 * size)), dtype="<u8").astype(np.uint64)

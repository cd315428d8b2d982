"""Canonical bytes, SHA-256 digests and Ed25519 signatures.

What is signed is the canonical JSON of a contract: UTF-8, keys sorted, no white space, numbers as
Python's shortest round-trip form. Each signature is bound to the contract's class name, so that a
signed order can never pass for a signed approval.

Guarantees:
    The order of fields changes no canonical byte.
    What is read back from canonical bytes has the same canonical bytes.
    A signature over one kind of contract never verifies as another.
    A changed field breaks the signature.

References:
    RFC 8032, Edwards-Curve Digital Signature Algorithm.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from shared_models.contracts import Contract, Signature
from shared_models.errors import DocumentError
from shared_models.files import create


def canonical(value: Contract) -> bytes:
    """Return the one byte string that stands for ``value``."""
    data = value.model_dump(mode="json", by_alias=True)
    text = json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest(value: Contract | bytes) -> str:
    """Return the SHA-256 of ``value``'s canonical bytes, in hexadecimal."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical(value)).hexdigest()


def public_key(key: Ed25519PrivateKey) -> str:
    """Return the public half of ``key``, in hexadecimal."""
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return raw.hex()


def sign(value: Contract, *, key: Ed25519PrivateKey) -> Signature:
    """Sign ``value`` with ``key``."""
    return Signature(key=public_key(key), value=key.sign(_message(value)).hex())


def is_signed_by(value: Contract, signature: Signature | None, *, key: str) -> bool:
    """Tell whether ``signature`` is ``key``'s own over ``value``; any doubt is a no."""
    if signature is None or signature.key != key:
        return False
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature.value), _message(value))
    except (InvalidSignature, ValueError):
        return False
    return True


def create_key(file: Path) -> Ed25519PrivateKey:
    """Make an Ed25519 key and write it to ``file``, readable by its owner alone.

    Raises:
        FileExistsError: if ``file`` exists; keys are never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_secret(file, pem)
    return key


def write_secret(file: Path, content: bytes) -> None:
    """Write ``content`` to a new file only its owner can read, all of it or nothing.

    Raises:
        FileExistsError: if ``file`` exists.
    """
    create(file, content, mode=0o600)


def load_key(file: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key.

    Raises:
        DocumentError: if the file is missing or holds no such key.
    """
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DocumentError(
            f"cannot read the signing key {file}: {type(error).__name__}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DocumentError(f"expected an Ed25519 key in {file}, got another kind")
    return key


def _message(value: Contract) -> bytes:
    return f"consilia {type(value).__name__} v1\n".encode() + canonical(value)

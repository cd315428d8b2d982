"""Letters: what travels between coordinator and site, whoever carries it.

A letter is one signed contract and, if weights belong to it, their flat vector cut into buckets.
The Flower doors carry letters; the in-process runtime hands them over directly. Nothing here knows
how they travel.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from shared_models.contracts import Contract, Refusal, RoundOrder, Signature, SiteReply
from shared_models.errors import DocumentError, SignatureError
from shared_models.signing import canonical, is_signed_by, sign
from shared_models.weights import Array

LetterKind = Literal["order", "reply", "refusal"]
KINDS: dict[LetterKind, type[Contract]] = {
    "order": RoundOrder,
    "reply": SiteReply,
    "refusal": Refusal,
}
BUCKET_BYTES = 16 * 2**20


class Letter(NamedTuple):
    """A signed contract and the buckets of its weights, as they travel."""

    kind: str
    document: str
    key: str
    signature: str
    buckets: tuple[bytes, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of payload, without the carrier's own framing."""
        return len(self.document.encode(errors="surrogatepass")) + sum(map(len, self.buckets))


def seal(value: Contract, *, key: Ed25519PrivateKey, vector: Array | None = None) -> Letter:
    """Sign ``value`` and put it in a letter, with ``vector`` (float32, 1-D) if there is one.

    Raises:
        ValueError: if ``value`` is neither an order nor a reply nor a refusal.
    """
    kind = next((kind for kind, contract in KINDS.items() if type(value) is contract), None)
    if kind is None:
        raise ValueError(
            f"expected an order, a reply or a refusal, got a contract {type(value).__name__}"
        )
    signature = sign(value, key=key)
    buckets = () if vector is None else to_buckets(vector)
    return Letter(kind, canonical(value).decode(), signature.key, signature.value, buckets)


def unseal(letter: Letter, *, key: str) -> tuple[Contract, Array | None]:
    """Open a letter signed by ``key`` (hexadecimal public key).

    Raises:
        DocumentError: if the letter cannot be read.
        SignatureError: if ``key`` did not sign it.
    """
    contract = KINDS.get(letter.kind)  # type: ignore[call-overload]
    if contract is None:
        raise DocumentError(f"expected a letter that is one of {', '.join(KINDS)}")
    try:
        value = contract.model_validate_json(letter.document)
        signature = Signature(key=letter.key, value=letter.signature)
    except ValidationError as error:
        raise DocumentError(f"the {letter.kind} cannot be read") from error
    if not is_signed_by(value, signature, key=key):
        raise SignatureError(f"the {letter.kind} is not signed by the expected key")
    return value, from_buckets(letter.buckets) if letter.buckets else None


def to_buckets(vector: Array) -> tuple[bytes, ...]:
    """Cut a float32 vector into little-endian buckets of at most 16 MiB."""
    raw = np.ascontiguousarray(vector, dtype="<f4").view(np.uint8)
    return tuple(
        raw[start : start + BUCKET_BYTES].tobytes()
        for start in range(0, max(len(raw), 1), BUCKET_BYTES)
    )


def from_buckets(buckets: tuple[bytes, ...]) -> Array:
    """Join buckets into a float32 vector.

    Raises:
        DocumentError: if their sizes do not make whole numbers.
    """
    if any(len(bucket) % 4 for bucket in buckets):
        raise DocumentError("expected buckets of whole float32 numbers")
    parts = [np.frombuffer(bucket, dtype="<f4") for bucket in buckets]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

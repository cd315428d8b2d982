"""Letters: what travels between coordinator and site, whoever carries it.

A letter is one signed contract and, if weights belong to it, their flat vector cut into buckets:
float32, or whole numbers of 64 bits where a reply says that it is masked.
The Flower doors carry letters; the in-process runtime hands them over directly. Nothing here knows
how they travel.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import ValidationError

from shared_models.contracts import Contract, Refusal, RoundOrder, Signature, SiteReply
from shared_models.errors import DocumentError, SignatureError
from shared_models.signing import canonical, is_signed_by, sign

Vector = NDArray[Any]

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


def seal(value: Contract, *, key: Ed25519PrivateKey, vector: Vector | None = None) -> Letter:
    """Sign ``value`` and put it in a letter, with ``vector`` (1-D) if there is one.

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


def unseal(letter: Letter, *, key: str) -> tuple[Contract, Vector | None]:
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
    is_masked = isinstance(value, SiteReply) and value.is_masked
    kind = "<u8" if is_masked else "<f4"
    return value, from_buckets(letter.buckets, kind=kind) if letter.buckets else None


def to_buckets(vector: Vector) -> tuple[bytes, ...]:
    """Cut a vector into little-endian buckets of at most 16 MiB; what is not uint64 is float32."""
    kind = "<u8" if vector.dtype == np.uint64 else "<f4"
    raw = np.ascontiguousarray(vector, dtype=kind).view(np.uint8)
    return tuple(
        raw[start : start + BUCKET_BYTES].tobytes()
        for start in range(0, max(len(raw), 1), BUCKET_BYTES)
    )


def from_buckets(buckets: tuple[bytes, ...], *, kind: str = "<f4") -> Vector:
    """Join buckets into a vector of that kind of number.

    Raises:
        DocumentError: if their sizes do not make whole numbers.
    """
    if any(len(bucket) % np.dtype(kind).itemsize for bucket in buckets):
        numbers = "float32" if kind == "<f4" else "64-bit"
        raise DocumentError(f"expected buckets of whole {numbers} numbers")
    parts = [np.frombuffer(bucket, dtype=kind) for bucket in buckets]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

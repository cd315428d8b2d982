"""Letters: what travels between coordinator and site, whoever carries it.

A letter is one signed contract and, if weights belong to it, their flat vector cut into buckets:
float32, or whole numbers of 64 bits where a reply says that it is masked. The buckets may lie in a
file, and are then read one at a time.
The Flower doors carry letters; the in-process runtime hands them over directly. Nothing here knows
how they travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import ValidationError

from shared_models.contracts import Contract, Refusal, RoundOrder, Signature, SiteReply
from shared_models.errors import DocumentError, SignatureError
from shared_models.signing import canonical, is_signed_by, sign
from shared_models.weights import Flat, flat_of, joined, vector_of

Vector = NDArray[Any]

LetterKind = Literal["order", "reply", "refusal"]
KINDS: dict[LetterKind, type[Contract]] = {
    "order": RoundOrder,
    "reply": SiteReply,
    "refusal": Refusal,
}
BUCKET_BYTES = 16 * 2**20


class Buckets(Sequence[bytes]):
    """Where the bytes of a letter's weights lie, cut into buckets: each is made when asked for."""

    def __init__(self, flat: Flat, sizes: Sequence[int] | None = None) -> None:
        self.flat = flat
        if sizes is None:
            whole, rest = divmod(flat.size, BUCKET_BYTES)
            sizes = [BUCKET_BYTES] * whole + [rest] * bool(rest or not whole)
        self.sizes, self.starts = tuple(sizes), list(accumulate(sizes, initial=0))

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[bytes, ...]: ...

    def __getitem__(self, index: int | slice) -> bytes | tuple[bytes, ...]:
        """Return a bucket, or a few."""
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        return bytes(self.part(range(len(self))[index]).read(0, self.sizes[index]))

    def __len__(self) -> int:
        return len(self.sizes)

    def __eq__(self, other: object) -> bool:
        """Whether all bytes of all buckets are equal."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def part(self, index: int) -> Flat:
        """Return where a bucket lies."""
        return self.flat.part(self.starts[index], self.starts[index + 1])


class Letter(NamedTuple):
    """A signed contract and the buckets of its weights, as they travel."""

    kind: str
    document: str
    key: str
    signature: str
    buckets: Sequence[bytes] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of payload, without the carrier's own framing."""
        return len(self.document.encode(errors="surrogatepass")) + sum(sizes_of(self.buckets))


def seal(value: Contract, *, key: Ed25519PrivateKey, vector: Vector | Flat | None = None) -> Letter:
    """Sign ``value`` and put it in a letter, with ``vector`` (1-D, or its bytes) if there is one.

    The vector is not copied: nobody may change it any more.

    Raises:
        ValueError: if ``value`` is neither an order nor a reply nor a refusal.
    """
    kind = next((kind for kind, contract in KINDS.items() if type(value) is contract), None)
    if kind is None:
        raise ValueError(
            f"expected an order, a reply or a refusal, got a contract {type(value).__name__}"
        )
    signature = sign(value, key=key)
    buckets = () if vector is None else in_buckets(vector)
    return Letter(kind, canonical(value).decode(), signature.key, signature.value, buckets)


def unseal(letter: Letter, *, key: str) -> tuple[Contract, Vector | None]:
    """Open a letter signed by ``key`` (hexadecimal public key), its vector in memory.

    Raises:
        DocumentError: if the letter cannot be read.
        SignatureError: if ``key`` did not sign it.
    """
    value, flat = opened(letter, key=key)
    return value, None if flat is None else vector_of(flat, numbers_of(value))


def opened(letter: Letter, *, key: str) -> tuple[Contract, Flat | None]:
    """Open a letter signed by ``key``, its vector's bytes where they lie.

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
    return value, flat_from(letter.buckets, numbers=numbers_of(value)) if letter.buckets else None


def numbers_of(value: Contract) -> str:
    """Return the kind of numbers that travel beside a contract."""
    return "<u8" if isinstance(value, SiteReply) and value.is_masked else "<f4"


def in_buckets(vector: Vector | Flat) -> Buckets:
    """Cut a vector into little-endian buckets of at most 16 MiB; what is not uint64 is float32."""
    if isinstance(vector, Flat):
        return Buckets(vector)
    numbers = np.uint64 if vector.dtype == np.uint64 else np.float32
    return Buckets(flat_of(vector.astype(numbers, copy=False)))


def flat_from(buckets: Sequence[bytes], *, numbers: str = "<f4") -> Flat:
    """Return the bytes of all buckets, which are not copied.

    Raises:
        DocumentError: if their sizes do not make whole numbers.
    """
    if any(size % np.dtype(numbers).itemsize for size in sizes_of(buckets)):
        named = "float32" if numbers == "<f4" else "64-bit"
        raise DocumentError(f"expected buckets of whole {named} numbers")
    if isinstance(buckets, Buckets):
        return buckets.flat
    return joined(parts_of(buckets))


def parts_of(buckets: Sequence[bytes]) -> list[Flat]:
    """Return where each bucket lies, without making it."""
    if isinstance(buckets, Buckets):
        return [buckets.part(index) for index in range(len(buckets))]
    return [flat_of_bytes(bucket) for bucket in buckets]


def flat_of_bytes(content: bytes) -> Flat:
    """Return bytes in memory as such that could lie anywhere."""
    return Flat(len(content), lambda start, stop: memoryview(content)[start:stop])


def sizes_of(buckets: Sequence[bytes]) -> Sequence[int]:
    """Return how long each bucket is, without making it."""
    return buckets.sizes if isinstance(buckets, Buckets) else [len(bucket) for bucket in buckets]

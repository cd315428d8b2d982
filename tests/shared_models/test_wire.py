"""A letter says what was signed, or it is not opened."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared_models import wire
from shared_models.contracts import Approval, Contract, Refusal, RoundOrder, SiteReply
from shared_models.errors import ConsiliaError, DocumentError, SignatureError
from shared_models.signing import canonical, public_key, sign
from shared_models.weights import vector_of
from shared_models.wire import Letter, flat_from, in_buckets, seal, unseal

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = public_key(KEY)
NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ORDER = RoundOrder(
    study="1" * 64,
    round_=3,
    kind="train",
    site="north",
    weights_digest="2" * 64,
    issued_at=NOON,
    expires_at=NOON,
)
REPLY = SiteReply(study="1" * 64, round_=3, kind="train", site="north", num_patients=4)
REFUSAL = Refusal(study="1" * 64, round_=3, kind="train", site="north", code="budget")
VECTOR = np.arange(7, dtype=np.float32)

finite = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32))


@pytest.mark.parametrize(
    ("value", "kind"), [(ORDER, "order"), (REPLY, "reply"), (REFUSAL, "refusal")]
)
def test_a_letter_is_opened_as_it_was_sealed(value: Contract, kind: str) -> None:
    letter = seal(value, key=KEY)
    assert letter.kind == kind
    assert unseal(letter, key=PUBLIC) == (value, None)


def test_weights_travel_beside_the_contract() -> None:
    value, vector = unseal(seal(ORDER, key=KEY, vector=VECTOR), key=PUBLIC)
    assert value == ORDER
    assert vector is not None
    assert vector.tolist() == VECTOR.tolist()


@given(vector=finite)
def test_any_numbers_survive_the_buckets_bit_for_bit(vector: np.ndarray) -> None:
    assert vector_of(flat_from(in_buckets(vector))).tobytes() == vector.tobytes()


@given(vector=finite, words=st.integers(1, 20))
def test_where_the_buckets_are_cut_changes_nothing(vector: np.ndarray, words: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "BUCKET_BYTES", 4 * words)
        buckets = in_buckets(vector)
    assert len(buckets) == -(-len(vector) // words)
    assert all(len(bucket) <= 4 * words for bucket in buckets)
    assert vector_of(flat_from(tuple(buckets))).tobytes() == vector.tobytes()


def test_buckets_hold_at_most_sixteen_mebibytes() -> None:
    vector = np.zeros(2**22 + 1, np.float32)
    assert [len(bucket) for bucket in in_buckets(vector)] == [2**24, 4]


def test_buckets_are_little_endian_whatever_the_machine() -> None:
    assert in_buckets(np.array([1.0], ">f4")) == (b"\x00\x00\x80\x3f",)


@pytest.mark.parametrize("buckets", [(b"abc",), (b"abcd", b"e"), (b"ab", b"cd"), (b"abcde",)])
def test_buckets_of_odd_sizes_are_refused(buckets: tuple[bytes, ...]) -> None:
    letter = seal(ORDER, key=KEY)._replace(buckets=buckets)
    with pytest.raises(DocumentError, match="whole float32 numbers"):
        unseal(letter, key=PUBLIC)


@given(vector=hnp.arrays(np.uint64, st.integers(0, 40)), words=st.integers(1, 20))
def test_whole_numbers_of_64_bits_travel_as_they_are_wherever_they_are_cut(
    vector: np.ndarray, words: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "BUCKET_BYTES", 8 * words)
        buckets = in_buckets(vector)
    found = vector_of(flat_from(buckets, numbers="<u8"), "<u8")
    assert found.dtype == np.dtype("<u8")
    assert found.tolist() == vector.tolist()


@pytest.mark.parametrize("is_masked", [True, False])
def test_a_reply_says_which_kind_of_numbers_travels_with_it(is_masked: bool) -> None:
    vector = np.array([2**63, 1, 0], np.uint64) if is_masked else np.ones(3, np.float32)
    said = REPLY.model_copy(update={"is_masked": is_masked})
    _, found = unseal(seal(said, key=KEY, vector=vector), key=PUBLIC)
    assert found is not None
    assert found.dtype == vector.dtype
    assert found.tolist() == vector.tolist()


def test_buckets_of_odd_sizes_are_refused_under_a_mask_too() -> None:
    said = REPLY.model_copy(update={"is_masked": True})
    letter = seal(said, key=KEY)._replace(buckets=(b"123456789012",))
    with pytest.raises(DocumentError, match="whole 64-bit numbers"):
        unseal(letter, key=PUBLIC)


def test_size_counts_the_payload_in_bytes() -> None:
    letter = seal(ORDER, key=KEY, vector=VECTOR)
    assert letter.size_bytes == len(canonical(ORDER)) + 4 * len(VECTOR)
    assert Letter("order", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "", "").size_bytes == 2


def test_a_letter_signed_by_another_is_refused() -> None:
    letter = seal(ORDER, key=Ed25519PrivateKey.generate())
    with pytest.raises(SignatureError, match="not signed by the expected key"):
        unseal(letter, key=PUBLIC)


def test_a_letter_that_claims_the_right_key_is_refused_all_the_same() -> None:
    letter = seal(ORDER, key=Ed25519PrivateKey.generate())._replace(key=PUBLIC)
    with pytest.raises(SignatureError):
        unseal(letter, key=PUBLIC)


@given(position=st.integers(0, 127), digit=st.sampled_from("0123456789abcdef"))
def test_a_forged_signature_is_refused(position: int, digit: str) -> None:
    letter = seal(ORDER, key=KEY)
    forged = letter.signature[:position] + digit + letter.signature[position + 1 :]
    if forged != letter.signature:
        with pytest.raises(SignatureError):
            unseal(letter._replace(signature=forged), key=PUBLIC)


@pytest.mark.parametrize(
    "change", [{"site": "south"}, {"round_": 4}, {"kind": "alone"}, {"weights_digest": "3" * 64}]
)
def test_a_changed_document_is_refused(change: dict[str, object]) -> None:
    letter = seal(ORDER, key=KEY)
    changed = json.dumps(json.loads(letter.document) | change)
    with pytest.raises(SignatureError):
        unseal(letter._replace(document=changed), key=PUBLIC)


def test_a_signature_made_for_an_approval_opens_no_letter() -> None:
    """The same key, but for another purpose."""
    approval = Approval(study="1" * 64, site="north", decision="approved", who="she", when=NOON)
    letter = seal(ORDER, key=KEY)._replace(signature=sign(approval, key=KEY).value)
    with pytest.raises(SignatureError):
        unseal(letter, key=PUBLIC)


def test_a_letter_cannot_be_passed_for_another_kind() -> None:
    letter = seal(REFUSAL, key=KEY)
    with pytest.raises(ConsiliaError):
        unseal(letter._replace(kind="reply"), key=PUBLIC)


@pytest.mark.parametrize("kind", ["", "approval", "Order", "\x00"])
def test_an_unknown_kind_is_refused(kind: str) -> None:
    with pytest.raises(DocumentError, match="one of order, reply, refusal"):
        unseal(seal(ORDER, key=KEY)._replace(kind=kind), key=PUBLIC)


@pytest.mark.parametrize(
    "change",
    [
        {"document": ""},
        {"document": "{}"},
        {"document": "\x00"},
        {"document": "[" * 100_000},
        {"document": json.dumps(json.loads(canonical(ORDER)) | {"extra": "MARKED-7731"})},
        {"key": ""},
        {"key": "MARKED-7731"},
        {"signature": ""},
        {"signature": "MARKED-7731"},
    ],
)
def test_what_cannot_be_read_is_refused_without_a_word_of_it(change: dict[str, str]) -> None:
    with pytest.raises(DocumentError, match=r"^the order cannot be read$"):
        unseal(seal(ORDER, key=KEY)._replace(**change), key=PUBLIC)


def test_only_letters_are_sealed() -> None:
    approval = Approval(study="1" * 64, site="north", decision="approved", who="she", when=NOON)
    with pytest.raises(ValueError, match="expected an order, a reply or a refusal"):
        seal(approval, key=KEY)

"""One byte string for one value, and a signature that means one thing only."""

from __future__ import annotations

import hashlib
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from shared_models.contracts import (
    Approval,
    Contract,
    Evaluation,
    PrivacyEvent,
    RoundOrder,
    Signature,
)
from shared_models.errors import DocumentError
from shared_models.plan import Choice
from shared_models.signing import (
    canonical,
    create_key,
    digest,
    is_signed_by,
    load_key,
    public_key,
    sign,
    write_secret,
)

KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ORDER: dict[str, Any] = {
    "study": "1" * 64,
    "round_": 3,
    "kind": "train",
    "site": "north",
    "weights_digest": "2" * 64,
    "issued_at": NOON,
    "expires_at": NOON + timedelta(minutes=10),
}
OTHER_ORDER: dict[str, Any] = {
    "study": "3" * 64,
    "round_": 4,
    "kind": "evaluate",
    "site": "south",
    "weights_digest": "4" * 64,
    "issued_at": NOON + timedelta(microseconds=1),
    "expires_at": NOON,
}

scalars = (
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
params = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True),
    scalars | st.lists(scalars, max_size=3) | st.lists(st.lists(scalars, min_size=1, max_size=2)),
    max_size=4,
)
metrics = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
    st.floats(allow_nan=False, allow_infinity=False),
    max_size=4,
)


class First(Contract):
    field: str


class Second(Contract):
    field: str


def test_canonical_bytes_are_the_json_everybody_would_write() -> None:
    event = PrivacyEvent(
        sample_rate=0.1, noise_multiplier=1.5, max_grad_norm=1.0, images_per_patient=4, steps=10
    )
    assert canonical(event) == (
        b'{"images_per_patient":4,"max_grad_norm":1.0,"mechanism":"gaussian",'
        b'"noise_multiplier":1.5,"noise_shares":1,"purpose":"train","relation":"add-or-remove-one",'
        b'"sample_rate":0.1,"sampler":"poisson","steps":10,"unit":"patient"}'
    )
    assert digest(event) == hashlib.sha256(canonical(event)).hexdigest()


@given(fields=st.permutations(list(ORDER)), given_metrics=metrics)
def test_the_order_of_fields_changes_no_canonical_byte(
    fields: list[str], given_metrics: dict[str, float]
) -> None:
    assert canonical(RoundOrder(**{name: ORDER[name] for name in fields})) == canonical(
        RoundOrder(**ORDER)
    )
    turned = dict(reversed(given_metrics.items()))
    assert canonical(Evaluation(metrics=turned, num_patients=1, num_images=1)) == canonical(
        Evaluation(metrics=given_metrics, num_patients=1, num_images=1)
    )


@given(params=params)
def test_what_is_read_back_from_canonical_bytes_has_the_same_canonical_bytes(
    params: dict[str, Any],
) -> None:
    choice = Choice(name="net", params=params)
    assert canonical(Choice.model_validate_json(canonical(choice))) == canonical(choice)


@given(params=params)
def test_canonical_bytes_are_sorted_json_without_white_space(params: dict[str, Any]) -> None:
    text = canonical(Choice(name="net", params=params)).decode()
    again = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert again == text


@given(first=params, second=params)
def test_different_parameters_have_different_digests(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    left, right = (Choice(name="net", params=params) for params in (first, second))
    assert left == right or digest(left) != digest(right)


def test_a_digest_of_bytes_is_their_sha256() -> None:
    assert digest(b"weights") == hashlib.sha256(b"weights").hexdigest()


def test_a_signature_holds_for_its_key_and_no_other() -> None:
    order, other = RoundOrder(**ORDER), ed25519.Ed25519PrivateKey.generate()
    signature = sign(order, key=KEY)
    assert is_signed_by(order, signature, key=public_key(KEY))
    assert not is_signed_by(order, signature, key=public_key(other))
    assert not is_signed_by(order, sign(order, key=other), key=public_key(KEY))


@pytest.mark.parametrize("field", list(ORDER))
def test_a_changed_field_breaks_the_signature(field: str) -> None:
    signature = sign(RoundOrder(**ORDER), key=KEY)
    changed = RoundOrder(**(ORDER | {field: OTHER_ORDER[field]}))
    assert not is_signed_by(changed, signature, key=public_key(KEY))


def test_a_signature_over_one_kind_of_contract_never_verifies_as_another() -> None:
    first, second = First(field="same"), Second(field="same")
    assert canonical(first) == canonical(second)
    signature = sign(first, key=KEY)
    assert is_signed_by(first, signature, key=public_key(KEY))
    assert not is_signed_by(second, signature, key=public_key(KEY))


def test_an_order_signed_never_passes_for_an_approval() -> None:
    approval = Approval(study="1" * 64, site="north", decision="approved", who="she", when=NOON)
    signature = sign(RoundOrder(**ORDER), key=KEY)
    assert not is_signed_by(approval, signature, key=public_key(KEY))


@pytest.mark.parametrize("position", [0, 1, 63, 64, 127])
def test_a_signature_with_one_digit_changed_is_none(position: int) -> None:
    order = RoundOrder(**ORDER)
    good = sign(order, key=KEY)
    digit = "0" if good.value[position] != "0" else "1"
    forged = good.model_copy(
        update={"value": good.value[:position] + digit + good.value[position + 1 :]}
    )
    assert not is_signed_by(order, forged, key=public_key(KEY))


def test_a_missing_signature_is_none() -> None:
    assert not is_signed_by(RoundOrder(**ORDER), None, key=public_key(KEY))


def test_a_signature_that_names_a_key_but_was_made_by_another_is_none() -> None:
    order = RoundOrder(**ORDER)
    other = sign(order, key=ed25519.Ed25519PrivateKey.generate())
    claimed = Signature(key=public_key(KEY), value=other.value)
    assert not is_signed_by(order, claimed, key=public_key(KEY))


def test_a_signature_that_names_another_key_than_its_own_is_none() -> None:
    order = RoundOrder(**ORDER)
    other = public_key(ed25519.Ed25519PrivateKey.generate())
    claimed = Signature(key=other, value=sign(order, key=KEY).value)
    assert not is_signed_by(order, claimed, key=public_key(KEY))


def test_a_key_that_is_no_key_signs_nothing() -> None:
    order = RoundOrder(**ORDER)
    nonsense = Signature.model_construct(key="zz", value=sign(order, key=KEY).value)
    assert not is_signed_by(order, nonsense, key="zz")


def test_a_key_is_written_for_its_owner_alone_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "signing.pem"
    key = create_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert public_key(load_key(file)) == public_key(key)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "signing.pem"
    create_key(file)
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        create_key(file)
    with pytest.raises(FileExistsError):
        write_secret(file, b"other")
    assert file.read_bytes() == before


def pem(key: Any, *, password: bytes | None = None) -> bytes:
    encryption: Any = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )


@pytest.mark.parametrize("kind", ["missing", "garbage", "folder", "rsa", "public", "password"])
def test_what_is_no_signing_key_is_told_by_its_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "signing.pem"
    public = KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    contents = {
        "garbage": b"\x00\xff",
        "rsa": pem(rsa.generate_private_key(public_exponent=65537, key_size=2048)),
        "public": public,
        "password": pem(KEY, password=b"secret"),
    }
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(contents[kind])
    with pytest.raises(DocumentError, match=r"signing\.pem"):
        load_key(file)

"""Masks: what a vector under one tells by itself, and what all of them tell together."""

from __future__ import annotations

import hmac
import stat
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from shared_models.errors import DocumentError
from shared_models.masking import (
    GRID,
    LARGEST,
    Masked,
    create_mask_key,
    load_mask_key,
    masked,
    opened,
    public_mask_key,
)

KEYS = [X25519PrivateKey.from_private_bytes(bytes([n + 1]) * 32) for n in range(6)]
NAMES = [public_mask_key(key) for key in KEYS]
MOST_SITES = 1000


def vectors(num_sites: int, size: int) -> st.SearchStrategy[np.ndarray]:
    numbers = st.floats(-LARGEST, LARGEST)
    return hnp.arrays(np.float64, (num_sites, size), elements=numbers)


def all_masked(values: np.ndarray, *, label: str = "round 0") -> list[Masked]:
    """Return each site's row of ``values``, masked among all rows' sites."""
    names = NAMES[: len(values)]
    return [
        masked(row, own=key, peers=[n for n in names if n != name], label=label)
        for row, key, name in zip(values, KEYS, names, strict=False)
    ]


def total(parts: list[Masked]) -> np.ndarray:
    return opened(np.sum(parts, axis=0, dtype=np.uint64))


# --- together


@given(st.integers(2, 6).flatmap(lambda n: st.integers(0, 9).flatmap(lambda s: vectors(n, s))))
def test_the_sum_of_all_masked_vectors_is_the_sum_to_half_a_step_of_the_grid_each(
    values: np.ndarray,
) -> None:
    found = total(all_masked(values))
    assert found.dtype == np.float64
    rounded = np.rint(values / GRID).astype(np.int64).sum(axis=0)  # exact, unlike a sum of floats
    assert np.array_equal(found, rounded * GRID)
    assert (np.abs(np.rint(values / GRID) * GRID - values) <= GRID / 2).all()


def test_a_thousand_sites_of_the_largest_numbers_do_not_wrap() -> None:
    for value in (LARGEST, -LARGEST):
        steps = np.full((MOST_SITES, 1), value / GRID).astype(np.int64).view(np.uint64)
        assert total(list(steps)).tolist() == [MOST_SITES * value]


def test_numbers_of_float32_are_masked_as_they_are() -> None:
    values = np.array([[0.5, -1.25], [1e-3, 3.0]], np.float32)
    assert total(all_masked(values)) == pytest.approx(values.astype(float).sum(0), abs=GRID)


@given(st.permutations(range(4)))
def test_the_order_in_which_peers_are_named_changes_nothing(order: list[int]) -> None:
    peers = [NAMES[n] for n in order if n != 2]
    values = np.arange(3.0)
    given_ = masked(values, own=KEYS[2], peers=peers, label="a")
    assert np.array_equal(given_, masked(values, own=KEYS[2], peers=sorted(peers), label="a"))
    assert np.array_equal(given_, masked(values, own=KEYS[2], peers=peers * 2, label="a"))


def test_arguments_are_left_alone() -> None:
    values, peers = np.arange(3.0), [NAMES[1], NAMES[0]]
    masked(values, own=KEYS[2], peers=peers, label="a")
    assert values.tolist() == [0.0, 1.0, 2.0]
    assert peers == [NAMES[1], NAMES[0]]


# --- alone


@pytest.mark.parametrize("value", [0.0, 1.0, -LARGEST])
@pytest.mark.parametrize("num_sites", [2, 5])
def test_a_masked_vector_is_uniformly_random_in_every_byte(num_sites: int, value: float) -> None:
    """The keys are fixed, so this either always holds or never."""
    found = all_masked(np.full((num_sites, 4096), value))[0]
    by_place = found.view(np.uint8).reshape(-1, 8)
    for place in by_place.T:
        counts = np.bincount(place, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    assert len(np.unique(found)) == len(found)


@pytest.mark.parametrize("num_sites", [2, 3, 6])
def test_the_sum_of_any_some_of_the_masked_vectors_does_not_open(num_sites: int) -> None:
    parts = all_masked(np.zeros((num_sites, 64)))
    assert not total(parts).any()
    for count in range(1, num_sites):
        for some in combinations(parts, count):
            assert len(np.unique(total(list(some)))) == 64
            assert np.abs(total(list(some))).mean() > LARGEST


def test_a_vector_masked_twice_under_one_label_gives_the_difference_away() -> None:
    """Why no label may be used again, and what ``client.masks`` stands against."""
    one, two = (all_masked(np.full((2, 8), value))[0] for value in (1.0, 3.0))
    assert opened(two - one).tolist() == [2.0] * 8


@pytest.mark.parametrize("other", ["round 1", "round 0 ", "", "Round 0"])
def test_another_label_makes_other_pads(other: str) -> None:
    values = np.zeros((3, 64))
    one, two = all_masked(values)[0], all_masked(values, label=other)[0]
    assert len(np.unique(one - two)) == 64
    assert np.abs(opened(one - two)).mean() > LARGEST


def test_sites_under_different_labels_do_not_open() -> None:
    parts = [*all_masked(np.zeros((2, 64)))[:1], *all_masked(np.zeros((2, 64)), label="b")[1:]]
    assert np.abs(total(parts)).mean() > LARGEST


def test_each_two_sites_have_a_pad_of_their_own() -> None:
    pads = {
        (one, two): masked(np.zeros(4), own=KEYS[one], peers=[NAMES[two]], label="a").tobytes()
        for one in range(4)
        for two in range(4)
        if one != two
    }
    assert len(set(pads.values())) == len(pads)


def test_the_pad_is_aes_in_counter_mode_keyed_by_the_two_sites_secret_and_the_label() -> None:
    """Written out once more, so that a change of any byte of it is seen."""
    own, other = KEYS[0], KEYS[1]
    secret = own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(NAMES[1])))
    assert secret == other.exchange(own.public_key())
    extracted = hmac.digest(bytes(32), secret, "sha256")  # RFC 5869, section 2.2
    key = hmac.digest(extracted, b"consilia pad v1\nround 0\x01", "sha256")  # section 2.3
    stream = Cipher(algorithms.AES(key), modes.CTR(b"\0" * 16)).encryptor().update(b"\0" * 40)
    pad = [int.from_bytes(stream[i : i + 8], "little") for i in range(0, 40, 8)]
    sign = 1 if NAMES[0] < NAMES[1] else -1
    found, theirs = (part.tolist() for part in all_masked(np.zeros((2, 5))))
    assert found == [sign * number % 2**64 for number in pad]
    assert theirs == [-sign * number % 2**64 for number in pad]


# --- what is refused


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, np.nextafter(LARGEST, np.inf), -2 * LARGEST, 1e300]
)
def test_a_number_too_large_or_not_finite_is_not_masked(value: float) -> None:
    with pytest.raises(OverflowError, match=r"at most 1\.04858e\+06"):
        masked(np.array([0.0, value, 0.0]), own=KEYS[0], peers=NAMES[1:2], label="a")


@pytest.mark.parametrize("peers", [[], [NAMES[0]], NAMES[:2]], ids=["none", "own", "own too"])
def test_a_mask_is_shared_with_other_sites_at_least_one(peers: list[str]) -> None:
    with pytest.raises(ValueError, match="the masking keys of other sites, at least one"):
        masked(np.zeros(3), own=KEYS[0], peers=peers, label="a")


@pytest.mark.parametrize(
    "key",
    ["", "zz" * 32, "ab" * 31, "ab" * 33, "00" * 32, "01" + "00" * 31],
    ids=["empty", "no digits", "short", "long", "zero", "of small order"],
)
def test_what_is_no_masking_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="expected public masking keys"):
        masked(np.zeros(3), own=KEYS[0], peers=[NAMES[1], key], label="a")


# --- key files


def test_a_masking_key_is_read_as_it_was_made(tmp_path: Path) -> None:
    made = create_mask_key(tmp_path / "mask.key")
    assert public_mask_key(load_mask_key(tmp_path / "mask.key")) == public_mask_key(made)
    assert bytes.fromhex(public_mask_key(made)) == made.public_key().public_bytes_raw()


def test_only_its_owner_can_read_a_masking_key(tmp_path: Path) -> None:
    create_mask_key(tmp_path / "mask.key")
    assert stat.S_IMODE((tmp_path / "mask.key").stat().st_mode) == 0o600


def test_masking_keys_are_never_overwritten(tmp_path: Path) -> None:
    create_mask_key(tmp_path / "mask.key")
    before = (tmp_path / "mask.key").read_bytes()
    with pytest.raises(FileExistsError):
        create_mask_key(tmp_path / "mask.key")
    assert (tmp_path / "mask.key").read_bytes() == before


def test_no_two_masking_keys_are_alike(tmp_path: Path) -> None:
    made = {public_mask_key(create_mask_key(tmp_path / str(n))) for n in range(20)}
    assert len(made) == 20


@pytest.mark.parametrize("content", [None, b"", b"\x01" * 31, b"\x01" * 33, b"-----BEGIN"])
def test_a_file_that_holds_no_masking_key_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "mask.key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DocumentError, match="cannot read the masking key"):
        load_mask_key(file)

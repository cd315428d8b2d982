"""Words that stand for a digest: pronounceable, distinct, compared as people say them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.words import are_same, words

DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)


def test_the_words_are_those_of_the_proposal() -> None:
    # 127.0.0.1 is lusab-babad, 63.84.220.193 gutih-tugad, 140.98.193.141 mudof-sakat
    digest = bytes([127, 0, 0, 1, 63, 84, 220, 193, 140, 98, 193, 141]).hex()
    assert words(digest) == "lusab-babad-gutih-tugad-mudof"


@given(DIGESTS)
def test_five_words_of_five_letters_follow_the_pattern(digest: str) -> None:
    assert re.fullmatch(
        r"([b-z][aiou][b-z][aiou][b-z]-){4}[b-z][aiou][b-z][aiou][b-z]", words(digest)
    )


@given(DIGESTS, DIGESTS)
def test_different_first_eighty_bits_are_different_words(one: str, other: str) -> None:
    assert (words(one) == words(other)) is (one[:20] == other[:20])


@given(DIGESTS, st.integers(0, 79))
def test_every_one_of_eighty_bits_counts(digest: str, bit: int) -> None:
    changed = int(digest, 16) ^ (1 << (255 - bit))
    assert words(f"{changed:064x}") != words(digest)


def test_words_are_compared_without_case_spaces_and_hyphens() -> None:
    assert are_same(" Lusab babad\tGUTIH-tugad  mudof", "lusab-babad-gutih-tugad-mudof")
    assert not are_same("lusab-babad-gutih-tugad", "lusab-babad-gutih-tugad-mudof")
    assert not are_same("lusab-babad-gutih-tugad-mudog", "lusab-babad-gutih-tugad-mudof")
    assert not are_same("", "lusab-babad-gutih-tugad-mudof")


def test_letters_of_other_alphabets_are_other_letters() -> None:
    assert not are_same("lusаb-babad-gutih-tugad-mudof", "lusab-babad-gutih-tugad-mudof")


@pytest.mark.parametrize("text", ["", "00" * 9, "zz" * 32])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        words(text)

"""A digest as five words that two people can compare by phone.

Each word is a proquint: sixteen bits as consonant, vowel, consonant, vowel, consonant.

Guarantees:
    Different first eighty bits are different words.
    The words of two digests are compared without regard to case, spaces and hyphens.

Design: the words stand for a request to join, which holds the digest of the invite it answers and
so covers the coordinator's key, its certificate authority and every key of the site. Who stands in
between must send the coordinator a request of their own that has the words of the site's. The
site's keys are drawn after the invite reached it, so both cannot be chosen (which would cost 2^40
digests): one request is given, and the other must meet its words, at 2^80 digests on average, in
the time before the call. Of n requests under attack any one is met in 2^80 / n.

References:
    Wilkerson, "A Proposal for Proquints: Identifiers that are Readable, Spellable, and
    Pronounceable", 2009, https://arxiv.org/html/0901.4016
"""

from __future__ import annotations

import hmac

CONSONANTS = "bdfghjklmnprstvz"
VOWELS = "aiou"
NUM_WORDS = 5


def words(digest_hex: str) -> str:
    """Return the first 80 bits of a digest in hexadecimal as five proquints.

    Raises:
        ValueError: if it is shorter than that, or not hexadecimal.
    """
    content = bytes.fromhex(digest_hex)[: 2 * NUM_WORDS]
    if len(content) < 2 * NUM_WORDS:
        raise ValueError(f"expected a digest of at least {2 * NUM_WORDS} bytes")
    pairs = (content[at : at + 2] for at in range(0, 2 * NUM_WORDS, 2))
    return "-".join(_proquint(int.from_bytes(pair, "big")) for pair in pairs)


def are_same(spoken: str, expected: str) -> bool:
    """Tell whether what somebody read out, or typed, are the ``expected`` words."""
    return hmac.compare_digest(_letters(spoken).encode(), _letters(expected).encode())


def _proquint(bits: int) -> str:
    return (
        CONSONANTS[bits >> 12 & 15]
        + VOWELS[bits >> 10 & 3]
        + CONSONANTS[bits >> 6 & 15]
        + VOWELS[bits >> 4 & 3]
        + CONSONANTS[bits & 15]
    )


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if not letter.isspace() and letter != "-")

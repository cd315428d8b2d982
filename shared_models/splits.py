"""Patient to train, val or test, by keyed hash: never by image, never by chance.

The same patient always lands in the same split of the same study, on any machine, whatever other
patients there are. The key is the study's, so that two studies do not share their test patients.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

Split = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


def split_of(patient: str, *, key: str, test: float = 0.2, val: float = 0.0) -> Split:
    """Return the split of ``patient``, with the given shares for test and val.

    Guarantees:
        All images of one patient are in one split.
        A new patient never moves another.
    """
    secret = key.encode()
    if len(secret) > hashlib.blake2b.MAX_KEY_SIZE:
        secret = hashlib.blake2b(secret).digest()
    hashed = hashlib.blake2b(patient.encode(), key=secret, digest_size=8).digest()
    position = int.from_bytes(hashed, "big") / 2**64
    if position < test:
        return "test"
    return "val" if position < test + val else "train"

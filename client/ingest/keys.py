"""A site's pseudonyms, shifted days and remapped UIDs: all from one key that never leaves it.

Guarantees:
    The same key gives the same patient the same pseudonym and shift, and a UID the same new UID, in
    every file, process and run.
    Under another key nothing is the same: two sites' files cannot be linked.
    Who has the register but not the key learns at most how many patients it holds.

Design: pseudonyms are short HMACs, so they fit every attribute and every list; the way back
    stands in a register at the site, one AES-SIV token a line. A reversible token in PatientID
    itself would need no register, but does not fit its 64 characters for every identifier there
    is, and would travel with every copy of a file. A lost register costs the way back only, and
    can be made anew from the hospital's own list of patients; a lost key costs the consistency
    with what is stored.
"""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from shared_models import files
from shared_models.errors import DocumentError

KEY_BYTES = 32
PSEUDONYM_PREFIX = "P-"
#: Days are shifted back by this much at least and at most: never into the future, ten years' span.
SHIFT_DAYS = (366, 366 + 3652)
#: Identifiers are padded to a multiple of this before they are sealed, so that length says little.
SEAL_BLOCK = 64


class Key:
    """A site's secret, with one sub-key for each use; shows nothing of itself when printed."""

    __slots__ = ("_days", "_marks", "_names", "_seal", "_uids")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"expected {KEY_BYTES} bytes of key, got {len(secret)}")
        self._names = hmac.digest(secret, b"consilia pseudonyms", "sha256")
        self._days = hmac.digest(secret, b"consilia days", "sha256")
        self._uids = hmac.digest(secret, b"consilia uids", "sha256")
        self._marks = hmac.digest(secret, b"consilia marks", "sha256")
        self._seal = hmac.digest(secret, b"consilia register", "sha512")

    def __repr__(self) -> str:
        return "Key(...)"

    def __reduce__(self) -> str:
        raise TypeError("a key is not pickled")

    def pseudonym(self, patient: str) -> str:
        """Return what a patient is called in everything stored: 100 bits, as 20 capital letters."""
        bits = hmac.digest(self._names, patient.encode(), "sha256")
        return PSEUDONYM_PREFIX + base64.b32encode(bits[:15])[:20].decode()

    def days(self, patient: str) -> int:
        """Return by how many days this patient's dates are moved; always back."""
        least, most = SHIFT_DAYS
        bits = int.from_bytes(hmac.digest(self._days, patient.encode(), "sha256")[:16], "big")
        return -(least + bits % (most - least + 1))

    def uid(self, uid: str) -> str:
        """Return the UID that replaces ``uid``: 2.25 and 128 bits (PS3.5 B.2)."""
        bits = hmac.digest(self._uids, uid.encode(), "sha256")[:16]
        return f"2.25.{int.from_bytes(bits, 'big')}"

    def mark(self, value: str) -> str:
        """Return what tells ``value`` from others and nothing else about it: 96 bits, as digits."""
        return hmac.digest(self._marks, value.encode(errors="surrogateescape"), "sha256").hex()[:24]

    def seal(self, patient: str) -> str:
        """Return the pseudonym and, after a space, what only this key can turn back."""
        name, text = self.pseudonym(patient), patient.encode()
        padded = text + b"\0" * (-len(text) % SEAL_BLOCK or (0 if text else SEAL_BLOCK))
        sealed = AESSIV(self._seal).encrypt(padded, [name.encode()])
        return f"{name} {base64.b64encode(sealed).decode()}"

    def unseal(self, line: str) -> str:
        """Return the patient of a line that ``seal`` made.

        Raises:
            DocumentError: if it was not this key that sealed it, or the line was changed.
        """
        name, _, token = line.partition(" ")
        try:
            sealed = base64.b64decode(token, validate=True)
            return AESSIV(self._seal).decrypt(sealed, [name.encode()]).rstrip(b"\0").decode()
        except (InvalidTag, ValueError):
            raise DocumentError(
                "the register of pseudonyms does not open with this key; use the one that made it"
            ) from None


def create_key(file: Path) -> Key:
    """Write a new secret to ``file``, readable by its owner only, and return the key.

    Raises:
        FileExistsError: if the file is there: a new key would part all patients from their past.
    """
    secret = os.urandom(KEY_BYTES)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secret.hex() + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return Key(secret)


def load_key(file: Path) -> Key:
    """Return the key in ``file``.

    Raises:
        DocumentError: if there is none, it is not a key, or others than its owner may read it.
    """
    try:
        mode = file.stat().st_mode & 0o077
        text = file.read_text("ascii")
    except (OSError, ValueError):
        raise DocumentError("expected a readable de-identification key; make one once") from None
    if mode:
        raise DocumentError(
            "the de-identification key may be read by others than its owner; chmod 600 it"
        )
    try:
        return Key(bytes.fromhex(text.strip()))
    except ValueError:
        raise DocumentError("the file holds no de-identification key: expected 64 digits") from None


def remember(register: Path, patients: Iterable[str], key: Key) -> None:
    """Add to the register whoever it lacks, on disk when this returns. One writer at a time."""
    if not register.exists():
        os.close(os.open(register, os.O_WRONLY | os.O_CREAT, 0o600))
    known = {line.partition(" ")[0] for line in register.read_text("ascii").splitlines()}
    for patient in patients:
        if (name := key.pseudonym(patient)) not in known:
            files.append_line(register, key.seal(patient))
            known.add(name)


def reveal(pseudonym: str, key: Key, *, register: Path) -> str | None:
    """Return whose pseudonym it is (the PatientID as a rule), None if the register does not say.

    Raises:
        DocumentError: if the register was made with another key.
        OSError: if it cannot be read.
    """
    for line in register.read_text("ascii").splitlines():
        if line.startswith(pseudonym + " "):
            return key.unseal(line)
    return None

"""Where the chance in a phantom comes from: hashes of names, never the clock or a global state."""

import hashlib

import numpy as np
from pydicom.uid import UID


def digest(*names: str | int) -> int:
    """Return 128 bits that depend on nothing but the names and their order."""
    joined = "\x1f".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:16], "big")


def make_generator(*names: str | int) -> np.random.Generator:
    """Return a generator of its own for these names, whatever was drawn before for others."""
    return np.random.Generator(np.random.SFC64(digest(*names)))


def make_uid(*names: str | int) -> UID:
    """Return a DICOM UID for these names (2.25 and a 128-bit number, PS3.5 Annex B.2)."""
    return UID(f"2.25.{digest(*names)}")

"""The control plane as both sides know it: its methods, its limits, how its messages are read.

A message is the canonical JSON of one contract. Of a probe only the first message each way is: what
follows are bytes without meaning, in pieces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TypeVar

from pydantic import ValidationError

from shared_models.contracts import Contract
from shared_models.errors import DocumentError

ENROLMENT = "consilia.v1.Enrolment"  # TLS by which only the coordinator is known: Join
CONTROL = "consilia.v1.Control"  # mutual TLS: Visit, Renew, Probe

MAX_JOIN_BYTES = 64 * 2**10
MAX_VISIT_BYTES = 4 * 2**20
MAX_BULLETIN_BYTES = 16 * 2**20
MAX_PIECE_BYTES = 2**20  # of a probe
MAX_CALL_S = 900.0  # a call must have a deadline, and none that is later

AnyContract = TypeVar("AnyContract", bound=Contract)


def parse(content: bytes, contract: type[AnyContract]) -> AnyContract:
    """Read one message.

    Raises:
        DocumentError: if it is no such contract; it never repeats what came.
    """
    try:
        return contract.model_validate_json(content)
    except (ValidationError, ValueError):
        raise DocumentError(f"expected a message of the kind {contract.__name__}") from None


def pieces(num_bytes: int) -> Iterator[bytes]:
    """Yield so many bytes without meaning, which nothing on their way can make fewer."""
    piece = os.urandom(min(num_bytes, MAX_PIECE_BYTES))
    while num_bytes > 0:
        yield piece[:num_bytes]
        num_bytes -= len(piece[:num_bytes])

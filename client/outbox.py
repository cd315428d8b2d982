"""The last reply of each study, kept as it was sent: who asks the same again gets the same bytes.

One file for each study and kind of order, the newest in place of the older: a line of JSON (what
was asked, the signed reply) and the update's bytes. It holds what leaves anyway, and still only its
owner can read it.

Guarantees:
    A reply is found for the question it answered and for no other.
    A reply made under other rules of the site's policy is not found.
    A file that is missing, cut short or changed is no reply.

Design: no digest of the file, for the site's own signature is over the reply, and the reply names
the update by its digest. Whether a private reply was charged is for the ledger to say.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from client.config import PolicySettings
from shared_models import weights as weights_of
from shared_models.contracts import Contract, Digest, RoundOrder, SiteReply
from shared_models.errors import ConsiliaError
from shared_models.files import replace
from shared_models.signing import canonical, digest
from shared_models.weights import flat_in
from shared_models.wire import Buckets, Letter, flat_from, opened

FOLDER = "outbox"
BYTES = "|u1"  # whatever numbers they are


class Kept(Contract):
    """A file's first line; the update's bytes follow it."""

    question: Digest
    document: str
    key: str
    signature: str


def keep(state_dir: Path, order: RoundOrder, *, letter: Letter, policy: PolicySettings) -> None:
    """Put ``letter``, the reply to ``order`` under ``policy``, on disk.

    Raises:
        OSError: if it cannot be written; then it should not be sent either.
    """
    file = _file(state_dir, order)
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(".*.tmp"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    kept = Kept(
        question=_question(order, policy),
        document=letter.document,
        key=letter.key,
        signature=letter.signature,
    )
    head = kept.model_dump_json().encode() + b"\n"
    update = flat_from(letter.buckets, numbers=BYTES)
    replace(file, chain([head], update.stretches()), mode=0o600)


def find(state_dir: Path, order: RoundOrder, *, policy: PolicySettings, key: str) -> Letter | None:
    """Return the reply ``order`` was given before, if it is whole and signed by ``key``.

    Its update stays in the file, and can be read even when a newer reply has taken its place.
    """
    try:
        with _file(state_dir, order).open("rb") as stream:
            kept = Kept.model_validate_json(stream.readline())
            if kept.question != _question(order, policy):
                return None
            whole = flat_in(stream)
            body = whole.part(stream.tell(), whole.size)
        buckets = Buckets(body) if body.size else ()
        letter = Letter("reply", kept.document, kept.key, kept.signature, buckets)
        reply, vector = opened(letter, key=key)
        update = None if vector is None else weights_of.digest(vector)
    except (OSError, ValidationError, ConsiliaError):
        return None
    is_whole = isinstance(reply, SiteReply) and reply.update_digest == update
    return letter if is_whole and canonical(reply).decode() == letter.document else None


def _question(order: RoundOrder, policy: PolicySettings) -> str:
    """Return the digest of all of an order but its times, and of the rules it is judged by.

    The rules, because they decide what of a result may leave.
    """
    asked = order.model_dump_json(exclude={"issued_at", "expires_at"})
    return digest(f"{asked}\n{policy.model_dump_json()}".encode())


def _file(state_dir: Path, order: RoundOrder) -> Path:
    return state_dir / FOLDER / f"{order.study}.{order.kind}"

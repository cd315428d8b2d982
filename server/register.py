"""The coordinator's register: an append-only file of signed lines, each bound to the last.

It holds what was done about sites, and which studies were closed for good.

Guarantees:
    A line edited, removed, doubled or moved, or signed by another key, is found before it counts.
    A line cut short by a crash never counts: nobody was told of it.
    Two processes that write at once keep the chain.

Design: what every site is, is a value computed from the lines (``sites``); there is no other record
of it. The chain shows a line dropped from the middle to whoever reads the file, and one dropped
from the end to whoever kept a later ``head``. A line that closes a study is of another version,
which an earlier program does not read: it would go on with the study.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import (
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from server.consortium import public_key_of
from shared_models.contracts import (
    Contract,
    Count,
    Digest,
    JoinRequest,
    Pem,
    PublicKey,
    Signature,
    SignedInvite,
    SignedJoinRequest,
    SiteName,
)
from shared_models.errors import DocumentError
from shared_models.files import append_line, in_turn
from shared_models.signing import canonical, digest, is_signed_by, public_key, sign

FILE = "register.jsonl"
NOTHING = "0" * 64

EntryKind = Literal[
    "opened", "invited", "requested", "accepted", "refused", "renewed", "revoked", "closed"
]
State = Literal["invited", "pending", "enrolled", "refused", "revoked"]

#: The fields each kind of entry has; it has no others.
FIELDS: dict[EntryKind, tuple[str, ...]] = {
    "opened": ("key",),
    "invited": ("site", "invite"),
    "requested": ("site", "request"),
    "accepted": ("site", "digest", "certificate"),
    "refused": ("site", "digest"),
    "renewed": ("site", "request", "certificate"),
    "revoked": ("site",),
    "closed": ("study",),
}


class Entry(Contract):
    """One thing that was done about a site or, in version 2, about the ``study`` of that digest.

    ``digest`` is of the request that was decided on.

    ``previous`` is the digest of the signed line before this one, zeros for the first, which states
    the coordinator's public ``key``.
    """

    schema_version: Literal[1, 2] = 1
    index: Count
    previous: Digest
    when: datetime
    kind: EntryKind
    key: PublicKey | None = None
    site: SiteName | None = None
    invite: SignedInvite | None = None
    request: SignedJoinRequest | None = None
    digest: Digest | None = None
    certificate: Pem | None = None
    study: Digest | None = None

    @model_serializer(mode="wrap")
    def _leave_version_1_as_it_was(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        if self.schema_version == 1:
            found.pop("study", None)
        return found

    @model_validator(mode="after")
    def _check_that_the_fields_are_the_kinds(self) -> Self:
        common = {"schema_version", "index", "previous", "when", "kind"}
        given = {name for name, value in self if value is not None} - common
        if given != set(FIELDS[self.kind]):
            raise ValueError(f"expected of '{self.kind}' exactly {', '.join(FIELDS[self.kind])}")
        if (self.kind == "closed") is not (self.schema_version == 2):
            raise ValueError("expected version 2 where a study is closed, and only there")
        return self


class Line(Contract):
    """One line of the register: an entry and the coordinator's signature over it."""

    entry: Entry
    signature: Signature


class Issued(NamedTuple):
    """A certificate that the authority issued for a ``request`` (its digest)."""

    request: str
    certificate: str
    fingerprint: str
    expires_at: datetime


class Site(NamedTuple):
    """What the register says of a site.

    ``held`` are all keys it ever had accepted, ``barred`` those among them that were revoked.
    """

    site: str
    state: State
    invite: SignedInvite
    request: SignedJoinRequest | None = None
    issued: tuple[Issued, ...] = ()
    held: frozenset[str] = frozenset()
    barred: frozenset[str] = frozenset()

    def current(self, now: datetime) -> tuple[Issued, ...]:
        """Return the certificates by which the site is let in: none once it is revoked."""
        return tuple(one for one in self.issued if one.expires_at > now)


class Book:
    """The register while nobody else can write in it; ``entries`` grow as they are added."""

    def __init__(self, file: Path, key: Ed25519PrivateKey, lines: Sequence[Line]) -> None:
        self.file, self.key, self.lines = file, key, list(lines)

    @property
    def sites(self) -> dict[str, Site]:
        """What the register says now."""
        return sites([line.entry for line in self.lines])

    def add(self, kind: EntryKind, **fields: Any) -> None:
        """Write an entry down, durably."""
        entry = Entry(
            schema_version=2 if kind == "closed" else 1,
            index=len(self.lines),
            previous=digest(self.lines[-1]) if self.lines else NOTHING,
            when=datetime.now(UTC),
            kind=kind,
            **fields,
        )
        line = Line(entry=entry, signature=sign(entry, key=self.key))
        append_line(self.file, canonical(line).decode())
        self.lines.append(line)


@contextmanager
def writing(folder: Path, key: Ed25519PrivateKey) -> Iterator[Book]:
    """Open the register to write in it; nobody else can meanwhile.

    Raises:
        DocumentError: if it is broken.
        OSError: if it cannot be written.
    """
    with in_turn(folder / f"{FILE}.lock"):
        book = Book(folder / FILE, key, read(folder, key=public_key(key)))
        if not book.lines:
            book.add("opened", key=public_key(key))
        yield book


def read(folder: Path, *, key: str) -> tuple[Line, ...]:
    """Return the register's lines, which ``key`` signed; none if there is no register yet.

    Raises:
        DocumentError: naming the first line that is broken.
    """
    file = folder / FILE
    try:
        content = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise DocumentError(f"cannot read {file}: {type(error).__name__}") from None
    return _follow(content.rpartition(b"\n")[0], key)


def sites(entries: Sequence[Entry]) -> dict[str, Site]:
    """Return what these entries make of each site.

    Raises:
        DocumentError: if something was done about a site that was never invited.
    """
    found: dict[str, Site] = {}
    for entry in entries:
        if entry.site is not None:
            found[entry.site] = _after(found.get(entry.site), entry)
    return found


def closed(entries: Sequence[Entry]) -> frozenset[str]:
    """Return the digests of the studies that take no more orders."""
    return frozenset(entry.study for entry in entries if entry.study is not None)


@lru_cache(maxsize=4096)
def keys_of(request: JoinRequest) -> frozenset[str]:
    """Return a site's three public keys, each as text that stands for it."""
    raw = public_key_of(request.csr).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return frozenset((request.signing, request.node, digest(raw)))


def fingerprint(certificate: str) -> str:
    """Return the digest by which a certificate (PEM) stands in the register."""
    return digest(x509.load_pem_x509_certificate(certificate.encode()).public_bytes(Encoding.DER))


def _after(before: Site | None, entry: Entry) -> Site:
    if entry.kind == "invited" and entry.invite is not None:
        held, barred = (before.held, before.barred) if before else (frozenset(), frozenset())
        return Site(entry.invite.invite.site, "invited", entry.invite, held=held, barred=barred)
    if before is None:
        raise DocumentError(f"register: entry {entry.index} is about a site never invited")
    if entry.kind == "requested":
        return before._replace(state="pending", request=entry.request)
    if entry.kind == "refused":
        return before._replace(state="refused")
    if entry.kind == "revoked":
        return before._replace(state="revoked", issued=(), barred=before.held)
    request = entry.request or before.request
    if request is None or entry.certificate is None:
        raise DocumentError(f"register: entry {entry.index} decides on nothing")
    return before._replace(
        state="enrolled",
        issued=(*before.issued, _issued(digest(request.request), entry.certificate)),
        held=before.held | keys_of(request.request),
    )


@lru_cache(maxsize=4096)
def _issued(request: str, certificate: str) -> Issued:
    parsed = x509.load_pem_x509_certificate(certificate.encode())
    return Issued(request, certificate, fingerprint(certificate), parsed.not_valid_after_utc)


@lru_cache(maxsize=2)  # pure; and every call of a site asks
def _follow(content: bytes, key: str) -> tuple[Line, ...]:
    lines: list[Line] = []
    for index, raw in enumerate(content.split(b"\n") if content else ()):
        try:
            line = Line.model_validate_json(raw)
        except ValidationError:
            raise DocumentError(f"register: entry {index} cannot be read") from None
        entry = line.entry
        expected = digest(lines[-1]) if lines else NOTHING
        is_whole = canonical(line) == raw and (entry.index, entry.previous) == (index, expected)
        if not is_whole or not is_signed_by(entry, line.signature, key=key):
            raise DocumentError(
                f"register: entry {index} was edited, moved or signed by another key, or one "
                "before it was removed; restore it from a copy"
            )
        lines.append(line)
    return tuple(lines)

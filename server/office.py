"""The coordinator's office: a folder with its keys, and who is let into the consortium, and how.

consortium.toml         the consortium's name and addresses (``settings.py``); never overwritten
signing.pem             the coordinator's signing key
tls/                    the certificate authority and the servers' certificate (``consortium.py``)
register.jsonl          all that was done about sites, and the studies closed (``register.py``)
studies/, visits/, ...  what belongs to studies (``desk.py``)

A hospital is invited, asks with keys it made itself, and is let in by the coordinator's people once
they have heard its words. No secret is mailed: an invite holds none.

Guarantees:
    No certificate is issued before somebody has given the words of the site's own request.
    An invite lets one request in; the same request gets the same answer, any other is refused.
    A request that is refused writes nothing, and its answer is the same whatever kept it out.
    A revoked site is not enrolled, its certificates count no more, and its keys never again.
    Revoking one site touches no other.
    A renewal keeps the site's signing and node keys.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_public_key
from pydantic import ValidationError

from server import consortium, register, settings
from server.consortium import TlsFiles
from server.register import Site
from server.settings import Settings
from server.store import SiteKeys
from shared_models.contracts import (
    Admission,
    Contract,
    Invite,
    JoinRequest,
    SignedAdmission,
    SignedInvite,
    SignedJoinRequest,
)
from shared_models.errors import ConsiliaError, DocumentError, SignatureError
from shared_models.files import create as create_file
from shared_models.files import in_turn
from shared_models.plan import read_text
from shared_models.signing import create_key, digest, is_signed_by, load_key, public_key, sign
from shared_models.words import are_same, words

MOST_CERTIFICATES = 4  # of one site at once: an answer that was lost must not lock it out

log = logging.getLogger(__name__)

Status = Literal["pending", "accepted", "refused"]


class Office(NamedTuple):
    """The office's folder, its settings, and the coordinator's signing key."""

    folder: Path
    settings: Settings
    key: Ed25519PrivateKey


class Row(Contract):
    """A site's line in the coordinator's table.

    ``words`` are those of a request nobody has decided on, ``days_left`` the days of the newest
    certificate, or else those of an invite nobody has answered.
    """

    site: str
    state: Literal["invited", "pending", "enrolled", "expired", "refused", "revoked"]
    words: str | None = None
    days_left: int | None = None
    last_seen: datetime | None = None


def create(folder: Path, *, name: str, fleet: str, control: str, enrolment: str) -> Office:
    """Make an office; a signing key that lies there is kept.

    Raises:
        DocumentError: if a value does not belong in a ``consortium.toml``; nothing is made then.
        FileExistsError: if there is an office already; nothing is overwritten.
    """
    file = folder / settings.FILE
    if file.exists():
        raise FileExistsError(f"{file} exists; it is never overwritten")
    text = settings.text(name=name, fleet=fleet, control=control, enrolment=enrolment)
    found = settings.parse(text)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "signing.pem").exists():
        create_key(folder / "signing.pem")
    office = Office(folder, found, load_key(folder / "signing.pem"))
    certify(office)
    with register.writing(folder, office.key):
        create_file(file, text.encode(), mode=0o644)  # last: with it, the office is whole
    return office


def read(folder: Path) -> Office:
    """Read an office.

    Raises:
        DocumentError: if its settings or its key cannot be read.
    """
    if not (folder / settings.FILE).exists():
        raise DocumentError(
            f"{folder} is no coordinator's office; make one with: consilia-coordinator init"
        )
    found = settings.parse(read_text(folder / settings.FILE))
    return Office(folder, found, load_key(folder / "signing.pem"))


def certify(office: Office) -> TlsFiles:
    """Return the servers' certificate, issued anew if few days are left or a name has changed."""
    named = office.settings
    addresses = (named.fleet, named.control, named.enrolment)
    hosts = [address.rpartition(":")[0].strip("[]") for address in addresses]
    # Flower's own processes reach the SuperLink on this machine by the same certificate
    unique = list(dict.fromkeys([*hosts, "127.0.0.1"]))
    folder = office.folder / "tls"
    folder.mkdir(exist_ok=True)
    with in_turn(folder / "tls.lock"):  # or one's key would come to lie beside the other's
        return consortium.current(folder, hosts=unique, now=datetime.now(UTC))


def sites(office: Office) -> dict[str, Site]:
    """Return what the register says of each site.

    Raises:
        DocumentError: if the register is broken.
    """
    lines = register.read(office.folder, key=public_key(office.key))
    return register.sites([line.entry for line in lines])


def enrolled(office: Office) -> dict[str, SiteKeys]:
    """Return the keys of the sites that are let in now: accepted, not revoked, not expired."""
    now = datetime.now(UTC)
    return {
        site: SiteKeys(signing=found.request.request.signing, node=found.request.request.node)
        for site, found in sites(office).items()
        if found.request is not None and found.current(now)
    }


def is_let_in(office: Office, *, site: str, fingerprint: str) -> bool:
    """Tell whether a certificate is one of those by which ``site`` is let in now."""
    found = sites(office).get(site)
    current = () if found is None else found.current(datetime.now(UTC))
    return fingerprint in [one.fingerprint for one in current]


def invite(office: Office, site: str, *, days: int = 14) -> SignedInvite:
    """Invite a hospital under the name ``site``; an earlier invite of it counts no more.

    Raises:
        ConsiliaError: if the site is enrolled, or this is no name of a site.
    """
    now, named = datetime.now(UTC), office.settings
    authority = certify(office).authority.read_text(encoding="ascii")
    try:
        drawn = Invite(
            consortium=named.name,
            site=site,
            coordinator=public_key(office.key),
            authority=authority,
            fleet=named.fleet,
            control=named.control,
            enrolment=named.enrolment,
            nonce=secrets.token_hex(32),
            expires_at=now + timedelta(days=days),
        )
    except ValidationError:
        raise ConsiliaError("expected a site's name: letters, digits, - and _") from None
    signed = SignedInvite(invite=drawn, signature=sign(drawn, key=office.key))
    with register.writing(office.folder, office.key) as book:
        known = book.sites.get(site)
        if known is not None and known.current(now):
            raise ConsiliaError(f"{site} is enrolled; revoke it before you invite it anew")
        book.add("invited", site=site, invite=signed)
    return signed


def receive(office: Office, signed: SignedJoinRequest) -> SignedAdmission:
    """Answer a request to join; the first one that an invite allows is kept for people to decide.

    Raises:
        SignatureError: if the request is not signed by its own key, or its keys are none.
        DocumentError: if the register is broken.
    """
    _check(signed)
    request = signed.request
    status, certificate = _answer(sites(office), request)
    if status is None:
        with register.writing(office.folder, office.key) as book:
            status, certificate = _answer(book.sites, request)
            if status is None:
                book.add("requested", site=request.site, request=signed)
                log.info("%s asks to be let in; compare its words, then accept it", request.site)
    return _admission(office, request, status or "pending", certificate)


def accept(office: Office, site: str, spoken: str) -> Site:
    """Let a site in whose people read out these words; the same again changes nothing.

    Raises:
        ConsiliaError: if the site did not ask, or the words are not those of what it asked.
    """
    with register.writing(office.folder, office.key) as book:
        known = _known(book.sites, site)
        if known.request is None or known.state not in ("pending", "enrolled"):
            raise ConsiliaError(f"{site} has no request to decide on; it is {known.state}")
        request = known.request.request
        if not are_same(spoken, words(digest(request))):
            raise ConsiliaError(
                "these are not the words of the request that came here: nobody is let in. Have "
                "them read once more; if they still differ, somebody stands in between: refuse "
                f"the request (consilia-coordinator refuse {site}) and send a new invite"
            )
        if _barred(book.sites, request):
            raise ConsiliaError(f"{site} brings a key that was revoked, or is another site's")
        if known.state == "pending":
            found = consortium.issue(
                office.folder / "tls", request.csr, site=site, now=datetime.now(UTC)
            )
            pem = found.public_bytes(Encoding.PEM).decode()
            book.add("accepted", site=site, digest=digest(request), certificate=pem)
        return book.sites[site]


def refuse(office: Office, site: str) -> None:
    """Turn a site's request down; its keys may come again with another invite.

    Raises:
        ConsiliaError: if there is no request of it to decide on.
    """
    with register.writing(office.folder, office.key) as book:
        known = _known(book.sites, site)
        if known.state != "pending" or known.request is None:
            raise ConsiliaError(f"{site} has no request to decide on; it is {known.state}")
        book.add("refused", site=site, digest=digest(known.request.request))


def revoke(office: Office, site: str) -> None:
    """Let a site in no more: neither what it has nor what it was offered counts from now on.

    Raises:
        ConsiliaError: if there is no such site.
    """
    with register.writing(office.folder, office.key) as book:
        if _known(book.sites, site).state != "revoked":
            book.add("revoked", site=site)


def close(office: Office, study: str) -> None:
    """Close the study of that digest for good; once more changes nothing.

    Raises:
        DocumentError: if the register is broken.
    """
    with register.writing(office.folder, office.key) as book:
        if study not in register.closed([line.entry for line in book.lines]):
            book.add("closed", study=study)


def closed(office: Office) -> frozenset[str]:
    """Return the digests of the studies that were closed.

    Raises:
        DocumentError: if the register is broken.
    """
    lines = register.read(office.folder, key=public_key(office.key))
    return register.closed([line.entry for line in lines])


def renew(office: Office, site: str, signed: SignedJoinRequest) -> SignedAdmission:
    """Issue another certificate to a site that is let in; the same request gets the same one.

    Raises:
        SignatureError: if the request is not that of the site, or its keys are others than its own.
        DocumentError: if the register is broken.
    """
    _check(signed)
    request, now = signed.request, datetime.now(UTC)
    with register.writing(office.folder, office.key) as book:
        known = book.sites.get(site)
        if known is None or known.request is None or not known.current(now):
            raise SignatureError("the site is not let in")
        first = known.request.request
        kept = (request.site, request.invite, request.signing, request.node)
        if kept != (site, first.invite, first.signing, first.node):
            raise SignatureError("a renewal brings other keys than the site's own")
        issued = {one.request: one.certificate for one in known.current(now)}
        pem = issued.get(digest(request))
        if pem is None and (len(issued) >= MOST_CERTIFICATES or _barred(book.sites, request)):
            return _admission(office, request, "refused", None)
        if pem is None:
            found = consortium.issue(office.folder / "tls", request.csr, site=site, now=now)
            pem = found.public_bytes(Encoding.PEM).decode()
            book.add("renewed", site=site, request=signed, certificate=pem)
            log.info("%s has a new certificate", site)
    return _admission(office, request, "accepted", pem)


def head(office: Office) -> str | None:
    """Return the digest of the register's last line; who keeps it holds the register to it."""
    lines = register.read(office.folder, key=public_key(office.key))
    return digest(lines[-1]) if lines else None


def table(office: Office) -> list[Row]:
    """Return a line for each site, by name."""
    now = datetime.now(UTC)
    return [
        _row(found, now, seen=_last_seen(office.folder / "visits" / f"{site}.json"))
        for site, found in sorted(sites(office).items())
    ]


def _row(found: Site, now: datetime, *, seen: datetime | None) -> Row:
    row = Row(site=found.site, state=found.state, last_seen=seen)
    until = None
    if found.state == "enrolled":
        until = max(one.expires_at for one in found.issued)
    if found.state == "invited":
        until = found.invite.invite.expires_at
    if until is not None:
        state = found.state if until > now else "expired"
        return row.model_copy(update={"state": state, "days_left": (until - now).days})
    if found.state == "pending" and found.request is not None:
        return row.model_copy(update={"words": words(digest(found.request.request))})
    return row


def _last_seen(file: Path) -> datetime | None:
    try:
        return datetime.fromisoformat(json.loads(file.read_bytes())["when"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(signed: SignedJoinRequest) -> None:
    """Insist that a request is signed by the key it brings, and that its keys are such."""
    request = signed.request
    if not is_signed_by(request, signed.signature, key=request.signing):
        raise SignatureError("the request is not signed by the key it brings")
    consortium.public_key_of(request.csr)
    try:
        node = load_ssh_public_key(request.node.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise SignatureError("the request's node key cannot be read") from None
    if not isinstance(node, ec.EllipticCurvePublicKey):
        raise SignatureError("expected an EC node key")


def _answer(known: Mapping[str, Site], request: JoinRequest) -> tuple[Status | None, str | None]:
    """Return what a request gets, and its certificate; no status if it is to be kept."""
    site = known.get(request.site)
    if site is None or digest(site.invite.invite) != request.invite:
        return "refused", None
    issued = {one.request: one.certificate for one in site.issued}
    if digest(request) in issued:
        return "accepted", issued[digest(request)]
    if site.request is not None:
        is_its = digest(site.request.request) == digest(request)
        return ("pending" if is_its and site.state == "pending" else "refused"), None
    is_open = site.state == "invited" and site.invite.invite.expires_at > datetime.now(UTC)
    return (None if is_open and not _barred(known, request) else "refused"), None


def _barred(known: Mapping[str, Site], request: JoinRequest) -> bool:
    """Tell whether one of a request's keys was revoked, or another site has had it accepted."""
    keys = register.keys_of(request)
    return any(
        keys & (site.barred if name == request.site else site.held) for name, site in known.items()
    )


def _admission(
    office: Office, request: JoinRequest, status: Status, certificate: str | None
) -> SignedAdmission:
    answer = Admission(
        site=request.site,
        request=digest(request),
        status=status,
        certificate=certificate,
        when=datetime.now(UTC),
    )
    return SignedAdmission(admission=answer, signature=sign(answer, key=office.key))


def _known(known: Mapping[str, Site], site: str) -> Site:
    if site not in known:
        raise ConsiliaError(f"no site called '{site}'; known: {', '.join(sorted(known)) or 'none'}")
    return known[site]

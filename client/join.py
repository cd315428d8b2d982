"""How a site joins a consortium: it makes its keys, asks, compares words, gets a certificate.

Beside the site's certificate (``certificate.py``), in its folder of keys:

asked.json      the request that is out and the key it asks a certificate for; secret
request.json    the request that was accepted last, without any key

Guarantees:
    An invite that its own key did not sign, or that has expired, makes nothing.
    Keys and site.toml are never overwritten; the keys never leave.
    A join or a renewal killed at any instant goes on when it is run again, with the same request.
    Only a certificate of the invite's authority, for our key and name, takes its place.
    The certificate and its key change in one step.

Design: an invite's signature says no more than that it is whole. What makes it the coordinator's is
that people on both sides compare the words of the request, which covers it (``words.py``).
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from client import agent, certificate, journal, setup
from client import config as configs
from client.certificate import days_left as days_left
from client.config import SiteConfig
from shared_models.contracts import (
    Contract,
    Invite,
    JoinRequest,
    JournalKind,
    Pem,
    SignedAdmission,
    SignedInvite,
    SignedJoinRequest,
)
from shared_models.control import AnyContract
from shared_models.errors import ConsiliaError, DocumentError, SignatureError
from shared_models.files import create, replace
from shared_models.journal import FILE as JOURNAL
from shared_models.journal import parse
from shared_models.signing import (
    canonical,
    create_key,
    digest,
    is_signed_by,
    load_key,
    public_key,
    sign,
)
from shared_models.words import words

AUTHORITY = "consortium-ca.crt"
ASKED, ACCEPTED = "asked.json", "request.json"
MAX_INVITE_BYTES = 64 * 2**10
ASK_S = 20.0  # what asking takes at least, however short the wait
FIRST_POLL_S, POLL_S = 0.5, 5.0  # people who have just put the phone down are not kept waiting


class Asked(Contract):
    """A request that is out, with the private key (PEM) that its certificate will be for."""

    key: Pem
    request: SignedJoinRequest


class Data(NamedTuple):
    """What a new site.toml says of the hospital's own."""

    manifest: Path
    root: Path
    max_epsilon: float = 8.0
    allow_without_privacy: bool = False


class Joining(NamedTuple):
    """A site on its way in. ``asked`` is None once it is in."""

    config: SiteConfig
    invite: Invite
    asked: Asked | None

    @property
    def words(self) -> str:
        """The words to compare; none are needed once the site is in."""
        return words(digest(self.asked.request.request)) if self.asked else ""


def read_invite(file: Path) -> Invite:
    """Read an invite that is whole; whose it is, only the words can tell.

    Raises:
        DocumentError: if it cannot be read.
        SignatureError: if the key it names did not sign it.
    """
    try:
        if file.stat().st_size > MAX_INVITE_BYTES:
            raise DocumentError(f"{file} is too large for an invite")
        signed = SignedInvite.model_validate_json(file.read_bytes())
        x509.load_pem_x509_certificate(signed.invite.authority.encode())
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot read the invite {file}: {type(error).__name__}") from None
    if not is_signed_by(signed.invite, signed.signature, key=signed.invite.coordinator):
        raise SignatureError(f"the invite {file} was changed on its way; ask for it once more")
    return signed.invite


def prepare(invite: Invite, folder: Path, data: Data | None) -> Joining:
    """Make ``folder`` a site that asks to join; again, and nothing is made twice.

    Raises:
        ConsiliaError: if the invite has expired, or the folder is a site of another consortium.
        DocumentError: if a value does not belong in a ``site.toml``, or a file cannot be read.
        ValueError: if a value is not printable text.
    """
    config = _config(invite, folder, data)
    asked, accepted = _asked(config), _accepted(config)
    is_in = accepted is not None and accepted.invite == digest(invite)
    if asked is not None and asked.request.request.invite == digest(invite):
        is_renewal = is_in and accepted != asked.request.request
        return Joining(config, invite, None if is_renewal else asked)
    if is_in:
        return Joining(config, invite, None)
    _check_open(invite)
    return Joining(config, invite, _ask(config, invite=digest(invite)))


def wait(joining: Joining, *, minutes: float) -> bool:
    """Ask until the coordinator has decided, or it takes too long; tell whether the site is in.

    Raises:
        ConsiliaError: if the coordinator refuses, or is not who the invite says.
        UnreachableError: if it could never be reached in that time.
    """
    from client import control

    until, pause_s = time.monotonic() + 60 * minutes, FIRST_POLL_S
    while joining.asked is not None:
        budget_s = max(until - time.monotonic(), ASK_S)
        answer = control.join(joining.invite, joining.asked.request, budget_s=budget_s)
        if take(joining, answer):
            break
        if time.monotonic() + pause_s > until:
            return False
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, POLL_S)
    return True


def take(joining: Joining, answer: SignedAdmission) -> bool:
    """Tell whether an answer lets the site in, and if so keep its certificate.

    Raises:
        ConsiliaError: if the coordinator refused the request.
        SignatureError: if the answer, or the certificate in it, is not what it should be.
    """
    config, asked = joining.config, joining.asked
    if asked is None:
        return True
    return _take(config, asked, answer, kind="joined")


def renew_if_due(config: SiteConfig) -> bool:
    """Renew the site's certificate if a third of its days is left; tell whether it was.

    A renewal that a crash cut short is gone on with, due or not.

    Raises:
        UnreachableError: if the coordinator does not answer; there is time, try again later.
        ConsiliaError: if it refuses, or the site has not joined.
    """
    from client import control

    accepted, asked = _accepted(config), _asked(config)
    if accepted is None:
        raise ConsiliaError("this site has not joined; run consilia-site join with its invite")
    if asked is not None and asked.request.request.invite != accepted.invite:
        return False  # the site is joining anew
    left = days_left(config)
    if asked is None and (left is None or left >= certificate.RENEW_DAYS):
        return False
    asked = asked or _ask(config, invite=accepted.invite)
    with control.connect(config) as link:
        return _take(config, asked, control.renew(link, asked.request), kind="renewed")


def _take(config: SiteConfig, asked: Asked, answer: SignedAdmission, *, kind: JournalKind) -> bool:
    admission, request = answer.admission, asked.request.request
    is_theirs = is_signed_by(admission, answer.signature, key=config.coordinator)
    if not is_theirs or (admission.site, admission.request) != (request.site, digest(request)):
        raise SignatureError("the answer is not the coordinator's to what this site asked")
    if admission.status == "refused":
        raise ConsiliaError(
            "the coordinator does not let this site in by this request: it was turned down, its "
            "invite was used by another request or has expired, or its keys were revoked. Ask the "
            "coordinator for a new invite. After a revocation join in a new folder, with the "
            "ledger (state/ledger.jsonl) copied into its state folder before, so that what "
            "patients were charged goes on to count"
        )
    if admission.status == "pending" or admission.certificate is None:
        return False
    _keep(config, asked, admission.certificate, kind=kind)
    return True


def _keep(config: SiteConfig, asked: Asked, pem: str, *, kind: JournalKind) -> None:
    """Put a certificate into place; what a crash cut short is done again, to the same end."""
    noted = certificate.fingerprint(_checked(pem, asked, config))
    certificate.write(_file(config), key=asked.key.encode(), certificate=pem)
    replace(_beside(config, ACCEPTED), canonical(asked.request))
    book = journal.Book(config.state_dir, config.name, load_key(config.signing_key))
    if noted not in _journalled(book):
        key = config.coordinator if kind == "joined" else None
        journal.append(book, journal.Event(kind, key=key, digest=noted))
    _beside(config, ASKED).unlink(missing_ok=True)


def _checked(pem: str, asked: Asked, config: SiteConfig) -> x509.Certificate:
    """Return a certificate, if it is the authority's, for our key and our name, and holds now."""
    try:
        found = x509.load_pem_x509_certificate(pem.encode())
        authority = x509.load_pem_x509_certificate(config.link.root_certificates.read_bytes())
        found.verify_directly_issued_by(authority)
        key = serialization.load_pem_private_key(asked.key.encode(), password=None)
        names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (OSError, ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise SignatureError("the certificate is not one of the consortium's authority") from None
    if found.public_key() != key.public_key() or [name.value for name in names] != [config.name]:
        raise SignatureError("the certificate is not for this site's key and name")
    if not found.not_valid_before_utc <= datetime.now(UTC) < found.not_valid_after_utc:
        raise SignatureError(
            "the certificate does not hold today; is this machine's clock right? If so, ask the "
            "coordinator for a new invite"
        )
    return found


def _ask(config: SiteConfig, *, invite: str) -> Asked:
    """Make a key and a request for its certificate, on disk before it is sent."""
    control_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, config.name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name)
    signing = load_key(config.signing_key)
    request = JoinRequest(
        site=config.name,
        invite=invite,
        signing=public_key(signing),
        node=_node_key(config.link.node_key),
        csr=_pem(csr.sign(control_key, hashes.SHA256())),
        when=datetime.now(UTC),
    )
    private = control_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    signed = SignedJoinRequest(request=request, signature=sign(request, key=signing))
    asked = Asked(key=private.decode(), request=signed)
    replace(_beside(config, ASKED), canonical(asked), mode=0o600)
    return asked


def _config(invite: Invite, folder: Path, data: Data | None) -> SiteConfig:
    """Return the folder's configuration, made with its keys if there is none yet."""
    file = folder / "site.toml"
    if not file.exists():
        _check_open(invite)
        _create(invite, folder, data)
    config = configs.read(file)
    _check_same(config, invite, file)
    if not config.signing_key.exists():
        if (config.state_dir / JOURNAL).exists():
            raise DocumentError(
                f"{config.signing_key} is gone, but this site has a journal; restore the key"
            )
        config.signing_key.parent.mkdir(parents=True, exist_ok=True)
        create_key(config.signing_key)
    if not config.link.node_key.exists():
        agent.create_node_key(config.link.node_key)
    return config


def _create(invite: Invite, folder: Path, data: Data | None) -> None:
    if data is None:
        raise ConsiliaError(
            f"{folder} is no site yet; name its images with --manifest CSV and --root DIR"
        )
    if any((folder / "keys").glob("*")):
        raise ConsiliaError(f"{folder} has keys, but no site.toml; choose another --folder")
    text = setup.config_text(
        name=invite.site,
        coordinator=invite.coordinator,
        address=invite.fleet,
        root_certificates=AUTHORITY,
        manifest=str(data.manifest),
        root=str(data.root),
        control=invite.control,
        max_epsilon=data.max_epsilon,
        allow_without_privacy=data.allow_without_privacy,
    )
    configs.parse(text)  # what was given is judged before anything is made
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / AUTHORITY, invite.authority.encode())
    create(folder / "site.toml", text.encode(), mode=0o644)


def _check_open(invite: Invite) -> None:
    if invite.expires_at < datetime.now(UTC):
        raise ConsiliaError(
            f"the invite expired on {invite.expires_at:%Y-%m-%d}; ask the coordinator for a new one"
        )


def _check_same(config: SiteConfig, invite: Invite, file: Path) -> None:
    """Insist that a folder's site is the one that is invited, where and by whom."""
    link = config.link
    if link.control is None:
        raise ConsiliaError(
            f"{file} names no control plane; add these two lines under [link], then go on: "
            f'control = "{invite.control}" and certificate = "keys/control.pem"'
        )
    try:
        authority = link.root_certificates.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot read the authority that {file} names") from error
    found = {
        "name": config.name == invite.site,
        "coordinator": config.coordinator == invite.coordinator,
        "link.address": link.address == invite.fleet,
        "link.control": link.control == invite.control,
        "link.root_certificates": authority.strip() == invite.authority.strip(),
    }
    if not all(found.values()):
        others = ", ".join(name for name, is_same in found.items() if not is_same)
        raise ConsiliaError(
            f"the invite is not for the site in {file}: {others} differ; choose another --folder, "
            "or, if the coordinator has moved, change them after you have asked it by phone"
        )


def _asked(config: SiteConfig) -> Asked | None:
    """Return the request that is out, if there is one."""
    return _read(_beside(config, ASKED), Asked)


def _accepted(config: SiteConfig) -> JoinRequest | None:
    """Return the request that was accepted last, if there is one."""
    found = _read(_beside(config, ACCEPTED), SignedJoinRequest)
    return None if found is None else found.request


def _read(file: Path, contract: type[AnyContract]) -> AnyContract | None:
    try:
        return contract.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise DocumentError(f"cannot read {file}; restore it from a copy") from None


def _file(config: SiteConfig) -> Path:
    if config.link.certificate is None:
        raise DocumentError("site.toml names no certificate in [link]; join with an invite")
    return config.link.certificate


def _beside(config: SiteConfig, name: str) -> Path:
    return _file(config).with_name(name)


def _journalled(book: journal.Book) -> set[str | None]:
    """Return the digests of the certificates that stand in the journal."""
    lines = parse(book.file.read_bytes()) if book.file.exists() else ()
    return {line.entry.digest for line in lines if line.entry.kind in ("joined", "renewed")}


def _node_key(file: Path) -> str:
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise DocumentError(f"cannot read the node key {file}: {type(error).__name__}") from error
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(encoding, form).decode()


def _pem(csr: x509.CertificateSigningRequest) -> str:
    return csr.public_bytes(serialization.Encoding.PEM).decode()

"""What the hospital set up itself: keys, certificates, and whether its rules allow the plan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.preflight.base import Case, Finding, several
from shared_models.errors import ConsiliaError
from shared_models.signing import load_key, public_key

DAYS_LEFT = 14  # who renews by hand needs some time


def keys(case: Case) -> Iterator[Finding]:
    """Yield whether the keys are there, of the right kind, and nobody else's to read."""
    wrong = [text for text in (_signing(case), _node(case.config.link.node_key)) if text]
    if wrong:
        cure = "restore the file from the backup; a new key is a new site, to be enrolled again"
        yield Finding("keys", False, "; ".join(wrong), "settings", cure)
        return
    shared = [what for what, file in case.secrets.items() if _is_shared(file)]
    if shared:
        names = " ".join(f'"{case.secrets[what]}"' for what in shared)
        said = f"others on this machine may read the {' and the '.join(shared)}"
        yield Finding("keys", False, said, "settings", f"chmod 600 {names}")
        return
    said = f"signing {public_key(load_key(case.config.signing_key))[:12]}…, readable by you alone"
    yield Finding("keys", True, said, "settings")


def authority(case: Case) -> Iterator[Finding]:
    """Yield whether the consortium's authority, by which the coordinator is known, holds."""
    found = read_authority(case.config.link.root_certificates)
    cure = "ask the coordinator for the file, and compare its fingerprint by phone"
    if found is None:
        said = "link.root_certificates holds no certificate that can be read"
        yield Finding("authority", False, said, "settings", cure)
        return
    days = _days_left(found)
    said = f"{name_of(found.subject)}, {_valid(days)}"
    yield Finding("authority", _is_lasting(days), said, "settings", cure, {"days_left": days})


def certificate(case: Case) -> Iterator[Finding]:
    """Yield whether this site's certificate on the control plane fits its key and still holds."""
    file = case.config.link.certificate
    if file is None:
        return
    what, cure = "certificate", "ask the coordinator for a new invite, then: consilia-site join"
    try:
        content = file.read_bytes()
        found = x509.load_pem_x509_certificate(content)
        key = serialization.load_pem_private_key(content, password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        said = f"link.certificate cannot be read as a certificate and its key: {_kind(error)}"
        yield Finding(what, False, said, "settings", cure)
        return
    if key.public_key() != found.public_key():
        yield Finding(what, False, "the key beside it is another's", "settings", cure)
        return
    days = _days_left(found)
    yield Finding(what, _is_lasting(days), _valid(days), "settings", cure, {"days_left": days})


def plan(case: Case) -> Iterator[Finding]:
    """Yield whether this hospital's rules allow the plan."""
    from client.policy import is_quiet, judge

    if case.plan is None:
        return
    now = datetime.now(UTC)
    found = judge(case.plan, case.config, today=now.date())
    if found:
        said = f"{several(len(found), 'objection')} by this hospital's rules, the first: {found[0]}"
        yield Finding("plan", False, said, "settings", "see all of them with: consilia-site judge")
    elif is_quiet(case.config.policy, now):
        said = "allowed; nothing is trained at this hour (policy.quiet_hours)"
        yield Finding("plan", True, said, "settings")
    else:
        yield Finding("plan", True, f"'{case.plan.name}' is allowed by every rule", "settings")


def read_authority(file: Path) -> x509.Certificate | None:
    """Return the first certificate in ``file``, or nothing if it cannot be read."""
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError):
        return None


def name_of(name: x509.Name) -> str:
    """Return the common name, or else the organisation, that a certificate gives somebody."""
    kinds = (x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME)
    found = [str(part.value) for kind in kinds for part in name.get_attributes_for_oid(kind)]
    text = "".join(c for c in (found or ["somebody unnamed"])[0] if c.isprintable())
    return text[:80]


def _signing(case: Case) -> str | None:
    try:
        load_key(case.config.signing_key)
    except ConsiliaError as error:
        return str(error)
    return None


def _node(file: Path) -> str | None:
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        return f"cannot read the node key {file}: {type(error).__name__}"
    is_ec = isinstance(key, ec.EllipticCurvePrivateKey)
    return None if is_ec else f"expected an EC key in {file}, got another kind"


def _is_shared(file: Path) -> bool:
    found = file.stat()
    return bool(found.st_mode & 0o077) or found.st_uid not in (os.getuid(), 0)


def _days_left(found: x509.Certificate) -> int:
    now = datetime.now(UTC)
    return -1 if now < found.not_valid_before_utc else (found.not_valid_after_utc - now).days


def _valid(days: int) -> str:
    return f"valid for {several(days, 'day')} more" if days >= 0 else "not valid today"


def _is_lasting(days: int) -> bool | None:
    return None if 0 <= days < DAYS_LEFT else days >= 0


def _kind(error: Exception) -> str:
    return type(error).__name__

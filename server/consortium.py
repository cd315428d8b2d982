"""The consortium's own certificate authority, and the certificates it issues.

Guarantees:
    A private key is readable by its owner alone.
    A certificate is renewed by the same authority.
    Of a site's request only the key counts: what its certificate says is the authority's word.
    A server's certificate that a kill left without its key is issued anew.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared_models.errors import DocumentError, SignatureError
from shared_models.files import replace
from shared_models.signing import write_secret

SERVER_DAYS = 397
RENEW_DAYS = 30  # a server's certificate with fewer left is issued anew
SITE_DAYS = 90


class TlsFiles(NamedTuple):
    """The consortium's own authority, and the certificate and key of its servers."""

    authority: Path
    certificate: Path
    key: Path


def certificates(folder: Path, *, hosts: list[str]) -> TlsFiles:
    """Issue the servers' certificate for ``hosts`` (names or addresses) into ``folder``.

    The first call makes the authority, valid for ten years; later calls keep it and issue a new
    certificate, valid for 397 days, as the sites that trust the authority expect.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = TlsFiles(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    authority_key, authority = _authority(files.authority, key_file=folder / "ca.key")
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    certificate = (
        _leaf(hosts[0], key.public_key(), authority_key, days=SERVER_DAYS)
        .issuer_name(authority.subject)
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    replace(files.key, _private_pem(key), mode=0o600)
    replace(files.certificate, certificate.public_bytes(serialization.Encoding.PEM))
    return files


def current(folder: Path, *, hosts: list[str], now: datetime) -> TlsFiles:
    """Return the servers' certificate, issued anew if it has few days left or does not serve.

    Raises:
        DocumentError: if the authority's files cannot be read.
    """
    files = TlsFiles(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    if _serves(files, hosts=hosts, until=now + timedelta(days=RENEW_DAYS)):
        return files
    return certificates(folder, hosts=hosts)


def public_key_of(csr: str) -> ec.EllipticCurvePublicKey:
    """Return the key that a certificate request asks for, which it shows to hold.

    Raises:
        SignatureError: if it is no such request, or not for a key on the curve P-256.
    """
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        is_theirs = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        raise SignatureError("the certificate request cannot be read") from None
    if not is_theirs:
        raise SignatureError("the certificate request is not signed by the key it is for")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise SignatureError("expected a certificate request for a key on the curve P-256")
    return key


def issue(
    folder: Path, csr: str, *, site: str, now: datetime, days: int = SITE_DAYS
) -> x509.Certificate:
    """Issue a site's certificate for the key in ``csr``; everything else in it is ours.

    Raises:
        SignatureError: if ``csr`` is no certificate request for a key on the curve P-256.
        DocumentError: if the authority's files cannot be read.
    """
    key = public_key_of(csr)
    authority_key, authority = _authority(folder / "ca.crt", key_file=folder / "ca.key")
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:consilia:{site}")])
    return (
        _leaf(site, key, authority_key, days=days, now=now)
        .issuer_name(authority.subject)
        .add_extension(name, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .sign(authority_key, hashes.SHA256())
    )


def _serves(files: TlsFiles, *, hosts: list[str], until: datetime) -> bool:
    """Tell whether the servers' certificate is its key's, names ``hosts`` and holds ``until``."""
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
        authority = x509.load_pem_x509_certificate(files.authority.read_bytes())
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    is_its_keys = certificate.public_key() == key.public_key()
    is_for_all = {_general_name(host) for host in hosts} <= set(names)
    return is_its_keys and is_for_all and certificate.not_valid_after_utc > until


def _authority(
    file: Path, *, key_file: Path
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    if key_file.exists():
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            authority = x509.load_pem_x509_certificate(file.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise DocumentError(
                f"cannot read the consortium's authority in {file.parent}: {type(error).__name__}"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise DocumentError(f"expected an EC key in {key_file}, got another kind")
        return key, authority
    key = ec.generate_private_key(ec.SECP384R1())
    draft = _draft("Consilia consortium", key.public_key(), days=3653)
    authority = (
        draft.issuer_name(_name("Consilia consortium"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    replace(file, authority.public_bytes(serialization.Encoding.PEM))
    write_secret(key_file, _private_pem(key))  # last: without it, all is made anew
    return key, authority


def _leaf(
    name: str,
    key: ec.EllipticCurvePublicKey,
    authority_key: ec.EllipticCurvePrivateKey,
    *,
    days: int,
    now: datetime | None = None,
) -> x509.CertificateBuilder:
    authority = authority_key.public_key()
    return (
        _draft(name, key, days=days, now=now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority), critical=False
        )
    )


def _draft(
    name: str, key: ec.EllipticCurvePublicKey, *, days: int, now: datetime | None = None
) -> x509.CertificateBuilder:
    now = now or datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )

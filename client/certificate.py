"""The site's certificate on the control plane: one file that holds it and its key.

Guarantees:
    The file is readable by its owner alone.
    A kill leaves the old pair of key and certificate or the new one, never a mixture.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from client.config import SiteConfig
from shared_models.errors import DocumentError
from shared_models.files import replace
from shared_models.signing import digest

RENEW_DAYS = 30  # a third of the ninety that a certificate is valid


def read(file: Path) -> x509.Certificate:
    """Return the certificate in ``file``.

    Raises:
        DocumentError: if there is none.
    """
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except FileNotFoundError:
        raise DocumentError(
            f"there is no certificate {file}: this site has not been let in; run consilia-site join"
        ) from None
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot read the certificate {file}: {type(error).__name__}") from None


def write(file: Path, *, key: bytes, certificate: str) -> None:
    """Put a key (PEM) and its certificate into ``file`` in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, key.rstrip() + b"\n" + certificate.encode(), mode=0o600)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the digest that stands for a certificate in the journal and in the register."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return digest(certificate.public_bytes(Encoding.DER))


def days_left(config: SiteConfig) -> int | None:
    """Return how many whole days the site's certificate holds; None if it never joined.

    Raises:
        DocumentError: if its file cannot be read.
    """
    if config.link.certificate is None:
        return None
    return (read(config.link.certificate).not_valid_after_utc - datetime.now(UTC)).days

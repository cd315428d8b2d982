"""An office, and hospitals' requests to join it, all real and all small."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server import office as offices
from server.office import Office
from shared_models.contracts import JoinRequest, SignedInvite, SignedJoinRequest
from shared_models.signing import digest, public_key, sign
from shared_models.words import words


class Newcomer(NamedTuple):
    """A hospital's keys, made before it asks; ``ask`` makes its request."""

    signing: Ed25519PrivateKey
    node: ec.EllipticCurvePrivateKey
    control: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls) -> Newcomer:
        return cls(
            Ed25519PrivateKey.generate(),
            ec.generate_private_key(ec.SECP384R1()),
            ec.generate_private_key(ec.SECP256R1()),
        )

    def ask(self, invite: SignedInvite, **changed: Any) -> SignedJoinRequest:
        node = self.node.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        fields: dict[str, Any] = {
            "site": invite.invite.site,
            "invite": digest(invite.invite),
            "signing": public_key(self.signing),
            "node": node.decode(),
            "csr": _csr_of(self.control),
            "when": datetime.now(UTC),
        }
        request = JoinRequest.model_validate(fields | changed)
        return SignedJoinRequest(request=request, signature=sign(request, key=self.signing))


def _csr_of(key: Any, *, name: str = "somebody else") -> str:
    """Return a certificate request; what it says but its key counts for nothing."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject)
    csr = csr.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = csr.sign(key, None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return offices.create(
        tmp_path / "office",
        name="Lungs of the North",
        fleet="fleet.example.org:443",
        control="control.example.org:8443",
        enrolment="control.example.org:8444",
    )


@pytest.fixture
def new_site() -> Callable[[], Newcomer]:
    return Newcomer.new


@pytest.fixture
def enrol(office: Office) -> Callable[..., SignedJoinRequest]:
    """Return what invites a site, lets it ask and lets it in; its accepted request comes back."""

    def make(site: str, newcomer: Newcomer | None = None) -> SignedJoinRequest:
        request = (newcomer or Newcomer.new()).ask(offices.invite(office, site))
        offices.receive(office, request)
        offices.accept(office, site, words(digest(request.request)))
        return request

    return make


@pytest.fixture
def csr_of() -> Callable[..., str]:
    return _csr_of

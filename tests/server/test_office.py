"""Who is let into the consortium: by whom, by which words, until when."""

from __future__ import annotations

import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server import consortium, register
from server import office as offices
from server.office import Office
from shared_models.contracts import SignedAdmission, SignedJoinRequest
from shared_models.errors import ConsiliaError, DocumentError, SignatureError
from shared_models.signing import digest, is_signed_by, public_key, sign
from shared_models.words import words

ADDRESSES = {"fleet": "a.org:443", "control": "b.org:443", "enrolment": "c.org:443"}
Enrol = Callable[..., SignedJoinRequest]


def content(office: Office) -> bytes:
    return (office.folder / register.FILE).read_bytes()


def status(admission: SignedAdmission) -> str:
    return admission.admission.status


def spoken(request: SignedJoinRequest) -> str:
    return words(digest(request.request))


# --- the folder


def test_an_office_is_read_as_it_was_made(office: Office) -> None:
    assert offices.read(office.folder).settings == office.settings
    assert public_key(offices.read(office.folder).key) == public_key(office.key)
    assert office.settings.listen.control == "0.0.0.0:8443"


def test_secrets_of_the_office_are_readable_by_their_owner_alone(office: Office) -> None:
    secret = [file for file in office.folder.rglob("*") if file.is_file()]
    secret = [file for file in secret if b"PRIVATE" in file.read_bytes()]
    assert {file.name for file in secret} == {"signing.pem", "ca.key", "server.key"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in secret} == {0o600}


def test_addresses_that_share_a_port_are_listened_to_behind_a_router(tmp_path: Path) -> None:
    listen = offices.create(tmp_path / "o", name="x", **ADDRESSES).settings.listen
    assert len({listen.fleet, listen.control, listen.enrolment}) == 3
    assert all(address.startswith("127.0.0.1:") for _, address in listen)


def test_nothing_of_an_office_is_overwritten(office: Office) -> None:
    before = {file: file.read_bytes() for file in office.folder.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError):
        offices.create(office.folder, name="other", **ADDRESSES)
    assert {file: file.read_bytes() for file in before} == before


def test_a_killed_init_goes_on_with_the_keys_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "o"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(offices, "create_file", killed)
        offices.create(folder, name="x", **ADDRESSES)
    key, authority = (folder / "signing.pem").read_bytes(), (folder / "tls/ca.crt").read_bytes()
    with pytest.raises(DocumentError, match="no coordinator's office"):
        offices.read(folder)
    offices.create(folder, name="x", **ADDRESSES)
    assert (folder / "signing.pem").read_bytes() == key
    assert (folder / "tls/ca.crt").read_bytes() == authority


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"control": "b.org"}, DocumentError),
        ({"fleet": "https://a.org:443"}, DocumentError),
        ({"name": ""}, DocumentError),
        ({"name": 'x"\nfleet = "evil:1'}, ValueError),
    ],
)
def test_a_setting_that_does_not_belong_makes_nothing(
    changed: dict[str, str], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        offices.create(tmp_path / "o", **({"name": "x"} | ADDRESSES | changed))
    assert not (tmp_path / "o").exists()


# --- invites


def test_an_invite_is_signed_and_holds_no_secret(office: Office) -> None:
    signed = offices.invite(office, "north", days=3)
    assert is_signed_by(signed.invite, signed.signature, key=public_key(office.key))
    assert signed.invite.coordinator == public_key(office.key)
    assert signed.invite.authority == (office.folder / "tls/ca.crt").read_text()
    assert timedelta(days=2) < signed.invite.expires_at - datetime.now(UTC) <= timedelta(days=3)
    assert "PRIVATE" not in signed.model_dump_json()


def test_no_two_invites_are_one(office: Office) -> None:
    assert (
        offices.invite(office, "north").invite.nonce != offices.invite(office, "south").invite.nonce
    )


@pytest.mark.parametrize("name", ["", "north clinic", "../north", "n" * 64, "nörth"])
def test_a_name_that_is_none_is_refused(name: str, office: Office) -> None:
    before = content(office)
    with pytest.raises(ConsiliaError, match="letters, digits"):
        offices.invite(office, name)
    assert content(office) == before


def test_a_new_invite_takes_the_place_of_the_last(office: Office, new_site: Any) -> None:
    first, second = offices.invite(office, "north"), offices.invite(office, "north")
    assert status(offices.receive(office, new_site().ask(first))) == "refused"
    assert status(offices.receive(office, new_site().ask(second))) == "pending"


def test_an_enrolled_site_is_not_invited_anew(office: Office, enrol: Enrol) -> None:
    enrol("north")
    with pytest.raises(ConsiliaError, match="revoke it before"):
        offices.invite(office, "north")


# --- requests


def test_the_same_request_gets_the_same_answer_and_is_written_once(
    office: Office, new_site: Any
) -> None:
    request = new_site().ask(offices.invite(office, "north"))
    answers = [offices.receive(office, request)]
    before = content(office)
    answers += [offices.receive(office, request) for _ in range(3)]
    assert [status(answer) for answer in answers] == ["pending"] * 4
    assert content(office) == before
    assert all(
        is_signed_by(answer.admission, answer.signature, key=public_key(office.key))
        and answer.admission.request == digest(request.request)
        for answer in answers
    )


def hostile(kind: str, office: Office, new_site: Any, enrol: Enrol) -> SignedJoinRequest:
    """Return a well-signed request that must not be let in."""
    newcomer = new_site()
    if kind == "uninvited":
        foreign = offices.create(office.folder / "other", name="x", **ADDRESSES)
        return newcomer.ask(offices.invite(foreign, "north"))
    if kind == "another site's invite":
        offices.invite(office, "south")
        return newcomer.ask(offices.invite(office, "north"), site="south")
    if kind == "expired":
        return newcomer.ask(offices.invite(office, "north", days=-1))
    if kind == "used":
        invite = offices.invite(office, "north")
        offices.receive(office, new_site().ask(invite))
        return newcomer.ask(invite)
    if kind == "accepted already":
        enrol("north")
        return newcomer.ask(offices.sites(office)["north"].invite)
    if kind == "refused":
        request = newcomer.ask(offices.invite(office, "north"))
        offices.receive(office, request)
        offices.refuse(office, "north")
        return request
    if kind == "revoked":
        request = enrol("north")
        offices.revoke(office, "north")
        return request
    if kind == "revoked keys":
        enrol("north", newcomer)
        offices.revoke(office, "north")
        return newcomer.ask(offices.invite(office, "north"))
    if kind == "another site's node key":
        enrol("south", newcomer)
        thief = new_site()._replace(node=newcomer.node)
        return thief.ask(offices.invite(office, "north"))
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "uninvited",
        "another site's invite",
        "expired",
        "used",
        "accepted already",
        "refused",
        "revoked",
        "revoked keys",
        "another site's node key",
    ],
)
def test_a_refused_request_writes_nothing_and_all_are_answered_alike(
    kind: str, office: Office, new_site: Any, enrol: Enrol
) -> None:
    request = hostile(kind, office, new_site, enrol)
    before = content(office)
    answer = offices.receive(office, request).admission
    assert content(office) == before
    assert answer.model_dump(exclude={"when"}) == {
        "schema_version": 1,
        "site": request.request.site,
        "request": digest(request.request),
        "status": "refused",
        "certificate": None,
    }


@pytest.mark.parametrize("kind", ["signature", "csr", "csr's curve", "csr's signature", "node"])
def test_a_request_whose_keys_are_none_writes_nothing(
    kind: str, office: Office, new_site: Any, csr_of: Callable[..., str]
) -> None:
    newcomer, invite = new_site(), offices.invite(office, "north")
    changes = {
        "signature": {},
        "csr": {"csr": "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"},
        "csr's curve": {"csr": csr_of(ec.generate_private_key(ec.SECP384R1()))},
        "csr's signature": {"csr": resigned(csr_of(newcomer.control))},
        "node": {"node": "ecdsa-sha2-nistp384 AAAA"},
    }
    request = newcomer.ask(invite, **changes[kind])
    if kind == "signature":
        other = sign(request.request, key=Ed25519PrivateKey.generate())
        request = request.model_copy(update={"signature": other})
    before = content(office)
    with pytest.raises(SignatureError):
        offices.receive(office, request)
    assert content(office) == before


def resigned(csr: str) -> str:
    """Return a certificate request whose signature is of something else."""
    der = bytearray(x509.load_pem_x509_csr(csr.encode()).public_bytes(Encoding.DER))
    der[der.index(b"somebody")] ^= 1
    found = x509.load_der_x509_csr(bytes(der))
    assert not found.is_signature_valid
    return found.public_bytes(Encoding.PEM).decode()


# --- decisions


def test_only_the_words_of_the_sites_own_request_let_it_in(office: Office, new_site: Any) -> None:
    invite = offices.invite(office, "north")
    request, other = new_site().ask(invite), new_site().ask(invite)
    offices.receive(office, request)
    before = content(office)
    for wrong in (spoken(other), "", spoken(request)[:-1], "lusab babad gutih tugad mudof"):
        with pytest.raises(ConsiliaError, match="nobody is let in"):
            offices.accept(office, "north", wrong)
    assert content(office) == before
    assert b"BEGIN CERTIFICATE-----" not in content(office).split(b"requested")[1]
    offices.accept(office, "north", spoken(request).upper().replace("-", " "))
    assert status(offices.receive(office, request)) == "accepted"
    assert status(offices.receive(office, other)) == "refused"


def test_nobody_is_let_in_twice_or_without_asking(office: Office, new_site: Any) -> None:
    request = new_site().ask(offices.invite(office, "north"))
    with pytest.raises(ConsiliaError, match="no request to decide on; it is invited"):
        offices.accept(office, "north", spoken(request))
    with pytest.raises(ConsiliaError, match="no site called 'south'; known: north"):
        offices.accept(office, "south", spoken(request))
    offices.receive(office, request)
    offices.accept(office, "north", spoken(request))
    before = content(office)
    offices.accept(office, "north", spoken(request))
    assert content(office) == before
    with pytest.raises(ConsiliaError, match="no request to decide on; it is enrolled"):
        offices.refuse(office, "north")


def test_a_certificate_says_what_the_authority_says(office: Office, enrol: Enrol) -> None:
    request = enrol("north").request
    (issued,) = offices.sites(office)["north"].issued
    found = x509.load_pem_x509_certificate(issued.certificate.encode())
    found.verify_directly_issued_by(
        x509.load_pem_x509_certificate((office.folder / "tls/ca.crt").read_bytes())
    )
    assert found.public_key() == x509.load_pem_x509_csr(request.csr.encode()).public_key()
    assert [one.value for one in found.subject] == ["north"]
    assert found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert (found.not_valid_after_utc - datetime.now(UTC)).days == consortium.SITE_DAYS - 1
    assert issued.fingerprint == register.fingerprint(issued.certificate)


def test_what_was_refused_may_come_again_with_another_invite(office: Office, new_site: Any) -> None:
    newcomer = new_site()
    offices.receive(office, newcomer.ask(offices.invite(office, "north")))
    offices.refuse(office, "north")
    again = newcomer.ask(offices.invite(office, "north"))
    assert status(offices.receive(office, again)) == "pending"
    offices.accept(office, "north", spoken(again))
    assert list(offices.enrolled(office)) == ["north"]


def test_a_key_another_site_brought_meanwhile_lets_nobody_in(office: Office, new_site: Any) -> None:
    one = new_site()
    first = one.ask(offices.invite(office, "north"))
    second = new_site()._replace(node=one.node).ask(offices.invite(office, "south"))
    for request in (first, second):
        assert status(offices.receive(office, request)) == "pending"
    offices.accept(office, "north", spoken(first))
    with pytest.raises(ConsiliaError, match="another site's"):
        offices.accept(office, "south", spoken(second))
    assert list(offices.enrolled(office)) == ["north"]


def test_a_revoked_site_is_not_enrolled_and_no_other_notices(
    office: Office, enrol: Enrol, new_site: Any
) -> None:
    requests = {site: enrol(site) for site in ("north", "south")}
    marks = {site: offices.sites(office)[site].issued[0].fingerprint for site in requests}
    south = offices.sites(office)["south"]
    offices.revoke(office, "north")
    assert list(offices.enrolled(office)) == ["south"]
    assert not offices.is_let_in(office, site="north", fingerprint=marks["north"])
    assert offices.is_let_in(office, site="south", fingerprint=marks["south"])
    assert offices.sites(office)["south"] == south
    with pytest.raises(SignatureError):
        offices.renew(office, "north", requests["north"])
    request = new_site().ask(offices.invite(office, "north"))
    assert status(offices.receive(office, request)) == "pending"
    offices.accept(office, "north", spoken(request))
    assert offices.enrolled(office)["north"].signing == request.request.signing
    assert not offices.is_let_in(office, site="north", fingerprint=marks["north"])


def test_a_certificate_lets_its_own_site_in_only(office: Office, enrol: Enrol) -> None:
    enrol("north")
    enrol("south")
    mark = offices.sites(office)["north"].issued[0].fingerprint
    assert offices.is_let_in(office, site="north", fingerprint=mark)
    assert not offices.is_let_in(office, site="south", fingerprint=mark)
    assert not offices.is_let_in(office, site="nowhere", fingerprint=mark)


def expire(monkeypatch: pytest.MonkeyPatch, *, days: int) -> None:
    """Let certificates be issued that hold ``days`` days; under 0 they are issued in the past."""
    issue = consortium.issue

    def short(folder: Path, csr: str, *, site: str, now: datetime) -> x509.Certificate:
        return issue(folder, csr, site=site, now=now - timedelta(days=30), days=days + 30)

    monkeypatch.setattr(consortium, "issue", short)


def test_an_expired_site_is_not_enrolled_and_may_come_again_with_its_keys(
    office: Office, enrol: Enrol, new_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    newcomer = new_site()
    with monkeypatch.context() as patch:
        expire(patch, days=-1)
        request = enrol("north", newcomer)
    assert offices.enrolled(office) == {}
    assert [row.state for row in offices.table(office)] == ["expired"]
    with pytest.raises(SignatureError):
        offices.renew(office, "north", request)
    again = newcomer.ask(offices.invite(office, "north"))
    offices.receive(office, again)
    offices.accept(office, "north", spoken(again))
    assert offices.enrolled(office)["north"].signing == request.request.signing


# --- renewal


def test_a_renewal_keeps_the_keys_and_leaves_the_old_certificate_its_days(
    office: Office, enrol: Enrol, new_site: Any
) -> None:
    newcomer = new_site()
    enrol("north", newcomer)
    keys = offices.enrolled(office)
    invite = offices.sites(office)["north"].invite
    request = newcomer._replace(control=new_site().control).ask(invite)
    answer = offices.renew(office, "north", request)
    assert status(answer) == "accepted"
    marks = [one.fingerprint for one in offices.sites(office)["north"].issued]
    assert len(set(marks)) == 2
    assert all(offices.is_let_in(office, site="north", fingerprint=mark) for mark in marks)
    assert offices.enrolled(office) == keys
    before = content(office)
    again = offices.renew(office, "north", request).admission
    assert again.certificate == answer.admission.certificate
    assert content(office) == before


@pytest.mark.parametrize("kind", ["signing", "node", "site", "invite"])
def test_a_renewal_with_another_key_is_refused(
    kind: str, office: Office, enrol: Enrol, new_site: Any
) -> None:
    newcomer, other = new_site(), new_site()
    enrol("north", newcomer)
    enrol("south", other)
    invites = {site: found.invite for site, found in offices.sites(office).items()}
    request = {
        "signing": newcomer._replace(signing=other.signing).ask(invites["north"]),
        "node": newcomer._replace(node=other.node).ask(invites["north"]),
        "site": other.ask(invites["south"]),
        "invite": newcomer.ask(invites["south"], site="north"),
    }[kind]
    before = content(office)
    with pytest.raises(SignatureError):
        offices.renew(office, "north", request)
    assert content(office) == before


def test_a_site_has_few_certificates_at_once(office: Office, enrol: Enrol, new_site: Any) -> None:
    newcomer = new_site()
    enrol("north", newcomer)
    invite = offices.sites(office)["north"].invite
    answers = [
        status(offices.renew(office, "north", newcomer._replace(control=key).ask(invite)))
        for key in [new_site().control for _ in range(offices.MOST_CERTIFICATES + 1)]
    ]
    assert answers == ["accepted"] * (offices.MOST_CERTIFICATES - 1) + ["refused"] * 2


# --- the table


def test_the_table_tells_every_state_with_its_days(
    office: Office, enrol: Enrol, new_site: Any
) -> None:
    enrol("a")
    offices.invite(office, "b", days=14)
    offices.invite(office, "c", days=-1)
    request = new_site().ask(offices.invite(office, "d"))
    offices.receive(office, request)
    enrol("e")
    offices.revoke(office, "e")
    (office.folder / "visits").mkdir()
    (office.folder / "visits" / "a.json").write_text('{"when": "2026-03-01T12:00:00Z"}')
    rows = {row.site: row for row in offices.table(office)}
    found = {site: (row.state, row.days_left) for site, row in rows.items()}
    assert found == {
        "a": ("enrolled", 89),
        "b": ("invited", 13),
        "c": ("expired", -2),
        "d": ("pending", None),
        "e": ("revoked", None),
    }
    assert {site: row.words for site, row in rows.items() if row.words} == {"d": spoken(request)}
    assert rows["a"].last_seen == datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_the_servers_certificate_is_renewed_when_it_is_time(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = offices.certify(office).certificate.read_bytes()
    assert offices.certify(office).certificate.read_bytes() == before
    monkeypatch.setattr(consortium, "RENEW_DAYS", consortium.SERVER_DAYS)
    assert offices.certify(office).certificate.read_bytes() != before


def test_a_servers_certificate_without_its_key_is_issued_anew(office: Office) -> None:
    tls = offices.certify(office)
    authority, key = tls.authority.read_bytes(), tls.key.read_bytes()
    tls.key.write_bytes(office.folder.joinpath("tls/ca.key").read_bytes())
    offices.certify(office)
    assert tls.key.read_bytes() not in (key, office.folder.joinpath("tls/ca.key").read_bytes())
    assert tls.authority.read_bytes() == authority


def test_a_new_host_name_is_certified(office: Office) -> None:
    named = office.settings.model_copy(update={"control": "new.example.org:443"})
    found = x509.load_pem_x509_certificate(
        offices.certify(office._replace(settings=named)).certificate.read_bytes()
    )
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "new.example.org" in names.get_values_for_type(x509.DNSName)

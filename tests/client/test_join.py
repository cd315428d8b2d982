"""Joining and renewing: nothing made for nothing, nothing lost to a kill, no wrong certificate."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from client import certificate, control, join
from client import config as configs
from client.control import Link
from shared_models import journal
from shared_models.contracts import (
    Admission,
    Invite,
    SignedAdmission,
    SignedInvite,
    SignedJoinRequest,
)
from shared_models.errors import ConsiliaError, DocumentError, SignatureError
from shared_models.signing import canonical, digest, is_signed_by, load_key, public_key, sign
from shared_models.words import words

DATA = join.Data(Path("/data/manifest.csv"), Path("/data"), max_epsilon=4.0)


class Coordinator(NamedTuple):
    """A coordinator's keys; it invites and admits whatever a test wants."""

    key: Ed25519PrivateKey
    authority_key: ec.EllipticCurvePrivateKey
    authority: x509.Certificate

    @classmethod
    def new(cls, key: Ed25519PrivateKey | None = None) -> Coordinator:
        authority_key = ec.generate_private_key(ec.SECP256R1())
        authority = certified(authority_key.public_key(), "authority", by=authority_key)
        return cls(key or Ed25519PrivateKey.generate(), authority_key, authority)

    def invite(self, **changed: Any) -> Invite:
        fields: dict[str, Any] = {
            "consortium": "Lungs of the North",
            "site": "north",
            "coordinator": public_key(self.key),
            "authority": pem(self.authority),
            "fleet": "fleet.example.org:443",
            "control": "control.example.org:443",
            "enrolment": "control.example.org:8443",
            "nonce": os.urandom(32).hex(),
            "expires_at": datetime.now(UTC) + timedelta(days=14),
        }
        return Invite.model_validate(fields | changed)

    def admit(self, request: SignedJoinRequest, /, **changed: Any) -> SignedAdmission:
        key = x509.load_pem_x509_csr(request.request.csr.encode()).public_key()
        issued = certified(key, request.request.site, by=self.authority_key, days=90)
        fields: dict[str, Any] = {
            "site": request.request.site,
            "request": digest(request.request),
            "status": "accepted",
            "certificate": pem(issued),
            "when": datetime.now(UTC),
        }
        admission = Admission.model_validate(fields | changed)
        return SignedAdmission(admission=admission, signature=sign(admission, key=self.key))


def certified(
    key: Any, name: str, *, by: ec.EllipticCurvePrivateKey, days: int = 365, since: int = -1
) -> x509.Certificate:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=since))
        .not_valid_after(now + timedelta(days=days, hours=1))
        .sign(by, hashes.SHA256())
    )


def pem(found: x509.Certificate) -> str:
    return found.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator.new()


@pytest.fixture
def joining(coordinator: Coordinator, tmp_path: Path) -> join.Joining:
    return join.prepare(coordinator.invite(), tmp_path / "north", DATA)


def request_of(joining: join.Joining) -> SignedJoinRequest:
    assert joining.asked is not None
    return joining.asked.request


def written(file: Path, signed: SignedInvite) -> Path:
    file.write_bytes(canonical(signed))
    return file


def kinds(config: configs.SiteConfig) -> list[str]:
    chain = journal.follow((config.state_dir / journal.FILE).read_bytes(), site=config.name)
    assert chain.fault is None
    return [line.entry.kind for line in chain.lines]


# --- the invite


def test_an_invite_is_read_as_it_was_signed(coordinator: Coordinator, tmp_path: Path) -> None:
    invite = coordinator.invite()
    signed = SignedInvite(invite=invite, signature=sign(invite, key=coordinator.key))
    assert join.read_invite(written(tmp_path / "invite", signed)) == invite


@pytest.mark.parametrize(
    "change", ["coordinator", "authority", "control", "enrolment", "signature"]
)
def test_an_invite_changed_on_its_way_is_refused(
    change: str, coordinator: Coordinator, tmp_path: Path
) -> None:
    invite, other = coordinator.invite(), Coordinator.new()
    signature = sign(invite, key=coordinator.key)
    if change == "signature":
        signature = sign(invite, key=other.key)
    else:
        foreign = other.invite(control="evil.example.org:443", enrolment="evil.example.org:443")
        invite = invite.model_copy(update={change: getattr(foreign, change)})
    file = written(tmp_path / "invite", SignedInvite(invite=invite, signature=signature))
    with pytest.raises(SignatureError, match="changed on its way"):
        join.read_invite(file)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 10, b"[" * 60_000, b" " * 2**17])
def test_what_is_no_invite_is_refused_without_its_words(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "invite").write_bytes(content)
    with pytest.raises(DocumentError, match=r"invite"):
        join.read_invite(tmp_path / "invite")


def test_an_invite_whose_authority_is_no_certificate_is_refused(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    invite = coordinator.invite(authority="-----BEGIN CERTIFICATE-----\nAAAA\n")
    signed = SignedInvite(invite=invite, signature=sign(invite, key=coordinator.key))
    with pytest.raises(DocumentError, match="cannot read the invite"):
        join.read_invite(written(tmp_path / "invite", signed))


# --- asking


def test_a_new_site_has_its_keys_and_asks_with_their_public_halves(
    joining: join.Joining, coordinator: Coordinator
) -> None:
    config, request = joining.config, request_of(joining).request
    assert config == configs.read(config.signing_key.parents[1] / "site.toml")
    assert (config.link.control, config.link.address) == (
        "control.example.org:443",
        "fleet.example.org:443",
    )
    assert config.coordinator == public_key(coordinator.key)
    assert config.policy.max_epsilon_per_study == 4.0
    assert request.signing == public_key(load_key(config.signing_key))
    assert request.invite == digest(joining.invite)
    assert is_signed_by(request, request_of(joining).signature, key=request.signing)
    assert joining.words == words(digest(request))
    private = serialization.load_ssh_private_key(config.link.node_key.read_bytes(), password=None)
    assert private.public_key() == serialization.load_ssh_public_key(request.node.encode())


def test_private_keys_are_readable_by_their_owner_alone_and_do_not_leave(
    joining: join.Joining, coordinator: Coordinator
) -> None:
    join.take(joining, coordinator.admit(request_of(joining)))
    joining = join.Joining(
        joining.config, joining.invite, join._ask(joining.config, invite="0" * 64)
    )
    folder = joining.config.signing_key.parents[1]
    files = [file for file in folder.rglob("*") if file.is_file()]
    secret = [file for file in files if b"PRIVATE" in file.read_bytes()]
    assert {file.name for file in secret} == {"signing.pem", "node", "control.pem", "asked.json"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in secret} == {0o600}
    assert "PRIVATE" not in request_of(joining).model_dump_json()


def test_asked_again_the_request_and_the_keys_are_the_same(
    joining: join.Joining, tmp_path: Path
) -> None:
    files = {file: file.read_bytes() for file in (tmp_path / "north").rglob("*") if file.is_file()}
    again = join.prepare(joining.invite, tmp_path / "north", None)
    assert again == joining
    assert {file: file.read_bytes() for file in files} == files


def test_another_invite_of_the_same_site_keeps_its_keys(
    joining: join.Joining, coordinator: Coordinator, tmp_path: Path
) -> None:
    again = join.prepare(coordinator.invite(), tmp_path / "north", None)
    one, two = request_of(joining).request, request_of(again).request
    assert (one.signing, one.node) == (two.signing, two.node)
    assert one.csr != two.csr
    assert joining.words != again.words


def test_two_sites_share_no_key(coordinator: Coordinator, tmp_path: Path) -> None:
    invite = coordinator.invite()
    one, two = (request_of(join.prepare(invite, tmp_path / name, DATA)).request for name in "ab")
    assert not {one.signing, one.node, one.csr} & {two.signing, two.node, two.csr}


def test_a_swapped_authority_or_coordinator_gives_other_words(
    joining: join.Joining, coordinator: Coordinator
) -> None:
    request = request_of(joining).request
    swapped = [
        joining.invite.model_copy(update={"authority": pem(Coordinator.new().authority)}),
        joining.invite.model_copy(update={"coordinator": public_key(Coordinator.new().key)}),
        joining.invite.model_copy(update={"control": "evil.example.org:443"}),
    ]
    others = {
        words(digest(request.model_copy(update={"invite": digest(invite)}))) for invite in swapped
    }
    assert len(others | {joining.words}) == 4


@pytest.mark.parametrize(
    ("data", "changed", "sentence"),
    [
        (None, {}, "--manifest"),
        (DATA, {"expires_at": datetime(2026, 1, 1, tzinfo=UTC)}, "expired on 2026-01-01"),
        (DATA._replace(max_epsilon=-1.0), {}, "max_epsilon"),
    ],
)
def test_what_cannot_be_joined_makes_nothing(
    data: join.Data | None,
    changed: dict[str, Any],
    sentence: str,
    coordinator: Coordinator,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConsiliaError, match=sentence):
        join.prepare(coordinator.invite(**changed), tmp_path / "north", data)
    assert not (tmp_path / "north").exists()


def test_keys_of_something_else_are_left_alone(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "signing.pem").write_text("theirs")
    with pytest.raises(ConsiliaError, match="choose another --folder"):
        join.prepare(coordinator.invite(), tmp_path, DATA)
    assert [file.name for file in tmp_path.iterdir()] == ["keys"]
    assert (tmp_path / "keys" / "signing.pem").read_text() == "theirs"


@pytest.mark.parametrize("changed", ["site", "control", "fleet", "coordinator", "authority"])
def test_a_folder_of_another_site_is_left_alone(
    changed: str, joining: join.Joining, coordinator: Coordinator, tmp_path: Path
) -> None:
    other = Coordinator.new() if changed in ("coordinator", "authority") else coordinator
    invite = {
        "site": coordinator.invite(site="south"),
        "control": coordinator.invite(control="new.example.org:443"),
        "fleet": coordinator.invite(fleet="new.example.org:443"),
        "coordinator": coordinator.invite(coordinator=public_key(other.key)),
        "authority": coordinator.invite(authority=pem(other.authority)),
    }[changed]
    before = (tmp_path / "north" / "keys" / "asked.json").read_bytes()
    with pytest.raises(ConsiliaError, match="differ"):
        join.prepare(invite, tmp_path / "north", DATA)
    assert (tmp_path / "north" / "keys" / "asked.json").read_bytes() == before


def test_a_site_that_was_never_enrolled_joins_with_the_keys_it_has(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    from client import setup

    invite = coordinator.invite()
    (tmp_path / "ca.crt").write_text(invite.authority)
    identity = setup.create_unenrolled(
        tmp_path / "north",
        name="north",
        coordinator=invite.coordinator,
        address=invite.fleet,
        root_certificates=tmp_path / "ca.crt",
        manifest=Path("m.csv"),
        root=Path(),
    )
    file = tmp_path / "north" / "site.toml"
    with pytest.raises(ConsiliaError, match=r"add these two lines under \[link\]"):
        join.prepare(invite, tmp_path / "north", None)
    text = (
        file.read_text()
        .replace("# control =", "control =")
        .replace("# certificate =", "certificate =")
    )
    file.write_text(text.replace("coordinator.example.org:8443", invite.control))
    request = request_of(join.prepare(invite, tmp_path / "north", None)).request
    assert (request.signing, request.node) == (identity.signing, identity.node)


def test_a_lost_key_of_a_site_with_a_journal_is_not_made_anew(
    joining: join.Joining, coordinator: Coordinator, tmp_path: Path
) -> None:
    join.take(joining, coordinator.admit(request_of(joining)))
    joining.config.signing_key.unlink()
    with pytest.raises(DocumentError, match="restore the key"):
        join.prepare(coordinator.invite(), tmp_path / "north", None)


# --- being let in


def test_an_accepted_site_has_its_certificate_and_says_so_in_its_journal(
    joining: join.Joining, coordinator: Coordinator, tmp_path: Path
) -> None:
    assert join.take(joining, coordinator.admit(request_of(joining)))
    config = joining.config
    assert join.days_left(config) == 90
    found = certificate.read(tmp_path / "north" / "keys" / "control.pem")
    key = serialization.load_pem_private_key(
        (tmp_path / "north" / "keys" / "control.pem").read_bytes(), password=None
    )
    assert found.public_key() == key.public_key()
    entries = journal.parse((config.state_dir / journal.FILE).read_bytes())
    assert [line.entry.kind for line in entries] == ["opened", "joined"]
    assert entries[1].entry.key == public_key(coordinator.key)
    assert entries[1].entry.digest == certificate.fingerprint(found)
    assert join.prepare(joining.invite, tmp_path / "north", None).asked is None


def test_a_pending_request_changes_nothing(joining: join.Joining, coordinator: Coordinator) -> None:
    answer = coordinator.admit(request_of(joining), status="pending", certificate=None)
    assert not join.take(joining, answer)
    assert not (joining.config.state_dir / journal.FILE).exists()
    with pytest.raises(DocumentError, match="has not been let in"):
        join.days_left(joining.config)


def test_a_refusal_says_what_to_do(joining: join.Joining, coordinator: Coordinator) -> None:
    answer = coordinator.admit(request_of(joining), status="refused", certificate=None)
    with pytest.raises(ConsiliaError, match=r"new invite.*ledger"):
        join.take(joining, answer)


def wrong(kind: str, joining: join.Joining, coordinator: Coordinator) -> SignedAdmission:
    """Return an answer that must not be taken."""
    request = request_of(joining)
    csr = x509.load_pem_x509_csr(request.request.csr.encode())
    foreign = Coordinator.new()
    other = ec.generate_private_key(ec.SECP256R1())
    by = coordinator.authority_key
    certificates = {
        "of another authority": pem(certified(csr.public_key(), "north", by=foreign.authority_key)),
        "for another key": pem(certified(other.public_key(), "north", by=by)),
        "for another name": pem(certified(csr.public_key(), "south", by=by)),
        "expired": pem(certified(csr.public_key(), "north", by=by, days=-2, since=-9)),
        "not yet valid": pem(certified(csr.public_key(), "north", by=by, since=2)),
        "self-signed": pem(certified(other.public_key(), "north", by=other)),
        "garbage": "-----BEGIN CERTIFICATE-----\nAAAA\n",
    }
    if kind in certificates:
        return coordinator.admit(request, certificate=certificates[kind])
    if kind == "signed by another":
        return foreign.admit(request)
    if kind == "to another request":
        return coordinator.admit(request, request="0" * 64)
    if kind == "to another site":
        return coordinator.admit(request, site="south")
    signed = coordinator.admit(request, status="refused", certificate=None)
    changed = signed.admission.model_copy(update={"status": "accepted"})
    return signed.model_copy(update={"admission": changed})


@pytest.mark.parametrize(
    "kind",
    [
        "of another authority",
        "for another key",
        "for another name",
        "expired",
        "not yet valid",
        "self-signed",
        "garbage",
        "signed by another",
        "to another request",
        "to another site",
        "changed on its way",
    ],
)
def test_only_the_coordinators_certificate_for_our_key_and_name_is_taken(
    kind: str, joining: join.Joining, coordinator: Coordinator, tmp_path: Path
) -> None:
    with pytest.raises(SignatureError):
        join.take(joining, wrong(kind, joining, coordinator))
    assert not (tmp_path / "north" / "keys" / "control.pem").exists()
    assert join.take(joining, coordinator.admit(request_of(joining)))


# --- kills


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """End the process at the ``step``-th change to the disk; the count of changes comes back."""
    count = [0]

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if count[0] == step:
                raise Killed
            count[0] += 1
            return change(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("link", "fsync"):
            patch.setattr(os, name, counting(getattr(os, name)))
        for name in ("replace", "unlink", "mkdir"):
            patch.setattr(Path, name, counting(getattr(Path, name)))
        yield count


def run_to_the_end(invite: Invite, folder: Path, coordinator: Coordinator) -> join.Joining:
    joining = join.prepare(invite, folder, DATA)
    if joining.asked is not None:
        assert join.take(joining, admitted(joining.asked.request, coordinator))
    return join.prepare(invite, folder, None)


ANSWERS: dict[str, SignedAdmission] = {}


def admitted(request: SignedJoinRequest, coordinator: Coordinator) -> SignedAdmission:
    """Return what the coordinator answers: the same to the same request."""
    key = digest(request.request)
    if key not in ANSWERS:
        ANSWERS[key] = coordinator.admit(request)
    return ANSWERS[key]


def test_a_join_killed_at_any_instant_goes_on_when_run_again(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite = coordinator.invite()
    for step in range(200):
        folder = tmp_path / str(step)
        asked = None
        with killed_at(step, monkeypatch):
            try:
                run_to_the_end(invite, folder, coordinator)
                break
            except Killed:
                pass
        if (folder / "keys" / "asked.json").exists():
            asked = (folder / "keys" / "asked.json").read_bytes()
            again = join.prepare(invite, folder, DATA).asked
            assert again is not None
            assert canonical(again) == asked
        found = run_to_the_end(invite, folder, coordinator)
        assert found.asked is None
        assert found.config.policy.max_epsilon_per_study == 4.0
        held = certificate.read(folder / "keys" / "control.pem")
        key = (folder / "keys" / "control.pem").read_bytes()
        private = serialization.load_pem_private_key(key, password=None)
        assert private.public_key() == held.public_key()
        assert [kind for kind in kinds(found.config) if kind != "repaired"] == ["opened", "joined"]
        assert not (folder / "keys" / "asked.json").exists()
    assert 15 < step < 199


# --- renewal


@pytest.fixture
def enrolled(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> configs.SiteConfig:
    """Return a site that is in; its coordinator renews whatever is asked over the wire."""
    found = run_to_the_end(coordinator.invite(), tmp_path / "north", coordinator)

    @contextmanager
    def connected(config: configs.SiteConfig) -> Iterator[Link]:
        yield Link(None, config.name, config.coordinator, "")  # type: ignore[arg-type]

    def renewed(link: Link, request: SignedJoinRequest) -> SignedAdmission:
        return admitted(request, coordinator)

    monkeypatch.setattr(control, "connect", connected)
    monkeypatch.setattr(control, "renew", renewed)
    return found.config


def test_a_certificate_is_renewed_when_a_third_of_its_days_is_left(
    enrolled: configs.SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert certificate.RENEW_DAYS * 3 == 90
    assert not join.renew_if_due(enrolled)
    file = enrolled.link.certificate
    assert file is not None
    before = file.read_bytes()
    monkeypatch.setattr(certificate, "RENEW_DAYS", 91)
    assert join.renew_if_due(enrolled)
    private = serialization.load_pem_private_key(file.read_bytes(), password=None)
    assert certificate.read(file).public_key() == private.public_key()
    assert file.read_bytes() != before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert kinds(enrolled) == ["opened", "joined", "renewed"]


def test_a_renewal_killed_at_any_instant_leaves_a_pair_that_fits_and_goes_on(
    enrolled: configs.SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = enrolled.link.certificate
    assert file is not None
    monkeypatch.setattr(certificate, "RENEW_DAYS", 91)
    num_done = 0
    for step in range(100):
        with killed_at(step, monkeypatch):
            try:
                join.renew_if_due(enrolled)
                num_done += 1
                break
            except Killed:
                pass
        private = serialization.load_pem_private_key(file.read_bytes(), password=None)
        assert certificate.read(file).public_key() == private.public_key()
        with monkeypatch.context() as patch:
            patch.setattr(certificate, "RENEW_DAYS", 0)  # only what was begun goes on
            has_begun = (file.parent / "asked.json").exists()
            assert join.renew_if_due(enrolled) is has_begun
        assert not (file.parent / "asked.json").exists()
    assert num_done == 1
    assert step > 8
    assert set(kinds(enrolled)) <= {"opened", "joined", "renewed", "repaired"}
    assert kinds(enrolled)[-1] == "renewed"


def test_a_site_that_never_joined_has_nothing_to_renew(site_of: Any, tmp_path: Path) -> None:
    assert join.days_left(site_of()) is None
    with pytest.raises(ConsiliaError, match="join"):
        join.renew_if_due(site_of())


def test_a_renewal_out_does_not_disturb_who_joins_again(
    enrolled: configs.SiteConfig, coordinator: Coordinator, tmp_path: Path, monkeypatch: Any
) -> None:
    again = join.prepare(coordinator.invite(), tmp_path / "north", None)
    assert again.asked is not None
    monkeypatch.setattr(certificate, "RENEW_DAYS", 91)
    assert not join.renew_if_due(enrolled)
    assert join.take(again, coordinator.admit(again.asked.request))
    assert join.renew_if_due(enrolled)

"""Enrolment and the control plane over real sockets: who gets in, who does not, what they hear."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import StatusCode
from typer.testing import CliRunner

from client import certificate, control, join
from client.cli import app as site_app
from client.config import SiteConfig
from client.control import NotAdmittedError
from server import consortium, register
from server import control as doors
from server import office as offices
from server.cli import app as coordinator_app
from server.office import Office
from server.settings import Listen
from shared_models.contracts import (
    Admission,
    Bulletin,
    Health,
    Invite,
    ProbeAnswer,
    ProbeRequest,
    SignedAdmission,
    SignedJoinRequest,
    Visit,
)
from shared_models.control import CONTROL, ENROLMENT, MAX_JOIN_BYTES, MAX_VISIT_BYTES
from shared_models.errors import ConsiliaError
from shared_models.signing import canonical, digest, sign
from shared_models.words import words

NOW = datetime.now(UTC)
DATA = join.Data(Path("/data/manifest.csv"), Path("/data"))
SECRET = "MARKED-7731"
SENTENCES = {sentence for _, sentence in doors.REASONS.values()}


class House(NamedTuple):
    """An office that is served, and the folder that hospitals are made in."""

    office: Office
    folder: Path

    @property
    def control(self) -> str:
        return self.office.settings.control

    @property
    def enrolment(self) -> str:
        return self.office.settings.enrolment

    @property
    def content(self) -> bytes:
        return (self.office.folder / register.FILE).read_bytes()

    def invited(self, site: str, *, days: int = 14) -> Invite:
        return offices.invite(self.office, site, days=days).invite

    def asked(self, site: str) -> join.Joining:
        """Return a site that has asked, and waits for its words to be compared."""
        joining = join.prepare(self.invited(site), self.folder / site, DATA)
        assert not join.wait(joining, minutes=0)
        return joining

    def enrolled(self, site: str) -> SiteConfig:
        joining = self.asked(site)
        offices.accept(self.office, site, joining.words)
        assert join.wait(joining, minutes=0)
        return joining.config


def ports(number: int) -> list[int]:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [listener.getsockname()[1] for listener in held]


def office_at(folder: Path, *, host: str = "127.0.0.1") -> Office:
    fleet, control_, enrolment = ports(3)
    made = offices.create(
        folder,
        name="Lungs of the North",
        fleet=f"{host}:{fleet}",
        control=f"{host}:{control_}",
        enrolment=f"{host}:{enrolment}",
    )
    listen = Listen(
        fleet=f"127.0.0.1:{fleet}",
        control=f"127.0.0.1:{control_}",
        enrolment=f"127.0.0.1:{enrolment}",
    )
    return made._replace(settings=made.settings.model_copy(update={"listen": listen}))


def bulletin(site: str, told: Visit) -> Bulletin:
    return Bulletin(site=site, when=datetime.now(UTC))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    office = office_at(tmp_path / "office")
    with doors.serve(office, visit=bulletin, handshake_s=0.5):
        yield House(office, tmp_path)


def visit_of(site: str) -> Visit:
    health = Health(version="0.1.0", started_at=NOW, free_mb=1, has_gpu=False, certificate_days=80)
    return Visit(site=site, when=NOW, health=health)


def visits(config: SiteConfig) -> Bulletin:
    with control.connect(config) as link:
        return control.visit(link, visit_of(config.name), budget_s=10)


class Answer(NamedTuple):
    """What a call got: a message, or a status and its words."""

    code: StatusCode
    content: bytes = b""
    words: str = ""


def call(
    address: str,
    method: str,
    content: bytes,
    *,
    authority: bytes,
    pair: tuple[bytes | None, bytes | None] = (None, None),
    timeout_s: float | None = 10.0,
) -> Answer:
    """Call a method with any bytes and any certificate."""
    credentials = grpc.ssl_channel_credentials(authority, *pair)
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(address, credentials, options=options) as channel:
        try:
            return Answer(StatusCode.OK, channel.unary_unary(method)(content, timeout=timeout_s))
        except grpc.RpcError as error:
            return Answer(error.code(), words=error.details())


def authority_of(house: House) -> bytes:
    return (house.office.folder / "tls" / "ca.crt").read_bytes()


def pair_of(config: SiteConfig) -> tuple[bytes, bytes]:
    assert config.link.certificate is not None
    content = config.link.certificate.read_bytes()
    return content, content


def joins(house: House, content: bytes) -> Answer:
    return call(house.enrolment, f"/{ENROLMENT}/Join", content, authority=authority_of(house))


# --- the whole way


def command(app: Any, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@contextmanager
def process(module: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a command of ours beside the test; at exit it has ended."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    ) as started:
        try:
            yield started
        finally:
            started.terminate()


def line(started: subprocess.Popen[str], pattern: str) -> str:
    """Return the next line a process prints that matches."""
    assert started.stdout is not None
    for found in iter(started.stdout.readline, ""):
        if re.search(pattern, found):
            return found
    raise AssertionError(f"it ended before it printed {pattern}")


def test_the_whole_way_by_commands(tmp_path: Path) -> None:
    office, north = tmp_path / "office", tmp_path / "north"
    fleet, control_, enrolment = (f"127.0.0.1:{port}" for port in ports(3))
    made = command(
        coordinator_app,
        *("init", office, "--name", "Lungs", "--fleet", fleet),
        *("--control", control_, "--enrolment", enrolment),
    )
    assert made.exit_code == 0, made.output
    invite = tmp_path / "north.invite.json"
    assert (
        command(coordinator_app, "invite", "north", "--office", office, "--out", invite).exit_code
        == 0
    )
    asking = ("join", invite, "--folder", north, "--manifest", "m.csv", "--root", tmp_path)
    with process("server.cli", "serve", office) as serving:
        line(serving, "^the SuperLink: up")
        with process("client.cli", *asking, "--wait", "2") as joining:
            said = line(joining, r"^    \w{5}(-\w{5}){4}$").strip()
            until = time.monotonic() + 30
            while table(office)[0]["state"] != "pending" and time.monotonic() < until:
                pass
            assert table(office)[0]["words"] == said
            spoken = ("--words", said.upper())
            accepted = command(coordinator_app, "accept", "north", *spoken, "--office", office)
            assert accepted.exit_code == 0, accepted.output
            out, problems = joining.communicate(timeout=60)
        assert (joining.returncode, problems) == (0, "")
        assert "north is in: its certificate holds 89 days" in out
        told = [line for line in out.splitlines() if line.startswith(("north is in", "peers that"))]
        assert command(site_app, *asking).output.splitlines() == told
        config = join.configs.read(north / "site.toml")
        assert visits(config).site == "north"
        assert table(office)[0]["last_seen"] is not None
        assert command(coordinator_app, "revoke", "north", "--office", office).exit_code == 0
        with pytest.raises(NotAdmittedError, match="revoked"):
            visits(config)
        assert table(office)[0]["state"] == "revoked"
        serving.send_signal(signal.SIGTERM)
        _, log = serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert "Traceback" not in log


def table(office: Path) -> list[dict[str, Any]]:
    found = command(coordinator_app, "sites", "--office", office, "--json")
    assert found.exit_code == 0
    return list(json.loads(found.output)["sites"])


def test_a_site_that_is_not_let_in_yet_leaves_with_1_and_its_words(house: House) -> None:
    signed = offices.invite(house.office, "north")
    (house.folder / "invite").write_bytes(canonical(signed))
    asking = ("join", house.folder / "invite", "--folder", house.folder / "north", "--wait", "0")
    found = [
        command(site_app, *asking, "--manifest", "m.csv", "--root", "."),
        command(site_app, *asking),
    ]
    assert [one.exit_code for one in found] == [1, 1]
    spoken = offices.table(house.office)[0].words
    assert spoken is not None
    assert all(f"\n    {spoken}\n" in one.output for one in found)


# --- who stands in between, and who was not invited


def test_who_stands_in_between_cannot_show_the_sites_words(house: House) -> None:
    """A mails the site an invite of their own, and asks the coordinator in the site's name."""
    mine = offices.create(
        house.folder / "between",
        name=house.office.settings.name,
        fleet=house.office.settings.fleet,
        control=house.office.settings.control,
        enrolment=house.office.settings.enrolment,
    )
    genuine = house.invited("north")
    forged = offices.invite(mine, "north").invite
    site = join.prepare(forged, house.folder / "north", DATA)
    own = join.prepare(genuine, house.folder / "attacker", DATA)
    assert not join.wait(own, minutes=0)
    before = house.content
    with pytest.raises(ConsiliaError, match="nobody is let in"):
        offices.accept(house.office, "north", site.words)
    assert house.content == before
    with pytest.raises(NotAdmittedError, match="not certified by the consortium's own authority"):
        join.wait(site, minutes=0)


def request_of(joining: join.Joining) -> SignedJoinRequest:
    assert joining.asked is not None
    return joining.asked.request


@pytest.mark.parametrize("kind", ["uninvited", "expired", "second", "another site"])
def test_who_was_not_invited_is_refused_and_nothing_is_written(kind: str, house: House) -> None:
    invite = house.invited("north")
    if kind == "second":
        join.wait(join.prepare(invite, house.folder / "first", DATA), minutes=0)
    joining = join.prepare(invite, house.folder / "north", DATA)
    if kind == "uninvited":
        joining = join.prepare(
            invite.model_copy(update={"nonce": "0" * 64}), house.folder / "other", DATA
        )
    if kind == "another site":
        house.invited("south")
        stranger = invite.model_copy(update={"site": "south"})
        joining = join.prepare(stranger, house.folder / "other", DATA)
    if kind == "expired":
        offices.invite(house.office, "north", days=-1)
        old = offices.sites(house.office)["north"].invite.invite
        request = request_of(joining).request.model_copy(update={"invite": digest(old)})
        key = join.load_key(joining.config.signing_key)
        signed = SignedJoinRequest(request=request, signature=sign(request, key=key))
        assert joining.asked is not None
        asked = joining.asked.model_copy(update={"request": signed})
        joining = joining._replace(asked=asked)
    before = house.content
    with pytest.raises(ConsiliaError, match="does not let this site in by this request"):
        join.wait(joining, minutes=0)
    assert house.content == before


def test_a_replayed_request_gets_the_same_certificate_and_writes_nothing(house: House) -> None:
    joining = house.asked("north")
    offices.accept(house.office, "north", joining.words)
    assert join.wait(joining, minutes=0)
    before = house.content
    found = [joins(house, canonical(request_of(joining))) for _ in range(2)]
    admissions = [SignedAdmission.model_validate_json(one.content).admission for one in found]
    assert {one.certificate for one in admissions} == {
        certificate.read(house.folder / "north" / "keys" / "control.pem")
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    }
    assert house.content == before


GARBAGE = {
    "nothing": b"",
    "no JSON": b"\xff\xfe\x00" * 100,
    "another contract": canonical(
        Admission(site="north", request="0" * 64, status="pending", when=NOW)
    ),
    "a secret": json.dumps({"request": SECRET, "signature": SECRET}).encode(),
    "deep": b"[" * 60_000,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_refused_in_words_from_a_closed_list(kind: str, house: House) -> None:
    config, before = house.enrolled("north"), house.content
    found = [joins(house, GARBAGE[kind])]
    for method in ("Visit", "Renew"):
        found.append(
            call(
                house.control,
                f"/{CONTROL}/{method}",
                GARBAGE[kind],
                authority=authority_of(house),
                pair=pair_of(config),
            )
        )
    assert {one.code for one in found} == {StatusCode.INVALID_ARGUMENT}
    assert {one.words for one in found} == {doors.REASONS["malformed"][1]}
    assert house.content == before


def test_a_request_with_a_broken_signature_is_refused(house: House) -> None:
    request = request_of(join.prepare(house.invited("north"), house.folder / "north", DATA))
    other = request.request.model_copy(update={"when": NOW + timedelta(days=1)})
    before = house.content
    found = joins(house, canonical(request.model_copy(update={"request": other})))
    assert (found.code, found.words) == doors.REASONS["malformed"]
    assert house.content == before


@pytest.mark.parametrize(
    ("method", "num_bytes"), [("Join", MAX_JOIN_BYTES + 1), ("Visit", MAX_VISIT_BYTES + 1)]
)
def test_a_message_over_the_limit_is_not_read(method: str, num_bytes: int, house: House) -> None:
    config, content = house.enrolled("north"), b" " * num_bytes
    if method == "Join":
        found = joins(house, content)
    else:
        pair, authority = pair_of(config), authority_of(house)
        found = call(house.control, f"/{CONTROL}/Visit", content, authority=authority, pair=pair)
    assert found.code == StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in found.words


def test_newcomers_who_ask_too_often_wait_and_no_site_notices(house: House) -> None:
    config = house.enrolled("north")
    found = [joins(house, b"") for _ in range(doors.NEWCOMER[0] + 10)]
    assert found[-1].words == doors.REASONS["often"][1]
    assert visits(config).site == "north"


@pytest.mark.parametrize("timeout_s", [None, 7 * 24 * 3600.0])
def test_a_call_needs_a_deadline_that_is_near(timeout_s: float | None, house: House) -> None:
    config, content = house.enrolled("north"), canonical(visit_of("north"))
    method = f"/{CONTROL}/Visit"
    found = call(
        house.control,
        method,
        content,
        authority=authority_of(house),
        pair=pair_of(config),
        timeout_s=timeout_s,
    )
    assert (found.code, found.words) == doors.REASONS["deadline"]


@pytest.mark.parametrize(
    "method", ["grpc.reflection.v1.ServerReflection/ServerReflectionInfo", f"{CONTROL}/Other"]
)
def test_nothing_else_is_answered(method: str, house: House) -> None:
    config = house.enrolled("north")
    authority = authority_of(house)
    found = call(house.control, f"/{method}", b"", authority=authority, pair=pair_of(config))
    assert found.code == StatusCode.UNIMPLEMENTED
    assert joins_elsewhere(house, "Visit").code == StatusCode.UNIMPLEMENTED


def joins_elsewhere(house: House, method: str) -> Answer:
    """Ask the enrolment port, which knows no certificates, for what sites alone may."""
    authority = authority_of(house)
    return call(house.enrolment, f"/{CONTROL}/{method}", b"", authority=authority)


# --- certificates


def self_signed(name: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    found = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=9))
        .sign(key, hashes.SHA256())
    )
    form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private = key.private_bytes(serialization.Encoding.PEM, *form)
    return private, found.public_bytes(serialization.Encoding.PEM)


def bad_pair(
    kind: str, house: House, monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes | None, bytes | None]:
    """Return a key and a certificate that must not be let in."""
    if kind == "none":
        return None, None
    if kind == "self-signed":
        return self_signed("north")
    if kind == "of another authority":
        other = House(office_at(house.folder / "other"), house.folder / "there")
        with doors.serve(other.office, visit=bulletin):
            return pair_of(other.enrolled("north"))
    if kind == "the server's":
        tls = house.office.folder / "tls"
        return (tls / "server.key").read_bytes(), (tls / "server.crt").read_bytes()
    if kind == "expired":
        issue = consortium.issue

        def past(folder: Path, csr: str, *, site: str, now: datetime) -> x509.Certificate:
            return issue(folder, csr, site=site, now=now - timedelta(days=30), days=29)

        with monkeypatch.context() as patch:
            patch.setattr(consortium, "issue", past)
            joining = house.asked("west")
            offices.accept(house.office, "west", joining.words)
        (issued,) = offices.sites(house.office)["west"].issued
        assert joining.asked is not None
        return joining.asked.key.encode(), issued.certificate.encode()
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind", ["none", "self-signed", "of another authority", "the server's", "expired"]
)
def test_without_a_certificate_that_holds_nobody_is_heard(
    kind: str, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = house.enrolled("north")
    pair = bad_pair(kind, house, monkeypatch)
    content, authority = canonical(visit_of("north")), authority_of(house)
    for method in ("Visit", "Renew", "Probe"):
        found = call(house.control, f"/{CONTROL}/{method}", content, authority=authority, pair=pair)
        assert found.code == StatusCode.UNAVAILABLE
    assert visits(config).site == "north"


def test_a_certificate_that_the_register_does_not_know_is_refused(house: House) -> None:
    """Whoever has the authority's key and no more, gets in nowhere."""
    config = house.enrolled("north")
    joining = join.prepare(house.invited("west"), house.folder / "west", DATA)
    assert joining.asked is not None
    found = consortium.issue(
        house.office.folder / "tls", request_of(joining).request.csr, site="north", now=NOW
    )
    pair = joining.asked.key.encode(), found.public_bytes(serialization.Encoding.PEM)
    answer = call(
        house.control,
        f"/{CONTROL}/Visit",
        canonical(visit_of("north")),
        authority=authority_of(house),
        pair=pair,
    )
    assert (answer.code, answer.words) == doors.REASONS["denied"]
    assert visits(config).site == "north"


def test_a_revoked_site_is_refused_at_its_next_call_and_no_other_notices(house: House) -> None:
    north, south = house.enrolled("north"), house.enrolled("south")
    with control.connect(north) as link, control.connect(south) as other:
        assert control.visit(link, visit_of("north")).site == "north"
        offices.revoke(house.office, "north")
        for ask in (
            lambda: control.visit(link, visit_of("north")),
            lambda: control.probe(link),
            lambda: join.renew_if_due(north),
        ):
            before = certificate.RENEW_DAYS
            certificate.RENEW_DAYS = 100
            try:
                with pytest.raises(NotAdmittedError, match="revoked"):
                    ask()
            finally:
                certificate.RENEW_DAYS = before
        assert control.visit(other, visit_of("south")).site == "south"


def test_a_site_speaks_for_itself_only(house: House) -> None:
    north = house.enrolled("north")
    south = request_of(join.prepare(house.invited("south"), house.folder / "south", DATA))
    before = house.content
    for method, content in (("Visit", visit_of("south")), ("Renew", south)):
        found = call(
            house.control,
            f"/{CONTROL}/{method}",
            canonical(content),
            authority=authority_of(house),
            pair=pair_of(north),
        )
        assert (found.code, found.words) == doors.REASONS["other"]
    assert house.content == before


def test_a_server_of_another_authority_hears_nothing_of_the_site(house: House) -> None:
    config = house.enrolled("north")
    heard: list[str] = []
    other = office_at(house.folder / "other")

    def listening(site: str, told: Visit) -> Bulletin:
        heard.append(site)
        return bulletin(site, told)

    with doors.serve(other, visit=listening):
        link = config.link.model_copy(update={"control": other.settings.control})
        with pytest.raises(NotAdmittedError, match="exempt this address from inspection"):
            visits(config.model_copy(update={"link": link}))
    assert heard == []


def test_a_certificate_is_renewed_over_the_wire_and_both_hold(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = house.enrolled("north")
    old = pair_of(config)
    assert not join.renew_if_due(config)
    monkeypatch.setattr(certificate, "RENEW_DAYS", 91)
    assert join.renew_if_due(config)
    assert pair_of(config) != old
    content, authority = canonical(visit_of("north")), authority_of(house)
    for pair in (old, pair_of(config)):
        found = call(house.control, f"/{CONTROL}/Visit", content, authority=authority, pair=pair)
        assert found.code == StatusCode.OK
    offices.revoke(house.office, "north")
    for pair in (old, pair_of(config)):
        found = call(house.control, f"/{CONTROL}/Visit", content, authority=authority, pair=pair)
        assert (found.code, found.words) == doors.REASONS["denied"]


def test_the_servers_show_a_renewed_certificate_without_a_restart(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = house.enrolled("north")
    file = house.office.folder / "tls" / "server.crt"
    before = file.read_bytes()
    assert visits(config).site == "north"
    monkeypatch.setattr(doors, "CERTIFY_EVERY_S", 0.0)
    monkeypatch.setattr(consortium, "RENEW_DAYS", consortium.SERVER_DAYS)
    assert visits(config).site == "north"
    assert file.read_bytes() != before
    shown = shown_by(house.enrolment, authority_of(house))
    assert shown not in before
    assert shown


def shown_by(address: str, authority: bytes) -> bytes:
    """Return the certificate that a server shows, as PEM."""
    import ssl

    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cadata=authority.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=host) as tls,
    ):
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


# --- peers that dawdle, handlers that fail


def test_peers_that_say_nothing_are_hung_up_on_and_hold_nobody_up(house: House) -> None:
    config = house.enrolled("north")
    with ExitStack() as stack:
        addresses = [house.control, house.enrolment] * 10
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", int(a.split(":")[1]))))
            for a in addresses
        ]
        assert visits(config).site == "north"
        assert not join.wait(
            join.prepare(house.invited("south"), house.folder / "south", DATA), minutes=0
        )
        for caller in held:
            caller.settimeout(10)
            assert caller.recv(1) == b""


def test_newcomers_that_never_finish_hold_no_site_up(house: House) -> None:
    config = house.enrolled("north")
    released = threading.Event()

    def never() -> Iterator[bytes]:
        released.wait(60)
        yield from ()

    credentials = grpc.ssl_channel_credentials(authority_of(house))
    with ExitStack() as stack:
        for number in range(doors.NUM_THREADS + 4):
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.channel_id", number)]
            channel = stack.enter_context(
                grpc.secure_channel(house.enrolment, credentials, options=options)
            )
            pending = channel.stream_unary(f"/{ENROLMENT}/Join").future(never(), timeout=60)
            stack.callback(pending.cancel)
        assert visits(config).site == "north"
        released.set()


def test_what_fails_inside_is_not_told_outside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    office = office_at(tmp_path / "office")

    def broken(site: str, told: Visit) -> Bulletin:
        raise RuntimeError(SECRET)

    with doors.serve(office, visit=broken):
        config = House(office, tmp_path).enrolled("north")
        found = call(
            office.settings.control,
            f"/{CONTROL}/Visit",
            canonical(visit_of("north")),
            authority=(office.folder / "tls" / "ca.crt").read_bytes(),
            pair=pair_of(config),
        )
        assert (found.code, found.words) == doors.REASONS["failed"]
    assert SECRET not in caplog.text
    assert "RuntimeError" in caplog.text


def test_a_port_that_is_taken_is_named(house: House) -> None:
    from shared_models.errors import MachineError

    with (
        pytest.raises(MachineError, match=f"cannot listen on {house.control}"),
        doors.serve(house.office, visit=bulletin),
    ):
        pass


# --- probes


def test_a_probe_measures_each_way_and_the_clock(house: House) -> None:
    config = house.enrolled("north")
    with control.connect(config) as link:
        found = control.probe(link, up_bytes=3 * 2**20 + 1, down_bytes=2 * 2**20 + 1)
    assert 0 < found.round_trip_s < 5
    assert abs(found.clock_skew_s) <= found.round_trip_s
    assert 0 < found.seconds_up < 20
    assert 0 < found.seconds_down < 20


def test_a_site_is_probed_once_at_a_time_and_visits_meanwhile(house: House) -> None:
    config = house.enrolled("north")
    released = threading.Event()

    def slow() -> Iterator[bytes]:
        yield canonical(ProbeRequest(up_bytes=1))
        released.wait(30)

    with control.connect(config) as link:
        stream = link.channel.stream_stream(f"/{CONTROL}/Probe")(slow(), timeout=30)
        assert ProbeAnswer.model_validate_json(next(stream)).received_bytes == 0
        with pytest.raises(control.UnreachableError, match="too often"):
            control.probe(link, budget_s=0.2)
        assert control.visit(link, visit_of("north")).site == "north"
        released.set()
        stream.cancel()


@pytest.mark.parametrize(
    "messages",
    [
        [b"garbage"],
        [],
        [canonical(ProbeRequest(up_bytes=4)), b"12345"],
        [canonical(ProbeRequest(up_bytes=4)), b""],
        [canonical(ProbeRequest(up_bytes=2**22)), bytes(2**20 + 1)],
        [b'{"schema_version":1,"up_bytes":0,"down_bytes":1073741825}'],
    ],
)
def test_a_probe_that_is_none_is_refused(messages: list[bytes], house: House) -> None:
    config = house.enrolled("north")
    with control.connect(config) as link:
        stream = link.channel.stream_stream(f"/{CONTROL}/Probe")(iter(messages), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert (caught.value.code(), caught.value.details()) == doors.REASONS["malformed"]
        assert control.probe(link).round_trip_s > 0


# --- a proxy


@contextmanager
def proxy(targets: dict[str, int]) -> Iterator[tuple[str, list[str]]]:
    """Run an HTTP proxy that knows CONNECT and these names; return where, and what it heard."""
    heard: list[str] = []

    def pump(one: socket.socket, other: socket.socket) -> None:
        with one, other:
            while ready := select.select([one, other], [], [], 30)[0]:
                for source in ready:
                    content = source.recv(65536)
                    if not content:
                        return
                    (other if source is one else one).sendall(content)

    def answer(listener: socket.socket) -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += caller.recv(4096)
            target = asked.split()[1].decode()
            heard.append(f"{asked.split()[0].decode()} {target}")
            there = socket.create_connection(("127.0.0.1", targets[target]))
            caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            threading.Thread(target=pump, args=(caller, there), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_both_ports_live_on_443_behind_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy, not the hospital, knows the names; it passes TLS through unopened."""
    office = offices.create(
        tmp_path / "office",
        name="Lungs",
        fleet="fleet.consilia.test:443",
        control="control.consilia.test:443",
        enrolment="join.consilia.test:443",
    )
    listen = Listen(**dict.fromkeys(("fleet", "control", "enrolment"), "127.0.0.1:0"))
    office = office._replace(settings=office.settings.model_copy(update={"listen": listen}))
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with doors.serve(office, visit=bulletin) as found:
        names = {
            "control.consilia.test:443": found.control,
            "join.consilia.test:443": found.enrolment,
        }
        with proxy(names) as (address, heard):
            monkeypatch.setenv("https_proxy", address)
            config = House(office, tmp_path).enrolled("north")
            assert visits(config).site == "north"
    assert set(heard) == {"CONNECT control.consilia.test:443", "CONNECT join.consilia.test:443"}


# --- all that was said


def test_every_reason_is_in_words_of_ours() -> None:
    assert len(SENTENCES) == len(doors.REASONS)
    assert all(sentence == sentence.strip() and len(sentence) < 80 for sentence in SENTENCES)


def test_words_at_the_site_and_at_the_coordinator_are_the_same(house: House) -> None:
    joining = house.asked("north")
    assert [row.words for row in offices.table(house.office)] == [joining.words]
    assert joining.words == words(digest(request_of(joining).request))

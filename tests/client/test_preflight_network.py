"""The way to a coordinator, tried against real listeners: each trouble has its owner and cure."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client import agent
from client.control import Probe
from client.preflight import Case, Finding, line, network
from client.preflight.base import MIB
from client.preflight.dry import Dry
from shared_models.errors import MachineError, SignatureError

PROXIES = [f"{name}_proxy" for name in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Authority:
    """A certificate authority that issues what a test asks for."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / f"{len(list(folder.iterdir()))}-ca.crt"
        self.certificate = self._signed(self.key.public_key(), name, is_authority=True)
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def pair(self, *, host: str = "localhost", days: tuple[int, int] = (-1, 90)) -> Path:
        """Return a file with a key and its certificate for ``host``, valid from to, in days."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(host)])
        found = self._signed(key.public_key(), host, days=days, names=names)
        file = self.folder / f"{len(list(self.folder.iterdir()))}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + found.public_bytes(serialization.Encoding.PEM)
        )
        return file

    def _signed(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        *,
        days: tuple[int, int] = (-1, 3650),
        is_authority: bool = False,
        names: x509.SubjectAlternativeName | None = None,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        of, by = (
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])
            for text in (name, self.name)
        )
        draft = (
            x509.CertificateBuilder()
            .subject_name(of)
            .issuer_name(by)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if names is not None:
            draft = draft.add_extension(names, critical=False)
        return draft.sign(self.key, hashes.SHA256())


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Listen on a port of this machine; ``serve`` gets each connection, until the test ends."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def accept() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=given, args=(raw,), daemon=True).start()

        def given(raw: socket.socket) -> None:
            try:
                with raw:
                    serve(raw)
            except OSError:
                pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def answering(
    pair: Path, status: int, *, date: datetime | None = None, body: bytes = b""
) -> Callable[[socket.socket], None]:
    """Return what answers every request over TLS with the same status and date."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)

    def serve(raw: socket.socket) -> None:
        with context.wrap_socket(raw, server_side=True) as stream, stream.makefile("rb") as lines:
            while head := [*takewhile(lambda one: one not in (b"\r\n", b""), lines)]:
                fields = dict(one.lower().split(b": ", 1) for one in head[1:])
                lines.read(int(fields.get(b"content-length", b"0")))
                when = format_datetime(date or datetime.now(UTC), usegmt=True)
                answer = (
                    f"HTTP/1.1 {status} x\r\nDate: {when}\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                stream.sendall(answer.encode() + body)

    return serve


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    folder = tmp_path / "tls"
    folder.mkdir()
    return Authority(folder, "Consilia consortium")


@pytest.fixture
def case_of(site_of, authority: Authority, tmp_path: Path) -> Callable[..., Case]:
    """Return a case of a site whose coordinator is at ``address``."""
    node = tmp_path / "node"
    agent.create_node_key(node)

    def make(address: str, **given: Any) -> Case:
        link = {
            "link.address": address,
            "link.root_certificates": authority.file,
            "link.node_key": node,
        }
        return Case(site_of(link), **given)

    return make


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def closed_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


# --- name and port


def test_a_name_nobody_knows_is_the_networks(case_of) -> None:
    found = only(network.name(case_of("coordinator.invalid:443")))
    assert (found.ok, found.owner) == (False, "network")
    assert found.said == "coordinator.invalid is not known to this machine's DNS"
    assert "link.address" in found.cure
    after = only(network.port(case_of("coordinator.invalid:443")))
    assert (after.ok, after.said) == (None, "not tried without the name")


def test_a_name_that_is_known_is_told_with_its_addresses(case_of) -> None:
    found = only(network.name(case_of("localhost:443")))
    assert found.ok
    assert "127.0.0.1" in found.said or "::1" in found.said


def test_a_closed_port_is_the_servers(case_of) -> None:
    case = case_of(f"127.0.0.1:{closed_port()}")
    found = only(network.port(case))
    assert (found.ok, found.owner) == (False, "server")
    assert "refuses connections" in found.said
    assert "whether the coordinator is running" in found.cure
    assert only(network.tls(case)).said == "not tried without a connection"
    assert [one.said for one in network.clock_and_superlink(case)] == ["not tried without TLS"] * 2


def test_a_firewall_that_drops_what_is_sent_is_the_networks(
    case_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "CONNECT_S", 0.2)
    with closing(socket.socket()) as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        with closing(socket.create_connection(address)), closing(socket.socket()) as second:
            second.setblocking(False)
            second.connect_ex(address)  # the queue of a listener that accepts nobody is full
            found = only(network.port(case_of(f"127.0.0.1:{address[1]}")))
    assert (found.ok, found.owner) == (False, "network")
    assert "does not answer within 0.2 s" in found.said
    assert "firewall" in found.cure
    assert "https_proxy" in found.cure


# --- TLS


def tls_of(case_of, authority: Authority, pair: Path) -> Finding:
    with listening(answering(pair, 200)) as port:
        return only(network.tls(case_of(f"localhost:{port}")))


def test_the_consortiums_own_certificate_is_trusted(case_of, authority: Authority) -> None:
    found = tls_of(case_of, authority, authority.pair())
    assert found.ok
    assert found.said.startswith("TLSv1.")
    assert "by the consortium's authority" in found.said
    assert found.figures["days_left"] == 89


def test_a_certificate_that_ends_soon_is_worth_a_look(case_of, authority: Authority) -> None:
    found = tls_of(case_of, authority, authority.pair(days=(-1, 5)))
    assert (found.ok, found.owner) == (None, "server")


def test_interception_is_named_with_its_issuer(case_of, authority: Authority) -> None:
    other = Authority(authority.folder, "Inspecting Gateway CA")
    found = tls_of(case_of, authority, other.pair())
    assert (found.ok, found.owner) == (False, "network")
    assert found.said == (
        "interception: the certificate shown is issued by Inspecting Gateway CA, not by the "
        "consortium's Consilia consortium"
    )
    assert "exempted from TLS inspection" in found.cure


def test_an_authority_that_only_has_the_name_is_not_taken_for_it(
    case_of, authority: Authority
) -> None:
    found = tls_of(case_of, authority, Authority(authority.folder, authority.name).pair())
    assert (found.ok, found.owner) == (False, "server")
    assert "another of that name signed it" in found.said
    assert "fingerprint" in found.cure


@pytest.mark.parametrize("days", [(-20, -10), (10, 20)])
def test_a_certificate_out_of_date_is_the_servers_or_this_clocks(
    days: tuple[int, int], case_of, authority: Authority
) -> None:
    found = tls_of(case_of, authority, authority.pair(days=days))
    assert (found.ok, found.owner) == (False, "server")
    assert "is valid from" in found.said
    assert "this machine's date" in found.cure


def test_a_certificate_for_another_name_is_the_servers(case_of, authority: Authority) -> None:
    found = tls_of(case_of, authority, authority.pair(host="other.example.org"))
    assert (found.ok, found.owner) == (False, "server")
    assert found.said == "the coordinator's certificate is not for localhost"


def test_what_speaks_no_tls_is_the_servers(case_of) -> None:
    with listening(lambda raw: raw.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        found = only(network.tls(case_of(f"localhost:{port}")))
    assert (found.ok, found.owner) == (False, "server")
    assert "does not speak TLS" in found.said


def test_a_connection_cut_when_tls_begins_is_the_networks(case_of) -> None:
    def cut(raw: socket.socket) -> None:
        raw.recv(1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with listening(cut) as port:
        found = only(network.tls(case_of(f"localhost:{port}")))
    assert (found.ok, found.owner) == (False, "network")
    assert "dropped when TLS begins" in found.said


# --- clock and SuperLink


def knocked(case_of, authority: Authority, status: int, **given: Any) -> list[Finding]:
    with listening(answering(authority.pair(), status, **given)) as port:
        return list(network.clock_and_superlink(case_of(f"localhost:{port}")))


@pytest.mark.parametrize(
    ("ahead_s", "ok", "words"),
    [
        (0, True, "the coordinator's"),
        (-4, None, "behind"),
        (60, False, "over 5 s ahead or 305 s behind, nobody is let in"),
        (-60, None, "behind"),
        (-400, False, "nobody is let in"),
    ],
)
def test_the_clock_is_compared_with_the_time_the_coordinator_states(
    ahead_s: int, ok: bool | None, words: str, case_of, authority: Authority
) -> None:
    date = datetime.now(UTC) - timedelta(seconds=ahead_s)
    clock, _ = knocked(case_of, authority, 412, date=date)
    assert (clock.what, clock.ok, clock.owner) == ("clock", ok, "this machine")
    assert words in clock.said
    assert "chrony" in clock.cure
    assert clock.figures["skew_s"] == pytest.approx(-ahead_s, abs=3)


def test_the_limits_of_the_clock_are_flowers() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert network.MOST_AHEAD_S == SYSTEM_TIME_TOLERANCE
    assert network.MOST_BEHIND_S == TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


@pytest.mark.parametrize(
    ("status", "words", "cure"),
    [
        (412, "not admitted yet", "consilia-site join"),
        (401, "signature is refused", "the clocks agree"),
        (404, "no SuperLink", "link.address"),
        (502, "a gateway answers", "running"),
        (418, "something else", "link.address"),
    ],
)
def test_each_answer_of_the_superlink_has_its_cure(
    status: int, words: str, cure: str, case_of, authority: Authority
) -> None:
    _, found = knocked(case_of, authority, status)
    assert (found.what, found.ok, found.owner) == ("SuperLink", False, "server")
    assert words in found.said
    assert cure in found.cure


def test_a_400_of_something_else_is_not_taken_for_the_superlinks(
    case_of, authority: Authority
) -> None:
    _, found = knocked(case_of, authority, 400, body=b"Bad Request")
    assert found.ok is False


def test_a_page_that_greets_everybody_is_no_superlink(case_of, authority: Authority) -> None:
    _, found = knocked(case_of, authority, 200, body=b"<html>Welcome to our guest network")
    assert found.ok is False
    assert "Welcome" not in str(found)


# --- proxies


def httpx_proxies(url: str) -> bool:
    """Ask httpx itself whether it would use a proxy for ``url``."""
    with httpx.Client(verify=False) as client:
        return client._transport_for_url(httpx.URL(url)) is not client._transport


@pytest.mark.parametrize("port", [443, 8443])
@pytest.mark.parametrize("host", ["fl.example.org", "example.org", "myexample.org", "10.1.2.3"])
@pytest.mark.parametrize(
    "no_proxy",
    [
        *("", "*", "example.org", ".example.org", "*.example.org", "EXAMPLE.org", "fl.example.org"),
        *("10.1.2.3", "10.0.0.0/8", "10.1.2.4", "other.org, example.org", "example.org:443"),
        *("example.org:8443", "https://fl.example.org", "http://fl.example.org", "org"),
    ],
)
def test_the_proxy_is_the_one_httpx_uses(
    no_proxy: str, host: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example.com:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    found = network.proxy_for(network.host_of(f"{host}:{port}"), network.getproxies_environment())
    assert (found is not None) == httpx_proxies(f"https://{host}:{port}")


@pytest.mark.parametrize(
    ("environment", "ok", "said"),
    [
        ({}, True, "none; direct"),
        ({"http_proxy": "http://proxy:3128"}, True, "none; direct"),
        ({"https_proxy": "http://u:s3cret@proxy:3128"}, True, "through proxy:3128 (https_proxy)"),
        ({"ALL_PROXY": "proxy:3128"}, True, "through proxy:3128 (https_proxy)"),
        ({"https_proxy": "socks5://proxy:1080"}, False, "a kind the agent does not speak"),
        (
            {"https_proxy": "http://proxy:3128", "no_proxy": "fl.example.org"},
            True,
            "NO_PROXY exempts the coordinator; direct",
        ),
        (
            {"https_proxy": "http://proxy:3128", "no_proxy": "*.example.org, 10.0.0.0/8"},
            None,
            "2 entries of NO_PROXY with * or / have no effect",
        ),
    ],
)
def test_the_way_is_told_without_the_proxys_password(
    environment: dict[str, str],
    ok: bool | None,
    said: str,
    case_of,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = only(network.proxy(case_of("fl.example.org:443")))
    assert (found.ok, found.owner) == (ok, "network")
    assert said in found.said
    assert "s3cret" not in str(found)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "asks for a password (answer 407)"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "forbids the connection"),
        (b"HTTP/1.1 503 Unavailable\r\n\r\n", "does not open a way (answer 503)"),
        (b"\x00nonsense", "does not open a way"),
    ],
)
def test_a_proxy_that_opens_no_way_is_the_networks(
    answer: bytes, words: str, case_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(lambda raw: (raw.recv(4096), raw.sendall(answer))[1]) as port:
        monkeypatch.setenv("https_proxy", f"http://u:s3cret@127.0.0.1:{port}")
        found = only(network.port(case_of("fl.example.org:443")))
    assert (found.ok, found.owner) == (False, "network")
    assert words in found.said
    assert "s3cret" not in str(found)


def test_a_proxy_that_is_not_there_is_the_networks(
    case_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port()}")
    found = only(network.port(case_of("fl.example.org:443")))
    assert (found.ok, found.owner) == (False, "network")
    assert found.said == "the proxy cannot be reached"


def test_tls_is_tried_through_the_proxy_with_its_password(
    case_of, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[bytes] = []

    def tunnel(raw: socket.socket) -> None:
        heads.append(raw.recv(4096))
        raw.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        answering(authority.pair(host="fl.example.org"), 200)(raw)

    with listening(tunnel) as port:
        monkeypatch.setenv("https_proxy", f"http://u:s%40@127.0.0.1:{port}")
        found = only(network.tls(case_of("fl.example.org:443")))
    assert found.ok
    assert heads[0].startswith(b"CONNECT fl.example.org:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic dTpzQA==\r\n" in heads[0]  # u:s@


# --- the control plane


def lines(case: Case) -> list[Finding]:
    return [*line.control_plane(case), *line.time_per_round(case)]


def measured(up: float, down: float) -> tuple[Callable[[int, int], Probe], list[tuple[int, int]]]:
    """Return a line of so many bytes a second, and what was sent over it."""
    sent: list[tuple[int, int]] = []

    def measure(up_bytes: int, down_bytes: int) -> Probe:
        sent.append((up_bytes, down_bytes))
        return Probe(up_bytes / up, down_bytes / down, 0.5, 0.02)

    return measure, sent


def dry(**given: Any) -> Dry:
    fields = {"step_s": 0.5, "weights_bytes": 10 * MIB, "update_bytes": 20 * MIB} | given
    return Dry(**fields)


def test_without_a_control_plane_nothing_is_measured_and_that_is_said(case_of) -> None:
    found = only(line.control_plane(case_of("localhost:1")))
    assert (found.ok, found.owner) == (None, "settings")
    assert "consilia-site join" in found.cure


def test_the_bandwidth_is_measured_with_what_the_model_has(case_of) -> None:
    measure, sent = measured(up=100 * MIB, down=1 * MIB)
    case = case_of("localhost:1", measure=measure)
    case.dry = dry(update_bytes=3 * MIB)
    found = {one.what: one for one in lines(case)}
    assert sent[1] == (3 * MIB, 3 * MIB)
    assert found["bandwidth"].said == ("838.9 Mbit/s up, 8.4 Mbit/s down; an update is 3.0 MB")
    assert found["clock"].ok
    assert case.skew_s == 0.5


def test_on_a_slow_line_measuring_takes_seconds_whatever_the_model(case_of) -> None:
    measure, sent = measured(up=MIB, down=2 * MIB)
    case = case_of("localhost:1", measure=measure)
    case.dry = dry(update_bytes=900 * MIB)
    list(line.control_plane(case))
    assert sent[1] == (5 * MIB, 10 * MIB)


def test_quick_measures_once(case_of) -> None:
    measure, sent = measured(up=MIB, down=MIB)
    list(line.control_plane(case_of("localhost:1", measure=measure, depth="quick")))
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("up", "step_s", "deadline_s", "ok", "owner"),
    [
        (MIB, 0.5, 600.0, True, "network"),
        (MIB / 20, 0.5, 60.0, False, "network"),
        (MIB, 50.0, 60.0, False, "this machine"),
    ],
)
def test_a_round_is_predicted_and_held_to_the_plans_deadline(
    up: float, step_s: float, deadline_s: float, ok: bool, owner: str, case_of, plan_of
) -> None:
    measure, _ = measured(up=up, down=2 * MIB)
    plan = plan_of({"rounds.deadline_s": deadline_s, "training.steps_per_round": 4})
    case = case_of("localhost:1", measure=measure, plan=plan)
    case.dry = dry(step_s=step_s, evaluation_s=3.0)
    found = lines(case)[-1]
    assert (found.what, found.ok, found.owner) == ("time per round", ok, owner)
    assert found.figures["down_s"] == 5.0
    assert found.figures["training_s"] == 4 * step_s + 3
    assert found.figures["up_s"] == pytest.approx(20 * MIB / up, abs=0.01)
    assert found.figures["minutes"] == pytest.approx(
        (5 + 4 * step_s + 3 + 20 * MIB / up + 0.08) / 60, abs=1e-3
    )
    assert ok or "deadline_s" in found.cure


@pytest.mark.parametrize(
    ("error", "owner"),
    [
        (MachineError("host:1 refuses the connection; is it running?"), "network"),
        (SignatureError("the coordinator does not let this site in; ask it"), "server"),
    ],
)
def test_a_control_plane_that_fails_says_whose_that_is(
    error: Exception, owner: str, case_of, plan_of
) -> None:
    def fails(up_bytes: int, down_bytes: int) -> Probe:
        raise error

    case = case_of("localhost:1", measure=fails, plan=plan_of())
    control, prediction = lines(case)
    assert (control.ok, control.owner) == (False, owner)
    assert control.said == str(error).split("; ")[0]
    assert control.cure == str(error).split("; ")[1]
    assert prediction.said == "cannot be predicted without a dry batch and the bandwidth"


def findings_are_whole(found: Sequence[Finding]) -> bool:
    return all(one.said and (one.cure or one.ok is not False) for one in found)


def test_the_real_control_plane_is_asked_where_site_toml_names_one(
    case_of, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = case_of("localhost:1")
    link = case.config.link.model_copy(
        update={"control": f"127.0.0.1:{closed_port()}", "certificate": tmp_path / "none.pem"}
    )
    case.config = case.config.model_copy(update={"link": link})
    found = list(line.control_plane(case))
    assert findings_are_whole(found)
    assert [one.ok for one in found] == [False]

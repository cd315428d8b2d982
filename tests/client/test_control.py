"""The hospital's door to the control plane where nothing good answers: words, retries, proxies."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import StatusCode

from client import control
from client.config import SiteConfig
from client.control import NotAdmittedError, UnreachableError
from shared_models.contracts import Health, ProbeRequest, Visit
from shared_models.control import MAX_PIECE_BYTES, MAX_VISIT_BYTES, pieces
from shared_models.errors import ConsiliaError, DocumentError

NOW = datetime.now(UTC)
SECRET = "MARKED-7731"


@pytest.fixture
def told() -> Visit:
    health = Health(version="0.1.0", started_at=NOW, free_mb=1, has_gpu=False, certificate_days=80)
    return Visit(site="north", when=NOW, health=health)


@pytest.fixture
def config_of(site_of: Any, tmp_path: Path) -> Callable[..., SiteConfig]:
    """Return what makes a site whose control plane is at an address."""

    def make(address: str, *, days: int = 90, since: int = -1) -> SiteConfig:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "north")])
        found = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(NOW + timedelta(days=since))
            .not_valid_after(NOW + timedelta(days=days))
            .sign(key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )
        (tmp_path / "ca.crt").write_bytes(found)
        form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        private = key.private_bytes(serialization.Encoding.PEM, *form)
        (tmp_path / "control.pem").write_bytes(private + found)
        return site_of(
            {
                "link.control": address,
                "link.certificate": tmp_path / "control.pem",
                "link.root_certificates": tmp_path / "ca.crt",
            }
        )

    return make


@contextmanager
def answering(reply: bytes | None) -> Iterator[str]:
    """Listen on a port; say ``reply`` to whoever calls and hang up, or say nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def answer() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                held.append(caller)
                if reply is not None:
                    caller.sendall(reply)
                    caller.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for caller in held:
            caller.close()


def failed(config: SiteConfig, told: Visit, *, budget_s: float = 0.3) -> ConsiliaError:
    with pytest.raises(ConsiliaError) as caught, control.connect(config) as link:
        control.visit(link, told, budget_s=budget_s)
    return caught.value


# --- what goes wrong, in words


def test_a_refused_connection_asks_whether_the_coordinator_runs(
    config_of: Callable[..., SiteConfig], told: Visit
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = failed(config_of(f"127.0.0.1:{port}"), told)
    assert isinstance(found, UnreachableError)
    assert f"127.0.0.1:{port} refuses the connection; is the coordinator running" in str(found)


def test_an_unknown_name_points_at_dns(config_of: Callable[..., SiteConfig], told: Visit) -> None:
    found = failed(config_of("nowhere.invalid:443"), told, budget_s=3)
    assert isinstance(found, UnreachableError)
    assert "nowhere.invalid:443 is not known here" in str(found)


def test_something_that_speaks_no_tls_is_no_control_plane(
    config_of: Callable[..., SiteConfig], told: Visit
) -> None:
    with answering(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as address:
        found = failed(config_of(address), told)
    assert isinstance(found, UnreachableError)
    assert "is no control plane" in str(found)


def test_a_call_ends_within_its_budget_when_nothing_is_answered(
    config_of: Callable[..., SiteConfig], told: Visit
) -> None:
    with answering(None) as address:
        start = time.monotonic()
        found = failed(config_of(address), told, budget_s=0.5)
    assert 0.4 < time.monotonic() - start < 5
    assert isinstance(found, UnreachableError)
    assert "did not answer in time" in str(found)


def test_a_site_that_never_joined_is_told_how(site_of: Any, told: Visit) -> None:
    with pytest.raises(DocumentError, match="consilia-site join"), control.connect(site_of()):
        pass


@pytest.mark.parametrize(
    ("days", "since", "sentence"),
    [(-1, -9, "expired on .* revoke the site"), (9, 1, "not valid yet; is this machine's clock")],
)
def test_a_certificate_that_does_not_hold_is_not_shown_to_anybody(
    days: int, since: int, sentence: str, config_of: Callable[..., SiteConfig]
) -> None:
    config = config_of("127.0.0.1:1", days=days, since=since)
    with pytest.raises(NotAdmittedError, match=sentence), control.connect(config):
        pass


@pytest.mark.parametrize(
    ("code", "details", "kind", "words"),
    [
        (StatusCode.UNAVAILABLE, "certificate has expired", NotAdmittedError, "clock"),
        (StatusCode.UNAVAILABLE, "Hostname Verification Check failed", NotAdmittedError, "name"),
        (StatusCode.UNAVAILABLE, "CERTIFICATE_VERIFY_FAILED: ...", NotAdmittedError, "inspection"),
        (StatusCode.UNAVAILABLE, "Socket closed", UnreachableError, "closed the connection"),
        (StatusCode.UNAVAILABLE, SECRET, UnreachableError, "cannot be reached"),
        (StatusCode.PERMISSION_DENIED, SECRET, NotAdmittedError, "revoked"),
        (StatusCode.INVALID_ARGUMENT, SECRET, NotAdmittedError, "older than this one"),
        (StatusCode.UNIMPLEMENTED, SECRET, NotAdmittedError, "older than this one"),
        (StatusCode.RESOURCE_EXHAUSTED, SECRET, UnreachableError, "too often"),
        (StatusCode.RESOURCE_EXHAUSTED, "larger than max", DocumentError, "limit of size"),
        (StatusCode.DEADLINE_EXCEEDED, SECRET, UnreachableError, "in time"),
        (StatusCode.INTERNAL, SECRET, UnreachableError, "its own log"),
        (StatusCode.UNKNOWN, SECRET, UnreachableError, "its own log"),
    ],
)
def test_every_trouble_has_its_words_and_none_of_the_peers(
    code: StatusCode, details: str, kind: type[ConsiliaError], words: str
) -> None:
    found = control._trouble(code, f"{SECRET} {details}", "fl.example.org:443")
    assert type(found) is kind
    assert words in str(found)
    assert SECRET not in str(found)


# --- retries


class Failing(grpc.RpcError):
    def __init__(self, code: StatusCode) -> None:
        self._code = code

    def code(self) -> StatusCode:
        return self._code

    def details(self) -> str:
        return "an answer"


def asked(codes: list[StatusCode], monkeypatch: pytest.MonkeyPatch, *, budget_s: float) -> Any:
    """Ask a peer that fails with these codes and then answers; return how often, how, and waits."""
    waits: list[float] = []
    clock = [0.0]

    def slept(seconds: float) -> None:
        waits.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "sleep", slept)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    left = list(codes)

    def ask(left_s: float) -> str:
        if left:
            raise Failing(left.pop(0))
        return "answer"

    try:
        found: Any = control._insist(ask, "fl.example.org:443", until=budget_s)
    except ConsiliaError as error:
        found = error
    return len(codes) - len(left), found, waits


@pytest.mark.parametrize(
    "code", [StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED]
)
def test_a_peer_that_is_not_there_yet_is_asked_again_later_and_later(
    code: StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_failed, found, waits = asked([code] * 8, monkeypatch, budget_s=600)
    assert (num_failed, found) == (8, "answer")
    for number, wait in enumerate(waits):
        longest = min(control.FIRST_PAUSE_S * 2**number, control.MAX_PAUSE_S)
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize(
    "code",
    [StatusCode.PERMISSION_DENIED, StatusCode.INVALID_ARGUMENT, StatusCode.UNIMPLEMENTED],
)
def test_what_was_refused_is_not_asked_again(
    code: StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_failed, found, waits = asked([code] * 3, monkeypatch, budget_s=600)
    assert (num_failed, waits) == (1, [])
    assert isinstance(found, NotAdmittedError)


def test_no_more_is_waited_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found, waits = asked([StatusCode.UNAVAILABLE] * 99, monkeypatch, budget_s=20)
    assert isinstance(found, UnreachableError)
    assert sum(waits) <= 20


# --- proxies and pieces


@pytest.mark.parametrize(
    ("address", "environment", "expected"),
    [
        ("fl.example.org:443", {}, ("grpc.enable_http_proxy", 0)),
        (
            "fl.example.org:443",
            {"https_proxy": "http://proxy.example.org:3128"},
            ("grpc.http_proxy", "http://proxy.example.org:3128"),
        ),
        (
            "fl.example.org:443",
            {"HTTPS_PROXY": "proxy.example.org:3128"},
            ("grpc.http_proxy", "http://proxy.example.org:3128"),
        ),
        (
            "fl.example.org:443",
            {"https_proxy": "http://proxy.example.org:3128", "no_proxy": ".example.org"},
            ("grpc.enable_http_proxy", 0),
        ),
        ("127.0.0.1:443", {"https_proxy": "http://p:1"}, ("grpc.enable_http_proxy", 0)),
        ("localhost:443", {"https_proxy": "http://p:1"}, ("grpc.enable_http_proxy", 0)),
        ("[::1]:443", {"https_proxy": "http://p:1"}, ("grpc.enable_http_proxy", 0)),
    ],
)
def test_a_proxy_is_used_as_the_environment_says_and_never_for_this_machine(
    address: str,
    environment: dict[str, str],
    expected: tuple[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("https_proxy", "http_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert control._proxy(address) == (expected,)


@pytest.mark.parametrize("num_bytes", [0, 1, MAX_PIECE_BYTES, 3 * MAX_PIECE_BYTES + 5])
def test_a_probes_pieces_are_all_there_and_none_too_large(num_bytes: int) -> None:
    found = [len(piece) for piece in pieces(num_bytes)]
    assert sum(found) == num_bytes
    assert all(0 < size <= MAX_PIECE_BYTES < MAX_VISIT_BYTES for size in found)


def test_a_probe_is_bounded() -> None:
    with pytest.raises(ValueError):
        ProbeRequest(up_bytes=2**30 + 1)

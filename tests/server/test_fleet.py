"""The gate: called by itself, over TLS with a small app behind it, and before Flower's own app."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app import Metadata as MessageMetadata
from flwr.app.message import make_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Metadata,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.run_pb2 import GetRunRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from server import consortium, fleet, link
from server.consortium import TlsFiles, certificates

PULL = "/v1/fleet/pull-messages"
#: What must not be answered from outside; each is sent as it stands.
TRICKS = [
    *("/", "/docs", "/openapi.json", "/health", "/v1/fleet", "/v1/fleet/", "/v1/fleet/nothing"),
    *("/v1/fleet/register-node", "/v1/fleet/get-fab"),
    *("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task"),
    *("//v1/control/start-run", "/v1/fleet/../control/start-run", "/v1/fleet/./pull-messages"),
    *("/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol/start-run"),
    *("/v1%2ffleet/pull-messages", "/v1/fleet/pull%2dmessages", "/v1/fleet//pull-messages"),
    *("/V1/FLEET/pull-messages", "/v1/fleet/pull-messages/", "/v1/fleet/pull-messages;x=/v1"),
    *("/v1/fleet/pull-messages?x=1", "/v1/fleet\\..\\control/start-run", "*"),
    *("http://elsewhere/v1/fleet/pull-messages", "http://elsewhere/v1/control/start-run"),
]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return certificates(tmp_path_factory.mktemp("tls"), hosts=["127.0.0.1"])


class Seen:
    """A small app that counts what reaches it and gives back what it was sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, Any], bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        self.requests.append((scope, event["body"]))
        headers = [(b"content-length", str(len(event["body"])).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": event["body"]})


@contextmanager
def served(app: Any, tls: TlsFiles, **terms: Any) -> Iterator[tuple[int, int]]:
    """Serve ``app`` in a thread; yield its control port and its public one."""
    ports = link.free_port(), link.free_port()
    both = fleet.servers(app, tls, host="127.0.0.1", port=ports[1], control_port=ports[0], **terms)
    both[0].config.lifespan = "off"

    async def serve() -> None:
        renewal = asyncio.create_task(fleet.renewing(tls, *both))
        await asyncio.gather(*(server.serve() for server in both))
        renewal.cancel()

    thread = Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        wait_until(lambda: all(server.started for server in both))
        yield ports
    finally:
        for server in both:
            server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], Any], *, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@contextmanager
def connected(port: int, tls: TlsFiles) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=tls.authority)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as safe,
    ):
        yield safe


def said(port: int, tls: TlsFiles, request: bytes) -> bytes:
    """Send raw bytes and return all that comes back until the connection ends."""
    with connected(port, tls) as stream:
        with suppress(OSError):  # closed before it has taken all
            stream.sendall(request)
        return heard(stream)


def heard(stream: ssl.SSLSocket) -> bytes:
    parts = list[bytes]()
    with suppress(ConnectionResetError, BrokenPipeError, ssl.SSLError):
        while part := stream.recv(65536):
            parts.append(part)
    return b"".join(parts)


def request_of(target: str, *, method: str = "POST", more: str = "", body: bytes = b"") -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def is_bare(answer: bytes, status: int = 404) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    names = {line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]}
    is_status = head.startswith(f"HTTP/1.1 {status} ".encode())
    return is_status and body == b"" and names == {b"content-length", b"connection", b"date"}


def test_from_outside_only_the_fleet_paths_that_an_agent_calls_are_answered(tls: TlsFiles) -> None:
    app = Seen()
    with served(app, tls) as (_, public):
        for target in TRICKS:
            answer = said(public, tls, request_of(target, body=b"x"))
            assert is_bare(answer), (target, answer)
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "post"):
            answer = said(public, tls, request_of(PULL, method=method))
            assert is_bare(answer), (method, answer)
        assert app.requests == []
        for path in fleet.PATHS.values():
            answer = said(public, tls, request_of(path, more="Connection: close\r\n", body=b"ask"))
            assert answer.endswith(b"\r\n\r\nask")
    assert [scope["path"] for scope, _ in app.requests] == list(fleet.PATHS.values())


def test_a_websocket_is_not_opened(tls: TlsFiles) -> None:
    app = Seen()
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    with served(app, tls) as (_, public):
        for target in ("/v1/control/stream-logs", PULL):
            answer = said(public, tls, request_of(target, method="GET", more=upgrade))
            assert is_bare(answer), answer
    assert app.requests == []


def test_what_a_stranger_says_of_where_it_comes_from_is_not_believed(tls: TlsFiles) -> None:
    app = Seen()
    claims = "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: http\r\nConnection: close\r\n"
    with served(app, tls) as (_, public):
        said(public, tls, request_of(PULL, more=claims))
    (scope, _), *_ = app.requests
    assert (scope["client"][0], scope["scheme"]) == ("127.0.0.1", "https")


def test_the_loopback_port_answers_everything(tls: TlsFiles) -> None:
    app = Seen()
    with served(app, tls) as (control, _):
        answer = httpx.post(
            f"https://127.0.0.1:{control}/v1/control/start-run",
            content=b"run",
            verify=ssl.create_default_context(cafile=tls.authority),
            trust_env=False,
        )
    assert (answer.status_code, answer.content) == (200, b"run")


def test_a_request_over_the_limits_is_not_read(tls: TlsFiles) -> None:
    app = Seen()
    largest, chunk = fleet.MOST_BODY_BYTES, b"x" * 2**20
    chunks = (f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n") * (largest // len(chunk) + 1)
    endless = f"POST {PULL} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    head = "".join(f"X-{n}: {'y' * 1000}\r\n" for n in range(900))
    with served(app, tls) as (_, public):
        announced = f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: {largest + 1}\r\n\r\n"
        assert is_bare(said(public, tls, announced.encode()), 413)
        assert is_bare(said(public, tls, endless + chunks), 413)
        assert said(public, tls, request_of(PULL, more=head)).startswith(b"HTTP/1.1 400 ")
        assert app.requests == []
        whole = request_of(PULL, more="Connection: close\r\n", body=b"z" * largest)
        assert said(public, tls, whole).endswith(b"z" * largest)


def test_a_slow_client_is_not_waited_for(tls: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Seen()
    monkeypatch.setattr(fleet, "HEAD_S", 0.3)
    monkeypatch.setattr(fleet, "BODY_S", 0.3)
    with served(app, tls) as (_, public):
        with connected(public, tls) as silent, connected(public, tls) as dripping:
            started = time.monotonic()
            with suppress(OSError):
                for byte in request_of(PULL) * 100:
                    dripping.send(bytes([byte]) if byte != 10 else b"-")
                    time.sleep(0.01)
            assert heard(silent) == heard(dripping) == b""
            assert time.monotonic() - started < 10
        assert is_bare(said(public, tls, request_of(PULL, body=b"half")[:-2]), 408)
    assert app.requests == []


def test_a_connection_in_use_is_kept(tls: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than an idle one would be: each request is a new head."""
    monkeypatch.setattr(fleet, "HEAD_S", 0.2)
    app = Seen()
    with served(app, tls) as (_, public), connected(public, tls) as stream:
        for _ in range(8):
            assert is_answered(stream)
            time.sleep(0.08)
    assert len(app.requests) == 8


def test_a_certificate_issued_anew_is_shown_from_then_on_and_nobody_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "RENEWAL_S", 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(consortium, "SERVER_DAYS", 3 / 86400)
        tls = certificates(tmp_path, hosts=["127.0.0.1"])
    expires_at = certificate_shown(tls.certificate.read_text()).not_valid_after_utc
    with served(Seen(), tls) as (control, public), connected(public, tls) as early:
        assert is_answered(early)
        other = certificates(tmp_path / "other", hosts=["127.0.0.1"])
        tls.key.write_bytes(other.key.read_bytes())  # a renewal that was killed after its key
        wait_until(lambda: datetime.now(UTC) > expires_at)
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"), connected(public, tls):
            pytest.fail("an expired certificate was believed")
        assert is_answered(early)
        certificates(tmp_path, hosts=["127.0.0.1"])
        issued = tls.certificate.read_text()
        wait_until(lambda: all(shown_on(port) == issued for port in (public, control)))
        with connected(public, tls) as late:
            assert is_answered(late)
        assert is_answered(early)


def certificate_shown(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def shown_on(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port))


def is_answered(stream: ssl.SSLSocket) -> bool:
    stream.sendall(request_of(PULL, body=b"ask"))
    answer = b""
    while not answer.endswith(b"ask"):
        answer += stream.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
    return True


@pytest.mark.parametrize(
    ("status", "is_forgotten", "told"),
    [(500, True, 403), (404, True, 403), (401, True, 401), (500, False, 500), (200, True, 200)],
)
def test_who_pushes_to_a_run_of_an_earlier_superlink_is_told_that_it_has_ended(
    tls: TlsFiles, status: int, is_forgotten: bool, told: int
) -> None:
    asked = list[tuple[str, bytes]]()

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"3")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"why"})

    def forgets(path: str, body: bytes) -> bool:
        asked.append((path, body))
        return is_forgotten

    with served(failing, tls, is_forgotten=forgets) as (_, public):
        answer = said(public, tls, request_of(PULL, more="Connection: close\r\n", body=b"ask"))
    assert answer.startswith(f"HTTP/1.1 {told} ".encode())
    assert answer.endswith(b"why") is (told == status)
    assert asked == ([] if status in (200, 401) else [(PULL, b"ask")])


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_run_that_flower_does_not_know_is_found_in_each_kind_of_request() -> None:
    message = MessageProto(metadata=Metadata(run_id=7))
    requests = {
        "push-messages": PushMessagesRequest(messages_list=[message]),
        "push-object": PushObjectRequest(run_id=7, object_content=b"x" * 1000),
        "pull-object": PullObjectRequest(run_id=7),
        "confirm-message-received": ConfirmMessageReceivedRequest(run_id=7),
        "get-run": GetRunRequest(run_id=7),
    }
    for known in (set[int](), {7}):
        state = SimpleNamespace(
            get_run_status=lambda ids, known=known: dict.fromkeys(ids & known, "running")
        )
        factory = SimpleNamespace(state=lambda state=state: state)
        app: Any = SimpleNamespace(state=SimpleNamespace(linkstate_factory=factory))
        is_forgotten = fleet.forgotten_runs(app)
        for name, request in requests.items():
            found = is_forgotten(f"/v1/fleet/{name}", request.SerializeToString())
            assert found is (not known), name
        assert not is_forgotten(PULL, b"")
        assert not is_forgotten("/v1/fleet/push-object", b"\xff\xff")


def test_an_answer_that_is_not_taken_is_given_up(
    tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "TURN_S", 0.3)
    ended = list[str]()

    async def never_done(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    with served(never_done, tls) as (_, public):
        said(public, tls, request_of(PULL))
    assert ended == ["cancelled"]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_flowers_own_app_is_as_protected_as_its_command_makes_it(
    tmp_path: Path, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SuperLink: a stranger's calls, and the command lines of what it has started."""
    for name in fleet.UNWANTED:
        monkeypatch.setenv(name, "1")
    log_file = tmp_path / "superlink.log"
    with link.superlink(tmp_path, tls=tls, port=link.free_port(), log_file=log_file) as superlink:
        public = int(superlink.address.rpartition(":")[2])
        more = "Content-Type: application/protobuf\r\nConnection: close\r\n"
        for target in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/health"):
            assert is_bare(said(public, tls, request_of(target, more=more)))
        unsigned = said(public, tls, request_of(PULL, more=more))
        assert unsigned.startswith(b"HTTP/1.1 401 ")
        mark = link._mark_of(tmp_path)
        wait_until(lambda: len(link._marked(mark)) >= 2)
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in link._marked(mark)]
        executor = next(line for line in commands if "flower-superexec" in line).split("\0")
        assert superlink.control in executor
        assert not {"--insecure", "--allow-runtime-dependency-installation"} & set(executor)
        assert listened_on(superlink.process) == {superlink.address, superlink.control}
        issued = certificates(tls.certificate.parent, hosts=["127.0.0.1"]).certificate.read_text()
        wait_until(lambda: shown_on(public) == issued)
        superlink.check()
    assert link._marked(mark) == []


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_what_nobody_will_ask_for_any_more_does_not_stay_in_memory(tls: TlsFiles) -> None:
    """Flower's own state: a site that never fetches its orders, and one that replies too late."""
    state = fleet.flower_app(tls, control_port=1).state.linkstate_factory.state()
    node_id = state.create_node("owner", "owner", b"key", 30.0)
    assert state.activate_node(node_id, 30.0)
    run_id = begun_run(state)
    orders = [kept_order(state, run_id, node_id, number=number) for number in range(3)]
    replies = [kept_reply(state, order) for order in orders[:1]]
    objects, ids = state.object_store, [one.metadata.message_id for one in [*orders, *replies]]
    assert all(object_id in objects for object_id in ids)
    fleet.tidy(state, now=time.time())
    assert all(object_id in objects for object_id in ids), "their time is not over"
    fleet.tidy(state, now=orders[1].metadata.created_at + orders[1].metadata.ttl)
    assert [object_id in objects for object_id in ids] == [False, False, True, False]
    assert (state.num_message_ins(), state.num_message_res()) == (1, 0)
    assert len(objects) == len(get_all_nested_objects(orders[2]))
    assert state.finish_task(state.run_ids[run_id].run.primary_task_id, "failed", "killed")
    fleet.tidy(state, now=time.time())
    assert (len(objects), state.num_message_ins()) == (0, 0)


def begun_run(state: Any) -> int:
    made: int = state.create_run(
        None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
    )
    return made


def kept_order(state: Any, run_id: int, node_id: int, *, number: int) -> Message:
    content = RecordDict({"letter": ConfigRecord({"number": number, "weights": b"x" * 1000})})
    about = MessageMetadata(
        run_id=run_id,
        message_id="",
        src_node_id=1,
        dst_node_id=node_id,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=60.0 + number * 10,
        message_type="train",
    )
    return kept(state, make_message(about, content))


def kept_reply(state: Any, order: Message) -> Message:
    return kept(state, Message(RecordDict({"late": ConfigRecord({})}), reply_to=order))


def kept(state: Any, message: Message) -> Message:
    message.metadata.__dict__["_message_id"] = message.object_id
    tree = get_object_tree(message)
    session = state.start_session(message.metadata.run_id)
    assert state.store_message_and_object_tree(message, tree, session)[0]
    for object_id, found in get_all_nested_objects(message).items():
        state.object_store.put(object_id, found.deflate())
    return message


def listened_on(process: subprocess.Popen[bytes]) -> set[str]:
    """Return the addresses on which ``process`` listens, from /proc."""
    inodes = {
        target[8:-1]
        for entry in Path(f"/proc/{process.pid}/fd").iterdir()
        if (target := str(entry.readlink())).startswith("socket:")
    }
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw, port = fields[1].split(":")
                found.add(f"{socket.inet_ntoa(bytes.fromhex(raw)[::-1])}:{int(port, 16)}")
    return found


# --- what a new Flower may change


def test_flower_still_has_the_paths_that_are_let_through() -> None:
    assert {("POST", path) for path in fleet.PATHS.values()} <= set(PROTOBUF_REQUEST_TYPES)


def test_a_chunk_of_flowers_fits_the_limit() -> None:
    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 2**20 <= fleet.MOST_BODY_BYTES


def test_flower_is_still_configured_by_the_same_settings() -> None:
    """A setting more may be a protection less."""
    assert {field.name for field in dataclasses.fields(SuperLinkLifespanConfig)} == {
        *("control_address", "health_server_address", "host", "port", "insecure", "certificates"),
        *("superexec_auth_secret", "authn_plugin", "event_log_plugin", "fleet_event_log_plugin"),
        *("enable_event_log", "artifact_provider", "enable_supernode_auth", "fleet_api_type"),
        *("fleet_api_address", "simulation", "ssl_ca_certfile", "ssl_certfile", "ssl_keyfile"),
        *("database", "isolation", "runtime_dependency_install"),
    }


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (create_app, ["config", "superlink_lifespan_class"]),
        (SuperLinkLifespan, ["config", "state_factory"]),
        (NoOpControlAuthnPlugin, []),
        (LinkState.get_run_status, ["self", "run_ids"]),
    ],
)
def test_flowers_app_is_still_made_the_same_way(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters

"""A door, and a program: Flower's own SuperLink behind a gate that hospitals can be shown.

``python -m server.fleet`` builds the app that ``flower-superlink`` builds, with the same
protections, and serves it in one process on two sockets, both TLS: a public one, for the hospitals,
and one on the loopback interface, for the coordinator's own control and server apps. Flower's
control and runtime interfaces know no passwords: whoever reaches them may submit code and read
every update. ``server/link.py`` starts this program and ends it.

Guarantees:
    From outside only the fleet paths that a site's agent calls are answered, the rest a bare 404.
    A request from outside is read to a limit and within a limit of time, or not at all.
    Only nodes whose keys are enrolled are answered, and no dependency is ever installed.
    Who pushes what belongs to a run of an earlier SuperLink is told that the run has ended.
    What nobody will ask for any more does not stay in memory: orders and replies past their time,
        and all that belonged to a run that has ended.
    A certificate issued anew is shown to whoever connects from then on; nobody is cut off by it.

Design: a request passes only if its path is, byte for byte, one of ``PATHS``, and what the app is
then shown is that constant; there is nothing to normalise, so nothing to trick. What a connection
costs before its key is checked is bounded here: its head, its body, its time, and how many there
are. Who may open connections at all is a firewall's business. Flower's private modules are used
here too; ``tests/server/test_fleet.py`` fails when a new Flower changes one.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.consortium import TlsFiles

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: What a site's agent calls. Not among them: enrolling oneself, and fetching the app's bundle.
PATHS = {
    f"/v1/fleet/{name}".encode(): f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "get-run",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
        "get-run",
    )
}
#: Flower sends arrays in chunks of 5 MiB, each an object and a request of its own; everything else
#: (heartbeats, announcements with the ids of their chunks) is far smaller.
MOST_BODY_BYTES = 8 * 2**20
MOST_HEAD_BYTES = 16 * 2**10  # an agent's head, key and signature included, is under 2 KiB
HEAD_S = 15.0  # for a head; also how often an idle connection is looked at
BODY_S = 120.0  # for a body: the largest chunk at 0.4 Mbit/s
TURN_S = 300.0  # for an answer to be taken: the same at half of that, and Flower's own work
MOST_CONNECTIONS = 256  # an agent holds two; times the largest body this is 2 GiB at the very worst
STOP_S = 2
TIDY_S = 30.0  # how often what is past its time is dropped
RENEWAL_S = 1.0  # how often it is seen whether the certificate was issued anew
ENDED = 403  # what Flower answers about a run that has ended; 401 is for who is not believed

#: Would open Flower's earlier, gRPC interfaces, on all addresses.
UNWANTED = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")


class _TooLargeError(Exception):
    """A body over the limit."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that ends a connection on which no head is completed for ``HEAD_S``."""

    _ticking: asyncio.TimerHandle | None = None
    _seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._ticking = self.loop.call_later(HEAD_S, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch it no longer."""
        if self._ticking is not None:
            self._ticking.cancel()
        super().connection_lost(exc)

    def _tick(self) -> None:
        """End the connection, if it is idle and has brought no new head since the last look."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.scope is self._seen:
            self.transport.abort()
            return
        self._seen = self.scope
        self._ticking = self.loop.call_later(HEAD_S, self._tick)


class _Server(uvicorn.Server):
    """A server that leaves the process's signals to ``_serve``."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def gate(app: App, *, is_forgotten: Callable[[str, bytes], bool] = lambda *_: False) -> App:
    """Return ``app`` as hospitals may see it: ``PATHS``, and a bare 404 for everything else.

    What fails because it is about a run that ``is_forgotten``, by its path and body, has ended.
    """

    async def gated(scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope)
        if path is None:
            await _refuse(scope, send, 404)
            return
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(scope, receive)
        except _TooLargeError:
            await _refuse(scope, send, 413)
            return
        except TimeoutError:
            await _refuse(scope, send, 408)
            return
        if body is None:
            return
        shown = {**scope, "path": path, "raw_path": path.encode(), "root_path": ""}
        taken = _translated(send, is_ended=lambda: is_forgotten(path, body))
        async with asyncio.timeout(TURN_S):
            await app(shown, _given(body, receive), taken)

    return gated


def flower_app(tls: TlsFiles, *, control_port: int) -> FastAPI:
    """Build Flower's app as ``flower-superlink`` does, its own processes on the loopback port.

    What its command line would say: ``--enable-supernode-auth``,
    ``--disable-runtime-dependency-installation``, subprocess isolation, state in memory.
    """
    from flwr.common.constant import ISOLATION_MODE_SUBPROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    for name in UNWANTED:
        os.environ.pop(name, None)
    config = SuperLinkLifespanConfig(
        control_address="127.0.0.1:0",  # of the gRPC interfaces, which stay off
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        health_server_address=None,
        host="127.0.0.1",
        port=control_port,
        insecure=False,
        certificates=(
            tls.authority.read_bytes(),
            tls.certificate.read_bytes(),
            tls.key.read_bytes(),
        ),
        ssl_ca_certfile=str(tls.authority),
        ssl_certfile=str(tls.certificate),
        ssl_keyfile=str(tls.key),
        enable_supernode_auth=True,
        authn_plugin=NoOpControlAuthnPlugin(),
        superexec_auth_secret=None,
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        simulation=False,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation=ISOLATION_MODE_SUBPROCESS,
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def forgotten_runs(app: FastAPI) -> Callable[[str, bytes], bool]:
    """Return what tells, from a request, whether it is about a run that Flower's app knows not."""
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    def is_forgotten(path: str, body: bytes) -> bool:
        request: Any = PROTOBUF_REQUEST_TYPES["POST", path]()
        try:
            request.ParseFromString(body)
        except DecodeError:
            return False
        messages = getattr(request, "messages_list", ())
        run_id = messages[0].metadata.run_id if messages else getattr(request, "run_id", None)
        known = app.state.linkstate_factory.state().get_run_status({run_id} - {None})
        return run_id is not None and run_id not in known

    return is_forgotten


def tidy(state: Any, *, now: float) -> None:
    """Drop from Flower's state in memory what is past its time at ``now`` (seconds since 1970).

    Flower drops an order's weights once its site has fetched them, and a reply's once they were
    read. A site that never fetches its orders, or replies too late, would else fill the memory.
    """
    with state.lock:
        over = {
            message_id
            for message_id, message in state.message_ins_store.items()
            if message.metadata.created_at + message.metadata.ttl <= now
        }
        answered = over & state.message_ins_id_to_message_res_id.keys()
        replies = {state.message_ins_id_to_message_res_id[message_id] for message_id in answered}
        state.delete_messages(over)
        run_ids = set(state.run_ids)
    for object_id in over | replies:
        state.object_store.delete(object_id)
    for run_id, status in state.get_run_status(run_ids).items():
        if status.status == "finished":
            state.cleanup_run(run_id)


async def tidying(state: Any) -> None:
    """Keep Flower's state tidy until this is cancelled."""
    while True:
        await asyncio.sleep(TIDY_S)
        await asyncio.to_thread(tidy, state, now=time.time())


def servers(
    app: App,
    tls: TlsFiles,
    *,
    host: str,
    port: int,
    control_port: int,
    is_forgotten: Callable[[str, bytes], bool] = lambda *_: False,
) -> tuple[uvicorn.Server, uvicorn.Server]:
    """Return the server of all of ``app`` on the loopback interface, and the gated public one."""
    from flwr.supercore.http_logging import get_uvicorn_log_config
    from flwr.supercore.logger import console_handler

    common: dict[str, Any] = {
        "log_config": get_uvicorn_log_config(console_handler.level),
        "ssl_certfile": tls.certificate,
        "ssl_keyfile": tls.key,
        "ws": "none",
        "proxy_headers": False,
        "timeout_graceful_shutdown": STOP_S,
    }
    control = uvicorn.Config(app, host="127.0.0.1", port=control_port, **common)
    public = uvicorn.Config(
        gate(app, is_forgotten=is_forgotten),
        host=host,
        port=port,
        lifespan="off",  # the other server's, which starts first and ends last
        http=PatientProtocol,
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        limit_concurrency=MOST_CONNECTIONS,
        server_header=False,
        **common,
    )
    return _Server(control), _Server(public)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    given = _arguments().parse_args()
    tls = TlsFiles(given.authority, given.certificate, given.key)
    app = flower_app(tls, control_port=given.control_port)
    both = servers(
        app,
        tls,
        host=given.host,
        port=given.port,
        control_port=given.control_port,
        is_forgotten=forgotten_runs(app),
    )
    asyncio.run(_serve(*both, tls=tls, state=app.state.linkstate_factory.state()))


async def renewing(tls: TlsFiles, *shown_by: uvicorn.Server) -> None:
    """Have the servers show the certificate as it is issued anew, until this is cancelled.

    A pair that does not fit, as while one of its files is being replaced, is looked at again.
    """
    shown, level = None, logging.WARNING
    while True:
        await asyncio.sleep(RENEWAL_S)
        try:
            found = tls.certificate.read_bytes(), tls.key.read_bytes()
            if found != shown:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key)
                for context in (server.config.ssl for server in shown_by if server.config.ssl):
                    context.load_cert_chain(tls.certificate, tls.key)
            shown, level = found, logging.WARNING
        except OSError as error:  # ssl.SSLError as well
            log.log(level, "the certificate cannot be read anew: %s", type(error).__name__)
            level = logging.DEBUG  # once is enough


async def _serve(
    control: uvicorn.Server, public: uvicorn.Server, *, tls: TlsFiles, state: Any
) -> None:
    """Run both servers until a signal comes or one of them ends."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    running = [asyncio.create_task(stopped.wait()), asyncio.create_task(control.serve())]
    while not control.started and not any(task.done() for task in running):
        await asyncio.sleep(0.02)
    if control.started:
        running.append(asyncio.create_task(public.serve()))
    chores = [
        asyncio.create_task(renewing(tls, control, public)),
        asyncio.create_task(tidying(state)),
    ]
    await asyncio.wait([*running, *chores], return_when=asyncio.FIRST_COMPLETED)
    for chore in chores:
        chore.cancel()
    is_asked = stopped.is_set()
    stopped.set()
    for server, task in zip((public, control), reversed(running[1:]), strict=False):
        server.should_exit = True
        await task
    if not is_asked:
        raise SystemExit("a server ended by itself")


def _path(scope: Scope) -> str | None:
    """Return which of ``PATHS`` is called; None if it is none of them, or not called as agents do.

    The raw bytes are compared: nothing is decoded, no dots are resolved, no slashes are merged.
    """
    if scope["type"] != "http" or scope["method"] != "POST" or scope["query_string"]:
        return None
    return PATHS.get(scope["raw_path"])


async def _body(scope: Scope, receive: Receive) -> bytes | None:
    """Read a request's body; None if the client is gone.

    Raises:
        _TooLargeError: as soon as it is known to be over ``MOST_BODY_BYTES``.
    """
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if not announced.isdigit() or len(announced) > 12 or int(announced) > MOST_BODY_BYTES:
        raise _TooLargeError
    parts, size = list[bytes](), 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        part = event.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > MOST_BODY_BYTES:
            raise _TooLargeError
        if not event.get("more_body", False):
            return b"".join(parts)


def _given(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` whole, then whatever else comes."""
    left = [body]

    async def give() -> MutableMapping[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return give


def _translated(send: Send, *, is_ended: Callable[[], bool]) -> Send:
    """Return ``send``, but for a failure that is one because a run ``is_ended``."""
    has_ended = False

    async def take(event: MutableMapping[str, Any]) -> None:
        nonlocal has_ended
        if event["type"] == "http.response.start" and event["status"] >= 400:
            has_ended = event["status"] not in (401, ENDED) and is_ended()
            if has_ended:
                headers = [(b"content-length", b"0")]
                await send({"type": "http.response.start", "status": ENDED, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
        if not has_ended:
            await send(event)

    return take


async def _refuse(scope: Scope, send: Send, status: int) -> None:
    """Answer nothing but a status, and end the connection."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A SuperLink that shows hospitals its fleet paths")
    parser.add_argument("--host", required=True, help="address that hospitals reach")
    parser.add_argument("--port", required=True, type=int, help="port that hospitals reach")
    parser.add_argument("--control-port", required=True, type=int, help="port on 127.0.0.1")
    for name in TlsFiles._fields:
        parser.add_argument(f"--{name}", required=True, type=Path, help="PEM file")
    return parser


if __name__ == "__main__":
    main()

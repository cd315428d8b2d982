"""A door: the coordinator's side of the control plane, gRPC over TLS on two ports.

On the control port a site shows its certificate (mutual TLS): Visit, Renew, Probe. On the enrolment
port, which anybody may reach, there is Join alone. Reflection is off; nothing else is answered.

Guarantees:
    Who calls the control port is the site whose current certificate it shows, on every call.
    A revoked or expired certificate is refused from the next call on; no other site notices.
    A visit or a renewal in another site's name is refused.
    What a peer sends is bounded and read as a contract, or refused; no error's own text leaves.
    A call without a deadline, or with one too far off, is refused.
    Newcomers who ask too often are refused, and no site notices.

Design: Python's gRPC knows no revocation lists, so every call looks the caller's certificate up in
the register. Each port has its own threads: whoever holds all of the enrolment port's, with
connections that say nothing, keeps newcomers out until those are closed, but no site.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple

from server import office as offices
from server import register
from server.office import Office
from shared_models.contracts import (
    Bulletin,
    Contract,
    ProbeAnswer,
    ProbeRequest,
    SignedJoinRequest,
    Visit,
)
from shared_models.control import (
    CONTROL,
    ENROLMENT,
    MAX_BULLETIN_BYTES,
    MAX_CALL_S,
    MAX_JOIN_BYTES,
    MAX_PIECE_BYTES,
    MAX_VISIT_BYTES,
    AnyContract,
    parse,
    pieces,
)
from shared_models.errors import DocumentError, MachineError, SignatureError
from shared_models.signing import canonical

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would write on the operator's terminal
import grpc
from grpc import StatusCode

HANDSHAKE_S = 10.0
GRACE_S = 2.0  # what a call in progress gets when the server stops
SLACK_S = 60.0  # by which a peer's deadline may look later than it is
NUM_THREADS = 24
MOST_CALLS = 256
MOST_PROBES = 8  # at once, of all sites together: the other threads are for visits
CERTIFY_EVERY_S = 24 * 3600.0
NEWCOMER = (20, 1.0)  # calls at once and calls a second, of one address
NEWCOMERS = (100, 20.0)  # of all together
MOST_ADDRESSES = 4096

#: All that a peer is ever told of why it got no answer.
REASONS: dict[str, tuple[StatusCode, str]] = {
    "denied": (StatusCode.PERMISSION_DENIED, "this certificate is not on the register"),
    "other": (StatusCode.PERMISSION_DENIED, "this is not in the name of the site that calls"),
    "malformed": (StatusCode.INVALID_ARGUMENT, "the message is not what this method takes"),
    "deadline": (StatusCode.INVALID_ARGUMENT, "a call must have a deadline, and a near one"),
    "often": (StatusCode.RESOURCE_EXHAUSTED, "too many calls; try again later"),
    "failed": (StatusCode.INTERNAL, "the coordinator could not answer; its log says why"),
}

Visitor = Callable[[str, Visit], Bulletin]
Handler = Callable[[bytes, grpc.ServicerContext], Contract]

log = logging.getLogger(__name__)


class Ports(NamedTuple):
    """Where the two servers listen."""

    control: int
    enrolment: int


class _Refused(Exception):
    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@contextmanager
def serve(office: Office, *, visit: Visitor, handshake_s: float = HANDSHAKE_S) -> Iterator[Ports]:
    """Answer hospitals until the block is left; ``visit`` gets the site and what it tells.

    Raises:
        MachineError: if a port is taken, or may not be used.
        DocumentError: if the office's certificates cannot be read.
    """
    listen = office.settings.listen
    control = _server(MAX_VISIT_BYTES, handshake_s=handshake_s, age_s=3600.0)
    control.add_generic_rpc_handlers((_control(office, visit),))
    enrolment = _server(MAX_JOIN_BYTES, handshake_s=handshake_s, age_s=30.0)
    enrolment.add_generic_rpc_handlers((_enrolment(office),))
    ports = Ports(
        _listen(control, listen.control, _Certificate(office, is_mutual=True)),
        _listen(enrolment, listen.enrolment, _Certificate(office, is_mutual=False)),
    )
    control.start()
    enrolment.start()
    try:
        yield ports
    finally:
        for stopped in [server.stop(GRACE_S) for server in (enrolment, control)]:
            stopped.wait()


def _control(office: Office, visit: Visitor) -> grpc.GenericRpcHandler:
    def visited(content: bytes, context: grpc.ServicerContext) -> Bulletin:
        site = _caller(office, context)
        told = _read(content, Visit)
        if told.site != site:
            raise _Refused("other")
        return _bounded(visit(site, told))

    def renewed(content: bytes, context: grpc.ServicerContext) -> Contract:
        site = _caller(office, context)
        request = _read(content, SignedJoinRequest)
        try:
            return offices.renew(office, site, request)
        except SignatureError:
            raise _Refused("other") from None

    handlers = {
        "Visit": _unary(visited),
        "Renew": _unary(renewed),
        "Probe": grpc.stream_stream_rpc_method_handler(_Probes(office).answer),
    }
    return grpc.method_handlers_generic_handler(CONTROL, handlers)


def _enrolment(office: Office) -> grpc.GenericRpcHandler:
    everybody, each = _Buckets(*NEWCOMERS), _Buckets(*NEWCOMER)

    def joined(content: bytes, context: grpc.ServicerContext) -> Contract:
        address = context.peer().rpartition(":")[0]
        if not (each.take(address) and everybody.take("")):
            raise _Refused("often")
        try:
            return offices.receive(office, _read(content, SignedJoinRequest))
        except SignatureError:
            raise _Refused("malformed") from None

    return grpc.method_handlers_generic_handler(ENROLMENT, {"Join": _unary(joined)})


def _unary(handle: Handler) -> grpc.RpcMethodHandler:
    """Return a method that answers a message with a contract's canonical bytes, or a reason."""

    def call(content: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            _check_deadline(context)
            return canonical(handle(content, context))
        except Exception as error:
            reason = _reason(error)
        return context.abort(*REASONS[reason])

    return grpc.unary_unary_rpc_method_handler(call)


class _Probes:
    """Who is being probed: each site once at a time, and not too many."""

    def __init__(self, office: Office) -> None:
        self.office, self.lock, self.sites = office, threading.Lock(), set[str]()

    def answer(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            _check_deadline(context)
            with self._turn(_caller(self.office, context)):
                yield from _probe(messages)
            return
        except Exception as error:
            reason = _reason(error)
        if context.is_active():
            context.abort(*REASONS[reason])

    @contextmanager
    def _turn(self, site: str) -> Iterator[None]:
        with self.lock:
            if site in self.sites or len(self.sites) >= MOST_PROBES:
                raise _Refused("often")
            self.sites.add(site)
        try:
            yield
        finally:
            with self.lock:
                self.sites.discard(site)


def _probe(messages: Iterator[bytes]) -> Iterator[bytes]:
    asked, received = _read(next(messages, b""), ProbeRequest), 0
    yield canonical(ProbeAnswer(received_bytes=0, when=datetime.now(UTC)))
    while received < asked.up_bytes:
        piece = next(messages, b"")
        received += len(piece)
        if not 0 < len(piece) <= MAX_PIECE_BYTES or received > asked.up_bytes:
            raise _Refused("malformed")
    yield canonical(ProbeAnswer(received_bytes=received, when=datetime.now(UTC)))
    yield from pieces(asked.down_bytes)


class _Buckets:
    """How often each ``who`` may: ``burst`` times at once, then ``per_s`` times a second."""

    def __init__(self, burst: int, per_s: float) -> None:
        self.burst, self.per_s, self.lock = burst, per_s, threading.Lock()
        self.levels: dict[str, tuple[float, float]] = {}

    def take(self, who: str) -> bool:
        """Tell whether ``who`` may once more, now."""
        with self.lock:
            now = time.monotonic()
            level, then = self.levels.pop(who, (float(self.burst), now))
            level = min(level + (now - then) * self.per_s, float(self.burst))
            if len(self.levels) >= MOST_ADDRESSES:
                del self.levels[next(iter(self.levels))]  # who has not asked for longest
            self.levels[who] = (level - 1 if level >= 1 else level, now)
            return level >= 1


class _Certificate:
    """The certificate that a server shows, as the office has it; looked after while it runs."""

    def __init__(self, office: Office, *, is_mutual: bool) -> None:
        self.office, self.is_mutual = office, is_mutual
        self.checked_at = time.monotonic()

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._renewed, require_client_authentication=self.is_mutual
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        tls = offices.certify(self.office)
        authority = tls.authority.read_bytes() if self.is_mutual else None
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], authority)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what to show from now on, once a day; none in between."""
        if time.monotonic() - self.checked_at < CERTIFY_EVERY_S:
            return None
        self.checked_at = time.monotonic()
        try:
            return self._configuration()
        except Exception as error:
            log.error("the servers' certificate cannot be renewed: %s", type(error).__name__)
            return None


def _caller(office: Office, context: grpc.ServicerContext) -> str:
    """Return the site that calls, by the certificate it shows and the register."""
    shown = context.auth_context()
    names, certificates = shown.get("x509_common_name", ()), shown.get("x509_pem_cert", ())
    if len(names) != 1 or len(certificates) != 1:
        raise _Refused("denied")
    site, found = names[0].decode(), register.fingerprint(certificates[0].decode())
    if not offices.is_let_in(office, site=site, fingerprint=found):
        log.warning("a certificate of %s that counts no more was refused", site)
        raise _Refused("denied")
    return site


def _bounded(bulletin: Bulletin) -> Bulletin:
    """Return a bulletin that a site can receive: without its last offers, if they are too many."""
    while len(canonical(bulletin)) > MAX_BULLETIN_BYTES and bulletin.offers:
        kept = bulletin.offers[: len(bulletin.offers) // 2]
        log.warning("a bulletin is too large: %d of its offers are left out", len(kept))
        bulletin = bulletin.model_copy(update={"offers": kept})
    return bulletin


def _read(content: bytes, contract: type[AnyContract]) -> AnyContract:
    try:
        return parse(content, contract)
    except DocumentError:
        raise _Refused("malformed") from None


def _check_deadline(context: grpc.ServicerContext) -> None:
    left_s = context.time_remaining()
    if left_s is None or left_s > MAX_CALL_S + SLACK_S:
        raise _Refused("deadline")


def _reason(error: Exception) -> str:
    if isinstance(error, _Refused):
        return error.reason
    if not isinstance(error, grpc.RpcError):  # that is a peer which left
        log.error("a call could not be answered: %s", type(error).__name__)
    return "failed"


def _server(max_bytes: int, *, handshake_s: float, age_s: float) -> grpc.Server:
    options = (
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", MAX_BULLETIN_BYTES),
        ("grpc.max_concurrent_streams", 8),
        ("grpc.max_metadata_size", 8192),
        ("grpc.server_handshake_timeout_ms", int(handshake_s * 1000)),
        ("grpc.max_connection_age_ms", int(age_s * 1000)),
        ("grpc.max_connection_age_grace_ms", int(min(age_s, MAX_CALL_S) * 1000)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    )
    threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="control")
    return grpc.server(threads, options=options, maximum_concurrent_rpcs=MOST_CALLS)


def _listen(server: grpc.Server, address: str, certificate: _Certificate) -> int:
    credentials = certificate.credentials()
    try:
        return int(server.add_secure_port(address, credentials))
    except RuntimeError:
        raise MachineError(
            f"cannot listen on {address}; is the port taken? [listen] in consortium.toml names it"
        ) from None

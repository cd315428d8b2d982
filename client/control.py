"""A door: the hospital's side of the control plane, gRPC over TLS, outbound only.

Guarantees:
    Nothing is said before the peer has shown a certificate of the consortium's own authority.
    A call ends within its budget, whatever the coordinator does.
    What the coordinator refused is not asked again.
    No proxy is used for an address of this machine.

Design: every message may be said twice, so a call that got no answer is repeated, after pauses
that grow and are random in part. Why a call failed is told in words of ours, never in a peer's.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.request import getproxies_environment, proxy_bypass_environment

from client import certificate
from client.config import SiteConfig
from shared_models.contracts import (
    Bulletin,
    Contract,
    Invite,
    ProbeAnswer,
    ProbeRequest,
    SignedAdmission,
    SignedJoinRequest,
    Visit,
)
from shared_models.control import (
    CONTROL,
    ENROLMENT,
    MAX_BULLETIN_BYTES,
    MAX_CALL_S,
    MAX_VISIT_BYTES,
    AnyContract,
    parse,
    pieces,
)
from shared_models.errors import ConsiliaError, DocumentError, MachineError, SignatureError
from shared_models.signing import canonical

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would write on the operator's terminal
import grpc
from grpc import StatusCode

CALL_S = 20.0  # the most that one try takes
LEAST_CALL_S = 0.1
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 15.0
KEEPALIVE = (("grpc.keepalive_time_ms", 60_000), ("grpc.keepalive_timeout_ms", 20_000))

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class UnreachableError(MachineError):
    """The coordinator cannot be reached, or did not answer in time; later it may."""


class NotAdmittedError(SignatureError):
    """The coordinator does not let this site in, or is not who it should be; asking again is vain."""


#: What gRPC says of a connection that failed, and what that means.
TROUBLES: tuple[tuple[tuple[str, ...], type[ConsiliaError], str], ...] = (
    (
        ("certificate has expired", "certificate is not yet valid"),
        NotAdmittedError,
        "the certificate that {address} shows has expired or is not valid yet; is this machine's "
        "clock right? If so, the coordinator has to renew it",
    ),
    (
        ("Hostname Verification",),
        NotAdmittedError,
        "{address} shows a certificate for another name; ask the coordinator for its address",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED", "BAD_SIGNATURE"),
        NotAdmittedError,
        "{address} is not certified by the consortium's own authority: something in between opens "
        "TLS connections (have IT exempt this address from inspection), or another answers there",
    ),
    (
        ("WRONG_VERSION_NUMBER", "No ALPN", "Cannot check peer"),
        UnreachableError,
        "what answers at {address} is no control plane; is the address right, or a proxy in "
        "between?",
    ),
    (
        ("resolv", "lookup"),
        UnreachableError,
        "the name in {address} is not known here; check the address, and this machine's DNS",
    ),
    (
        ("refused",),
        UnreachableError,
        "{address} refuses the connection; is the coordinator running, and the port right?",
    ),
    (
        ("Socket closed", "reset", "CERTIFICATE_REQUIRED", "ALERT"),
        UnreachableError,
        "{address} closed the connection; a firewall may be in between, or the coordinator does "
        "not know the authority of this site's certificate",
    ),
)

#: What the coordinator's answers mean that are none.
REFUSALS: dict[StatusCode, tuple[type[ConsiliaError], str]] = {
    StatusCode.DEADLINE_EXCEEDED: (
        UnreachableError,
        "{address} did not answer in time; a firewall may drop what is sent there",
    ),
    StatusCode.RESOURCE_EXHAUSTED: (
        UnreachableError,
        "{address} is asked too often just now; try again in a few minutes",
    ),
    StatusCode.PERMISSION_DENIED: (
        NotAdmittedError,
        "the coordinator does not let this site in: its certificate was revoked, or is not the one "
        "on its register; ask the coordinator, and join again with a new invite",
    ),
    StatusCode.INVALID_ARGUMENT: (
        NotAdmittedError,
        "the coordinator could not read what this site sent; is its software older than this one?",
    ),
    StatusCode.UNIMPLEMENTED: (
        NotAdmittedError,
        "{address} does not know what was asked; is its software older than this one?",
    ),
}
FAILED = (UnreachableError, "the coordinator failed to answer; its own log says why")
SILENT = (UnreachableError, "{address} cannot be reached")
TOO_LARGE = (DocumentError, "a message between this site and {address} is over the limit of size")
RETRIED = (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED)


class Link(NamedTuple):
    """An open connection to the control plane, of the site that its certificate names."""

    channel: grpc.Channel
    site: str
    coordinator: str
    address: str


class Probe(NamedTuple):
    """What the way to the coordinator is like. ``clock_skew_s``: its clock less this machine's."""

    seconds_up: float
    seconds_down: float
    clock_skew_s: float
    round_trip_s: float


@contextmanager
def connect(config: SiteConfig) -> Iterator[Link]:
    """Open the control plane with this site's certificate; it connects at the first call.

    Raises:
        DocumentError: if the site has not joined, or its files cannot be read.
        NotAdmittedError: if its certificate has expired.
    """
    link = config.link
    if link.control is None or link.certificate is None:
        raise DocumentError(
            "site.toml names no control plane in [link]; ask the coordinator for an invite, then: "
            "consilia-site join INVITE"
        )
    _check_dates(link.certificate)
    authority, pair = _bytes(link.root_certificates), _bytes(link.certificate)
    credentials = grpc.ssl_channel_credentials(authority, pair, pair)
    with _channel(link.control, credentials) as channel:
        yield Link(channel, config.name, config.coordinator, link.control)


def visit(link: Link, told: Visit, *, budget_s: float = 60.0) -> Bulletin:
    """Tell the coordinator how the site stands, and return what it has for the site.

    Raises:
        UnreachableError: if it does not answer within ``budget_s``.
        NotAdmittedError: if it does not let this site in, or is another.
    """
    method = f"/{CONTROL}/Visit"
    found = _call(link.channel, link.address, method, told, answer=Bulletin, budget_s=budget_s)
    if found.site != link.site:
        raise NotAdmittedError("the coordinator answered with another site's bulletin")
    return found


def renew(link: Link, request: SignedJoinRequest, *, budget_s: float = 60.0) -> SignedAdmission:
    """Ask for a new certificate by the one that still holds; what comes back is not yet checked.

    Raises:
        UnreachableError: if the coordinator does not answer within ``budget_s``.
        NotAdmittedError: if it does not let this site in, or is another.
    """
    method, answer = f"/{CONTROL}/Renew", SignedAdmission
    return _call(link.channel, link.address, method, request, answer=answer, budget_s=budget_s)


def join(invite: Invite, request: SignedJoinRequest, *, budget_s: float = 60.0) -> SignedAdmission:
    """Ask to be let in, or whether one has been; what comes back is not yet checked.

    Raises:
        UnreachableError: if the coordinator does not answer within ``budget_s``.
        NotAdmittedError: if it is not the invite's, or will not hear the request.
    """
    credentials = grpc.ssl_channel_credentials(invite.authority.encode())
    method, answer = f"/{ENROLMENT}/Join", SignedAdmission
    with _channel(invite.enrolment, credentials) as channel:
        return _call(channel, invite.enrolment, method, request, answer=answer, budget_s=budget_s)


def probe(link: Link, *, up_bytes: int = 0, down_bytes: int = 0, budget_s: float = 300.0) -> Probe:
    """Measure the way to the coordinator with so many bytes each way, at most a GiB.

    The clocks are compared by the first small message each way on an open connection: the skew is
    known to half of ``round_trip_s``.

    Raises:
        UnreachableError: if it is not done within ``budget_s``.
        NotAdmittedError: if the coordinator does not let this site in.
    """
    until = time.monotonic() + min(budget_s, MAX_CALL_S)
    for asked in (ProbeRequest(), ProbeRequest(up_bytes=up_bytes, down_bytes=down_bytes)):
        found = _insist(lambda left_s: _probe(link, asked, left_s), link.address, until=until)  # noqa: B023
    return found


def _probe(link: Link, asked: ProbeRequest, timeout_s: float) -> Probe:
    """Send a probe once; its pieces follow when the first answer has come."""
    answered = threading.Event()

    def messages() -> Iterator[bytes]:
        yield canonical(asked)
        if answered.wait(timeout_s):
            yield from pieces(asked.up_bytes)

    started_at, start = datetime.now(UTC), time.monotonic()
    stream = link.channel.stream_stream(f"/{CONTROL}/Probe")(messages(), timeout=timeout_s)
    try:
        first = _parse(next(stream), ProbeAnswer)
        round_trip_s = time.monotonic() - start
        answered.set()
        sending = time.monotonic()
        last = _parse(next(stream), ProbeAnswer)
        seconds_up = time.monotonic() - sending
        got = sum(len(piece) for piece in stream)
        seconds_down = time.monotonic() - sending - seconds_up
    except StopIteration:
        raise UnreachableError("the coordinator ended the probe too soon; try again") from None
    finally:
        answered.set()
        stream.cancel()
    if (last.received_bytes, got) != (asked.up_bytes, asked.down_bytes):
        raise UnreachableError("the probe's bytes did not all arrive; try again")
    skew_s = (first.when - started_at).total_seconds() - round_trip_s / 2
    return Probe(seconds_up, seconds_down, skew_s, round_trip_s)


def _call(
    channel: grpc.Channel,
    address: str,
    method: str,
    message: Contract,
    *,
    answer: type[AnyContract],
    budget_s: float,
) -> AnyContract:
    ask, content = channel.unary_unary(method), canonical(message)
    until = time.monotonic() + min(budget_s, MAX_CALL_S)

    def once(left_s: float) -> bytes:
        return bytes(ask(content, timeout=min(left_s, CALL_S)))

    return _parse(_insist(once, address, until=until), answer)


def _insist(ask: Callable[[float], Result], address: str, *, until: float) -> Result:
    """Repeat ``ask``, which gets the seconds left, until it is answered, refused, or too late."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return ask(max(until - time.monotonic(), LEAST_CALL_S))
        except grpc.RpcError as error:
            code, trouble = error.code(), _trouble(error.code(), error.details() or "", address)
        this_s = pause_s * random.uniform(0.5, 1.0)
        is_vain = code not in RETRIED or not isinstance(trouble, UnreachableError)
        if is_vain or time.monotonic() + this_s > until:
            raise trouble
        log.debug("%s; trying again", trouble)
        time.sleep(this_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _trouble(code: StatusCode, details: str, address: str) -> ConsiliaError:
    """Return what went wrong in a call, for people: its cause and its cure."""
    kind, sentence = REFUSALS.get(code, FAILED)
    if code == StatusCode.UNAVAILABLE:
        found = (known[1:] for known in TROUBLES if any(sign in details for sign in known[0]))
        kind, sentence = next(found, SILENT)
    if code == StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        kind, sentence = TOO_LARGE
    return kind(sentence.format(address=address))


def _parse(content: bytes, contract: type[AnyContract]) -> AnyContract:
    try:
        return parse(content, contract)
    except DocumentError:
        raise DocumentError(
            "the coordinator's answer cannot be read; is its software newer than this one?"
        ) from None


def _channel(address: str, credentials: grpc.ChannelCredentials) -> grpc.Channel:
    options = (
        ("grpc.max_receive_message_length", MAX_BULLETIN_BYTES),
        ("grpc.max_send_message_length", MAX_VISIT_BYTES),
        *KEEPALIVE,
        *_proxy(address),
    )
    return grpc.secure_channel(address, credentials, options=options)


def _proxy(address: str) -> tuple[tuple[str, int | str], ...]:
    """Return what tells gRPC to use the proxy this machine's environment names for ``address``."""
    host = address.rpartition(":")[0].strip("[]")
    proxy = getproxies_environment().get("https")
    if not proxy or _is_loopback(host) or proxy_bypass_environment(host):
        return (("grpc.enable_http_proxy", 0),)
    return (("grpc.http_proxy", proxy if "://" in proxy else f"http://{proxy}"),)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _check_dates(file: Path) -> None:
    found, now = certificate.read(file), datetime.now(UTC)
    if now > found.not_valid_after_utc:
        raise NotAdmittedError(
            f"this site's certificate expired on {found.not_valid_after_utc:%Y-%m-%d}; ask the "
            "coordinator to revoke the site and invite it anew"
        )
    if now < found.not_valid_before_utc:
        raise NotAdmittedError(
            "this site's certificate is not valid yet; is this machine's clock right?"
        )


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DocumentError(f"cannot read {file}: {type(error).__name__}") from None

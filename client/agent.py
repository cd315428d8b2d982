"""A door: the site's agent on the Fleet API of a stock SuperLink, over TLS, by an enrolled key.

The agent only ever calls out: it listens on no port and never fetches the app bundle the
coordinator submitted. What it runs is the app installed here (``client/app.py``), one order at a
time; the work is done by a process that is started beforehand (``client/supervisor.py``).

Guarantees:
    The app bundle is never pulled, unpacked or imported.
    An order of a run whose bundle is not the known one is refused, and nothing of it is fetched.
    The work for a run that has ended is ended within seconds.
    A reply is pushed again until the SuperLink has all of it, its order expires or the run ends.
    No answer of the SuperLink ends the agent; only ``stop`` does.
    Once it is to stop, the work in hand is ended within seconds; its order can be given again.

Design: all use of Flower's private modules in a hospital is in this file, and
``tests/client/test_agent.py`` fails when a new Flower renames one. Flower's own connection loop is
not used because it ends the process on a 401; nor is its version interceptor, because it does so
when the peer says that the versions differ.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.app import Answer, Refuse, make_app, refusal_reply
from shared_models.envelope import BUNDLE_DIGEST, Parcel, pause_s
from shared_models.errors import DocumentError
from shared_models.signing import write_secret
from shared_models.weights import return_what_is_freed

HEARTBEAT_S = 10  # the SuperLink counts a site as gone after twice this
MAX_DELAY_S = 5.0
TIMEOUT_S = 30.0
BREAK_S = 0.2
LINGER_S = 1.0  # the SuperLink drops the replies of a node that leaves before they are claimed
MAX_ORDER_BYTES = 4 * 2**30

UNSEATED = (401, 404)  # the SuperLink no longer knows this node
FINISHED = 403  # the run has ended: nobody waits for the reply
NOT_ADMITTED = 412
NO_HEARTBEAT = 400  # the key is enrolled; the heartbeat is refused

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class FleetLink(NamedTuple):
    """Where the coordinator is, how to recognise it, this site's key, and the bundle it knows."""

    address: str
    root_certificates: Path
    node_key: Path
    bundle: str = BUNDLE_DIGEST


class _IncompleteError(Exception):
    """An object that is not there yet, or that the SuperLink would not store."""


RETRIED = (httpx.HTTPError, ValueError)


def create_node_key(file: Path) -> str:
    """Make this site's EC P-384 key in ``file`` and return its public line, to be enrolled.

    Raises:
        FileExistsError: if ``file`` exists; keys are never overwritten.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    write_secret(file, private)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return public.decode()


def run(
    link: FleetLink,
    answer: Answer,
    *,
    stop: threading.Event,
    refuse: Refuse | None = None,
    cancel: Callable[[], None] = lambda: None,
    folder: Path | None = None,
) -> None:
    """Answer the coordinator's orders until ``stop`` is set.

    When ``stop`` is set, the work for an order is broken off and nothing is said to it: the
    coordinator gives the order again to who comes back. A reply that is there is pushed once.

    Args:
        link: to the coordinator.
        answer: gives the reply to a letter.
        stop: ends the agent.
        refuse: gives the refusal of what is not to be read; without it, that is an error reply.
        cancel: is called, more than once, when nobody waits any more for what ``answer`` does.
        folder: for the weights of an order while it is answered, in a file without a name.

    Raises:
        DocumentError: if the key or the certificates cannot be read.
    """
    return_what_is_freed()
    with _connected(link) as (client, public_key):
        seat = _Seat(
            client, public_key, stop=stop, bundle=link.bundle, cancel=cancel, folder=folder
        )
        ended = threading.Event()
        heart = threading.Thread(target=seat.beat, args=(ended,), daemon=True, name="heartbeat")
        breaker = threading.Thread(target=seat.break_off, args=(ended,), daemon=True, name="stop")
        heart.start()
        breaker.start()
        try:
            _serve(seat, answer, refuse)
        finally:
            ended.set()
            heart.join()
            breaker.join()
            seat.leave()


class Knock(NamedTuple):
    """What the SuperLink said to a knock: its status, whether it knows this site's key, and when.

    ``date`` is its own time as it states it, if it does; ``at`` this machine's, then.
    """

    status: int
    is_enrolled: bool
    date: str | None
    at: float
    round_trip_s: float


def knock(link: FleetLink) -> Knock:
    """Ask the SuperLink whether it knows this site's key, and take no seat there.

    Design: a node that asks to be activated with a heartbeat no node may have is refused in one way
    if its key is enrolled, and in another if not; neither changes anything.

    Raises:
        DocumentError: if the key or the certificates cannot be read.
        httpx.HTTPError: if it cannot be reached.
    """
    with _connected(link) as (client, public_key):
        request = ActivateNodeRequest(public_key=public_key, heartbeat_interval=-1.0)
        for _ in range(2):  # the second on an open connection, so that its time is the way's alone
            answer = httpx.Response(httpx.codes.OK)  # which no SuperLink would say to that
            start, begun = time.time(), time.monotonic()
            try:
                client.ActivateNode(request)
            except httpx.HTTPStatusError as error:
                answer = error.response
            except ValueError as error:
                log.debug("an answer of another kind: %s", type(error).__name__)
            seconds = time.monotonic() - begun
    status = answer.status_code
    is_enrolled = status == NO_HEARTBEAT and b"heartbeat" in answer.content.lower()
    return Knock(status, is_enrolled, answer.headers.get("date"), start + seconds / 2, seconds)


class _Seat:
    """This site's place at the SuperLink: ``node`` is None until it is activated."""

    def __init__(
        self,
        client: FleetHttpClient,
        public_key: bytes,
        *,
        stop: threading.Event,
        bundle: str = BUNDLE_DIGEST,
        cancel: Callable[[], None] = lambda: None,
        folder: Path | None = None,
    ) -> None:
        self.client = client
        self.folder = folder
        self.public_key = public_key
        self.stop = stop
        self.bundle = bundle
        self.cancel = cancel
        self.node: Node | None = None
        self.working_for: int | None = None
        self.is_broken_off = False
        self.bundles: dict[int, str] = {}
        self.delivered_at = float("-inf")

    def activate(self) -> Node:
        """Return this site's node, activated if need be."""
        if self.node is None:
            request = ActivateNodeRequest(
                public_key=self.public_key, heartbeat_interval=HEARTBEAT_S
            )
            self.node = Node(node_id=self.client.ActivateNode(request).node_id)
            log.info("connected to the coordinator as node %d", self.node.node_id)
        return self.node

    def insist(self, call: Callable[[Node], Result], *, until: float) -> Result | None:
        """Repeat ``call`` until it succeeds; None once the run has ended, at ``until`` or on stop.

        ``until`` is by the monotonic clock: setting the machine's clock changes no wait.
        ``call`` is made at least once, and must continue where it was interrupted.
        """
        began, delay_s, level = time.monotonic(), 0.25, logging.WARNING
        while True:
            try:
                return call(self.activate())
            except _IncompleteError:  # soon there: the other end is still uploading
                wait_s = pause_s(time.monotonic() - began)
            except RETRIED as error:
                status = _status(error)
                if status == FINISHED and self.node is not None:
                    log.info("the run has ended; what belongs to it is dropped")
                    return None
                if status in UNSEATED:
                    self.node = None
                log.log(level, "%s (%s); trying again", _trouble(status), type(error).__name__)
                wait_s, level = delay_s, logging.DEBUG
                delay_s = min(2 * delay_s, MAX_DELAY_S)
            if self.stop.wait(wait_s) or time.monotonic() > until:
                return None

    def beat(self, ended: threading.Event) -> None:
        """Tell the SuperLink that this site is there, and watch its run, until ``ended``."""
        while not ended.wait(HEARTBEAT_S / 4):
            if (node := self.node) is None:
                continue
            try:
                self.client.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_S)
                )
                self._check_that_somebody_waits(node)
            except RETRIED as error:
                log.debug("a heartbeat was lost: %s", type(error).__name__)

    def break_off(self, ended: threading.Event) -> None:
        """Once it is to stop, end the work for the order in hand, each of its steps anew."""
        while not ended.wait(BREAK_S):
            if self.stop.is_set() and self.working_for is not None:
                self.is_broken_off = True
                self.cancel()

    def _check_that_somebody_waits(self, node: Node) -> None:
        if (run_id := self.working_for) is None:
            return
        try:
            self.client.GetRun(GetRunRequest(node=node, run_id=run_id))
        except httpx.HTTPStatusError as error:
            if _status(error) == FINISHED and self.working_for == run_id:
                log.info("the run has ended; its work is ended")
                self.cancel()

    def knows_bundle_of(self, run_id: int, *, until: float) -> bool | None:
        """Tell whether the run's app bundle is the known one; None once the run has ended."""
        if run_id not in self.bundles:
            found = self.insist(_bundle_of(self.client, run_id), until=until)
            if found is None:
                return None
            self.bundles[run_id] = found
        return self.bundles[run_id] == self.bundle

    def leave(self) -> None:
        """Tell the SuperLink, if it still listens, that this site is gone."""
        time.sleep(max(self.delivered_at + LINGER_S - time.monotonic(), 0.0))
        if self.node is not None:
            try:
                self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
            except RETRIED as error:
                log.debug("could not say goodbye: %s", type(error).__name__)


def _serve(seat: _Seat, answer: Answer, refuse: Refuse | None = None) -> None:
    app = make_app(answer, refuse)
    while not seat.stop.is_set():
        received = seat.insist(_receive(seat.client), until=float("inf"))
        if received:
            order, tree = received[0]
            _obey(seat, app, refuse, order=order, tree=tree)
        else:
            seat.stop.wait(pause_s(time.monotonic() - seat.delivered_at))


def _obey(
    seat: _Seat, app: ClientApp, refuse: Refuse | None, *, order: Message, tree: ObjectTree
) -> None:
    start = time.monotonic()
    until = start + order.metadata.created_at + order.metadata.ttl - time.time()
    reply = _reply(seat, app, refuse, order=order, tree=tree, until=until)
    if reply is None:
        return
    push = _upload(seat.client, reply, seconds=time.monotonic() - start)
    if seat.insist(push, until=until) is None:
        log.warning("a reply could not be delivered")
    seat.delivered_at = time.monotonic()


def _reply(
    seat: _Seat,
    app: ClientApp,
    refuse: Refuse | None,
    *,
    order: Message,
    tree: ObjectTree,
    until: float,
) -> Message | None:
    """Return the reply to an order, or None if nobody waits for it."""
    run_id = order.metadata.run_id
    is_known = seat.knows_bundle_of(run_id, until=until)
    if is_known is None:
        return None
    if not is_known:
        return refusal_reply(order, refuse, why="the bundle of its run is not the known one")
    try:
        fetch = _download(seat.client, order, tree=tree, folder=seat.folder)
        content = seat.insist(fetch, until=until)
        if content is None:
            return None
        order.content = content
        seat.working_for = run_id
        context = Context(run_id, order.metadata.dst_node_id, {}, RecordDict(), {})
        reply = app(order, context)
        if not seat.is_broken_off:
            return reply
        log.info("stopped amid an order; once this site is back, it can be given again")
        return None
    except Exception as error:  # a malformed order must not end the agent
        return refusal_reply(order, refuse, why=f"it could not be read: {type(error).__name__}")
    finally:
        seat.working_for = None


def _bundle_of(client: FleetHttpClient, run_id: int) -> Callable[[Node], str]:
    """Return a call that asks for the digest of a run's app bundle."""

    def call(node: Node) -> str:
        found: str = client.GetRun(GetRunRequest(node=node, run_id=run_id)).run.fab_hash
        return found

    return call


def _receive(client: FleetHttpClient) -> Callable[[Node], list[tuple[Message, ObjectTree]]]:
    """Return a call that asks for the next order, if there is one; its content is still empty."""

    def call(node: Node) -> list[tuple[Message, ObjectTree]]:
        response = client.PullMessages(PullMessagesRequest(node=node))
        orders = map(message_from_proto, response.messages_list)
        return list(zip(orders, response.message_object_trees, strict=True))

    return call


def _download(
    client: FleetHttpClient, order: Message, *, tree: ObjectTree, folder: Path | None = None
) -> Callable[[Node], RecordDict]:
    """Return a call that fetches an order's content, keeping what an earlier try fetched."""
    run_id = order.metadata.run_id
    parcel = Parcel(tree, most_bytes=MAX_ORDER_BYTES, folder=folder)

    def call(node: Node) -> RecordDict:
        for object_id in parcel.wanted:
            if object_id in parcel:
                continue
            response = client.PullObject(
                PullObjectRequest(node=node, run_id=run_id, object_id=object_id)
            )
            if not response.object_found:
                raise DocumentError("a part of the order is missing")
            if not response.object_available:
                raise _IncompleteError
            parcel.add(object_id, response.object_content)
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=node, run_id=run_id, message_object_id=tree.object_id
            )
        )
        return parcel.message().content

    return call


def _upload(client: FleetHttpClient, reply: Message, *, seconds: float) -> Callable[[Node], bool]:
    """Return a call that pushes a reply, going on in the same session after an interruption.

    A second announcement would not do: once the coordinator has seen the first, the SuperLink has
    forgotten the order and asks for nothing more. Only after a refusal is the reply announced anew.
    """
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        tree = get_object_tree(reply)
        objects = get_all_nested_objects(reply)
    envelope = message_to_proto(remove_content_from_message(reply))
    run_id = reply.metadata.run_id
    session_id, pending, is_refused = "", list[str](), True

    def call(node: Node) -> bool:
        nonlocal session_id, pending, is_refused
        if is_refused:
            response = client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[envelope],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[seconds],
                )
            )
            missing = set(response.objects_to_push)
            session_id = response.session_id
            pending = [object_id for object_id in objects if object_id in missing]
            is_refused = False
        while pending:
            request = PushObjectRequest(
                node=node,
                run_id=run_id,
                session_id=session_id,
                object_id=pending[0],
                object_content=objects[pending[0]].deflate(),
            )
            # refused is also what arrived before, but whose acknowledgement was lost
            is_refused |= not client.PushObject(request).stored
            pending.pop(0)
        if is_refused:
            raise _IncompleteError
        return True

    return call


@contextmanager
def _connected(link: FleetLink) -> Iterator[tuple[FleetHttpClient, bytes]]:
    key = _load_node_key(link.node_key)
    try:
        certificates = link.root_certificates.read_bytes()
        tls = ssl.create_default_context(cadata=certificates.decode("ascii"))
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot read the certificates {link.root_certificates}") from error
    with FleetHttpClient.from_server_address(
        link.address,
        insecure=False,
        root_certificates=certificates,
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    ) as client:
        if _is_loopback(link.address):  # never by way of a proxy set for the world outside
            client._client.close()
            client._client = httpx.Client(verify=tls, timeout=TIMEOUT_S, trust_env=False)
        yield client, public_key_to_bytes(key.public_key())


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _load_node_key(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise DocumentError(f"cannot read the node key {file}: {type(error).__name__}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DocumentError(f"expected an EC key in {file}, got another kind")
    return key


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None


def _trouble(status: int | None) -> str:
    if status is None:
        return "the coordinator does not answer"
    if status in UNSEATED:
        return "the coordinator no longer knows this site, or this machine's clock is off"
    if status == NOT_ADMITTED:
        return "not admitted: this site's key is not enrolled, or its last session has not expired"
    return f"the coordinator answers {status}"

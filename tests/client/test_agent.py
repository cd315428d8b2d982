from __future__ import annotations

import inspect
import logging
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse, Run
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from hypothesis import given, settings
from hypothesis import strategies as st

from client import agent
from client.app import FAILED, make_app
from shared_models.envelope import (
    BUNDLE_DIGEST,
    INLINE_BYTES,
    letter_from,
    pause_s,
    record_from,
)
from shared_models.errors import DocumentError
from shared_models.wire import Letter

letters = st.builds(
    Letter,
    st.text(),
    st.text(),
    st.text(),
    st.text(),
    st.lists(st.binary(), max_size=12).map(tuple),
)
ORDER = Letter("order", "{}", "k", "s", (b"abcd" * 100, b"efgh"))


def travelled(record: RecordDict) -> RecordDict:
    """Take a record through the bytes that Flower sends."""
    contents = {key: value.deflate() for key, value in get_all_nested_objects(record).items()}
    arrived = inflate_object_from_contents(record.object_id, contents)
    assert isinstance(arrived, RecordDict)
    return arrived


def order_of(content: RecordDict, *, message_type: str = "train") -> Message:
    metadata = Metadata(
        run_id=3,
        message_id="",
        src_node_id=1,
        dst_node_id=7,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=30.0,
        message_type=message_type,
    )
    metadata.delivered_at = ""
    message = make_message(metadata, content)
    metadata.__dict__["_message_id"] = message.object_id
    return message


@settings(deadline=None, derandomize=True)
@given(letters)
def test_a_letter_survives_the_journey(letter: Letter) -> None:
    assert letter_from(travelled(record_from(letter))) == letter


@pytest.mark.parametrize(("more", "num_objects"), [(0, 2), (1, 7)])
def test_small_weights_travel_beside_the_texts_and_large_ones_apart(
    more: int, num_objects: int
) -> None:
    letter = ORDER._replace(buckets=(bytes(INLINE_BYTES), b"a" * more)[: 1 + more])
    record = record_from(letter)
    assert letter_from(travelled(record)) == letter
    assert ("weights" in record) == bool(more)
    assert len(get_all_nested_objects(record)) == num_objects


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_what_is_waited_for_is_asked_about_soon_and_then_seldom(waited: float, more: float) -> None:
    assert 0.03 <= pause_s(waited) <= pause_s(waited + more) <= 0.5
    assert pause_s(waited) <= max(0.03, waited / 10)


def raw(data: bytes = b"1234", **changed: Any) -> Array:
    return Array(**({"dtype": "uint8", "shape": (4,), "stype": "raw", "data": data} | changed))


FIELDS = {"kind": "order", "document": "{}", "key": "k", "signature": "s"}
FOREIGN = {
    "nothing": {},
    "no letter": {"weights": ArrayRecord({"0000": raw()})},
    "another record": {"letter": ConfigRecord(FIELDS), "more": ConfigRecord({})},
    "another kind": {"letter": ArrayRecord({"0000": raw()})},
    "a field missing": {"letter": ConfigRecord({"kind": "order"})},
    "a field more": {"letter": ConfigRecord(FIELDS | {"note": "x"})},
    "a number": {"letter": ConfigRecord(FIELDS | {"key": 1})},
    "no weights": {"letter": ConfigRecord(FIELDS), "weights": ArrayRecord()},
    "no arrays": {"letter": ConfigRecord(FIELDS), "weights": ConfigRecord({"0000": b""})},
    "weights that are text": {"letter": ConfigRecord(FIELDS | {"weights": ["abcd"]})},
    "weights that are no list": {"letter": ConfigRecord(FIELDS | {"weights": b"abcd"})},
    "no weights beside the texts": {"letter": ConfigRecord(FIELDS | {"weights": list[bytes]()})},
    "too many weights beside the texts": {
        "letter": ConfigRecord(FIELDS | {"weights": [bytes(INLINE_BYTES), b"a"]})
    },
    "weights in two places": {
        "letter": ConfigRecord(FIELDS | {"weights": [b"abcd"]}),
        "weights": ArrayRecord({"0000": raw()}),
    },
    "a gap": {"letter": ConfigRecord(FIELDS), "weights": ArrayRecord({"0001": raw()})},
    "numpy": {
        "letter": ConfigRecord(FIELDS),
        "weights": ArrayRecord({"0000": raw(stype="numpy.ndarray")}),
    },
    "floats": {
        "letter": ConfigRecord(FIELDS),
        "weights": ArrayRecord({"0000": raw(dtype="float32")}),
    },
    "a wrong length": {
        "letter": ConfigRecord(FIELDS),
        "weights": ArrayRecord({"0000": raw(shape=(5,))}),
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_record_that_is_not_exactly_a_letter_is_refused(name: str) -> None:
    with pytest.raises(DocumentError):
        letter_from(RecordDict(FOREIGN[name]))


def test_a_reply_to_a_failed_order_carries_no_text_of_the_exception(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(letter: Letter) -> Letter:
        raise ValueError("planted secret")

    context = Context(3, 7, {}, RecordDict(), {})
    with caplog.at_level(logging.INFO):
        reply = make_app(answer)(order_of(record_from(ORDER)), context)
    assert reply.has_error()
    assert reply.error.code == FAILED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "planted" not in f"{reply.error.reason}{caplog.text}"


def status_error(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://coordinator")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status))


class Fleet:
    """A SuperLink with one order, which fails a method as often as ``troubles`` says."""

    def __init__(
        self,
        order: Message,
        troubles: dict[str, list[Exception]] | None = None,
        *,
        bundle: str = BUNDLE_DIGEST,
    ) -> None:
        self.order, self.troubles, self.bundle = order, troubles or {}, bundle
        self.stop = threading.Event()
        self.objects = {
            key: value.deflate() for key, value in get_all_nested_objects(order).items()
        }
        self.calls: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.is_delivered = False
        self.reply: Message | None = None

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if self.troubles.get(method):
            raise self.troubles[method].pop(0)

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:  # noqa: N802
        self._called("ActivateNode")
        return ActivateNodeResponse(node_id=7)

    def PullMessages(self, request: PullMessagesRequest) -> PullMessagesResponse:  # noqa: N802
        self._called("PullMessages")
        if self.is_delivered:
            self.stop.set()
            return PullMessagesResponse()
        self.is_delivered = True
        return PullMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(self.order))],
            message_object_trees=[get_object_tree(self.order)],
        )

    def GetRun(self, request: GetRunRequest) -> GetRunResponse:  # noqa: N802
        self._called("GetRun")
        return GetRunResponse(run=Run(run_id=request.run_id, fab_hash=self.bundle))

    def SendNodeHeartbeat(self, request: SendNodeHeartbeatRequest) -> None:  # noqa: N802
        self._called("SendNodeHeartbeat")

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        self._called("PullObject")
        content = self.objects[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(  # noqa: N802
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        self._called("ConfirmMessageReceived")
        return ConfirmMessageReceivedResponse()

    def PushMessages(self, request: PushMessagesRequest) -> PushMessagesResponse:  # noqa: N802
        self._called("PushMessages")
        self.reply = message_from_proto(request.messages_list[0])
        todo, missing = list(request.message_object_trees), []
        while todo:
            tree = todo.pop()
            todo += tree.children
            missing += [tree.object_id] if tree.object_id not in self.stored else []
        return PushMessagesResponse(objects_to_push=missing, session_id="session")

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:  # noqa: N802
        is_new = request.object_id not in self.stored
        self.stored[request.object_id] = request.object_content
        self._called("PushObject")  # a trouble here is an acknowledgement that was lost
        return PushObjectResponse(stored=is_new)


def echo(letter: Letter) -> Letter:
    return letter._replace(kind="reply")


def served(
    fleet: Fleet, answer: Callable[[Letter], Letter] = echo, refuse: Any = None
) -> Message | None:
    """Serve ``fleet``'s one order and return the reply as it arrived there."""
    seat = agent._Seat(fleet, b"key", stop=fleet.stop)  # type: ignore[arg-type]
    agent._serve(seat, answer, refuse)
    if fleet.reply is None:
        return None
    arrived = inflate_object_from_contents(fleet.reply.metadata.message_id, dict(fleet.stored))
    assert isinstance(arrived, Message)
    return arrived


TROUBLES = {
    "none": {},
    "not admitted at once": {"ActivateNode": [status_error(412)]},
    "gone before the run is known": {"GetRun": [httpx.ConnectError(""), status_error(404)]},
    "gone while the order is fetched": {"PullObject": [httpx.ConnectError("")]},
    "forgotten while the order is fetched": {"PullObject": [status_error(401)]},
    "gone before the push": {"PushMessages": [httpx.ConnectError(""), status_error(503)]},
    "forgotten before the push": {"PushMessages": [status_error(404)]},
    "acknowledgement lost": {"PushObject": [httpx.ReadTimeout("")]},
    "a portal that answers rubbish": {"PullMessages": [ValueError("Invalid protobuf")]},
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_reply_is_pushed_until_the_superlink_has_all_of_it(name: str) -> None:
    troubles = {method: list(errors) for method, errors in TROUBLES[name].items()}
    reply = served(Fleet(order_of(record_from(ORDER)), troubles))
    assert reply is not None
    assert letter_from(reply.content) == ORDER._replace(kind="reply")


def test_nothing_is_pushed_to_a_run_that_has_ended() -> None:
    fleet = Fleet(order_of(record_from(ORDER)), {"PullObject": [status_error(403)]})
    assert served(fleet) is None
    assert "PushMessages" not in fleet.calls


REFUSAL = Letter("refusal", "{}", "k", "s")


def refusing(reasons: list[str]) -> Callable[[str], Letter]:
    return lambda why: reasons.append(why) or REFUSAL


def test_an_order_of_a_run_of_another_bundle_is_refused_and_nothing_of_it_is_fetched() -> None:
    fleet, given_, reasons = Fleet(order_of(record_from(ORDER)), bundle="ab" * 32), [], []
    reply = served(fleet, lambda letter: given_.append(letter) or letter, refusing(reasons))
    assert reply is not None
    assert letter_from(reply.content) == REFUSAL
    assert reasons == ["the bundle of its run is not the known one"]
    assert given_ == []
    assert "PullObject" not in fleet.calls


def test_an_order_of_a_run_that_ended_before_its_bundle_was_known_is_dropped() -> None:
    fleet = Fleet(order_of(record_from(ORDER)), {"GetRun": [status_error(403)]})
    assert served(fleet) is None
    assert not {"PullObject", "PushMessages"} & set(fleet.calls)


@pytest.mark.parametrize(
    ("content", "message_type"),
    [(RecordDict(), "train"), (RecordDict(), "query.anything"), (record_from(ORDER), "evaluate")],
)
def test_an_order_that_cannot_be_read_is_refused_where_somebody_refuses(
    content: RecordDict, message_type: str
) -> None:
    reasons: list[str] = []
    reply = served(Fleet(order_of(content, message_type=message_type)), echo, refusing(reasons))
    assert reply is not None
    assert letter_from(reply.content) == REFUSAL
    assert len(reasons) == 1


def test_an_order_too_large_is_refused_where_somebody_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent, "MAX_ORDER_BYTES", 100)
    reasons: list[str] = []
    reply = served(Fleet(order_of(record_from(ORDER))), echo, refusing(reasons))
    assert reply is not None
    assert letter_from(reply.content) == REFUSAL
    assert reasons == ["it could not be read: DocumentError"]


@pytest.mark.parametrize("status", [403, 503])
def test_the_work_for_a_run_that_has_ended_is_ended_within_seconds(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "HEARTBEAT_S", 0.04)
    fleet, cancelled, ended = Fleet(order_of(record_from(ORDER))), threading.Event(), []
    seat = agent._Seat(
        fleet,  # type: ignore[arg-type]
        b"key",
        stop=fleet.stop,
        cancel=cancelled.set,
    )
    end = threading.Event()
    heart = threading.Thread(target=seat.beat, args=(end,))

    def work(letter: Letter) -> Letter:
        fleet.troubles["GetRun"] = [status_error(status)]
        ended.append(cancelled.wait(10 if status == 403 else 0.5))
        return letter

    heart.start()
    agent._serve(seat, work)
    end.set()
    heart.join()
    assert ended == [status == 403]


def test_once_it_is_to_stop_the_work_is_ended_and_its_order_can_be_given_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent, "BREAK_S", 0.01)
    fleet, cancelled, ended = Fleet(order_of(record_from(ORDER))), threading.Semaphore(0), []
    seat = agent._Seat(
        fleet,  # type: ignore[arg-type]
        b"key",
        stop=fleet.stop,
        cancel=cancelled.release,
    )
    end = threading.Event()
    breaker = threading.Thread(target=seat.break_off, args=(end,))

    def work(letter: Letter) -> Letter:
        assert not cancelled.acquire(timeout=0.1), "nobody asked for it to stop"
        fleet.stop.set()
        ended.extend(cancelled.acquire(timeout=10) for _ in ("one step", "the next"))
        return REFUSAL

    breaker.start()
    agent._serve(seat, work)
    end.set()
    breaker.join()
    assert ended == [True, True]
    assert "PushMessages" not in fleet.calls, "a refusal would be the round's last word"


def test_a_clock_that_is_set_changes_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    troubles: dict[str, list[Exception]] = {"PushMessages": [status_error(503)]}
    fleet = Fleet(order_of(record_from(ORDER)), troubles)
    real = time.time

    def answer(letter: Letter) -> Letter:
        monkeypatch.setattr(time, "time", lambda: real() + 1e6)
        return echo(letter)

    assert served(fleet, answer) is not None


@pytest.mark.parametrize("message_type", ["train", "evaluate", "query.anything"])
def test_an_order_that_cannot_be_read_is_answered_with_an_error(message_type: str) -> None:
    reply = served(Fleet(order_of(RecordDict(), message_type=message_type)))
    assert reply is not None
    assert reply.error.reason == "the site could not answer"


def test_a_part_that_is_no_flower_object_does_not_end_the_agent() -> None:
    fleet = Fleet(order_of(record_from(ORDER)))
    fleet.objects = dict.fromkeys(fleet.objects, b"rubbish")
    reply = served(fleet)
    assert reply is not None
    assert reply.has_error()


def test_an_order_too_large_is_answered_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MAX_ORDER_BYTES", 100)
    reply = served(Fleet(order_of(record_from(ORDER))))
    assert reply is not None
    assert reply.has_error()


def test_the_app_bundle_is_never_pulled() -> None:
    fleet = Fleet(order_of(record_from(ORDER)))
    served(fleet)
    assert set(fleet.calls) == {
        "ActivateNode",
        "PullMessages",
        "GetRun",
        "PullObject",
        "ConfirmMessageReceived",
        "PushMessages",
        "PushObject",
    }
    assert "GetFab" not in Path(agent.__file__).read_text()


def test_a_node_key_is_secret_and_never_overwritten(tmp_path: Path) -> None:
    line = agent.create_node_key(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    private = agent._load_node_key(tmp_path / "key")
    public = serialization.load_ssh_public_key(line.encode())
    assert private.public_key() == public
    assert line.startswith("ecdsa-sha2-nistp384 ")
    with pytest.raises(FileExistsError):
        agent.create_node_key(tmp_path / "key")


def test_keys_and_certificates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    link = agent.FleetLink("127.0.0.1:1", tmp_path / "ca.crt", tmp_path / "key")
    with pytest.raises(DocumentError, match="node key"):
        agent.run(link, lambda letter: letter, stop=threading.Event())
    agent.create_node_key(link.node_key)
    link.root_certificates.write_text("nothing")
    with pytest.raises(DocumentError, match="certificates"):
        agent.run(link, lambda letter: letter, stop=threading.Event())


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [
        ("127.0.0.1:8000", True),
        ("localhost:8000", True),
        ("[::1]:8000", True),
        ("10.0.0.1:8000", False),
        ("consortium.example.org:443", False),
    ],
)
def test_only_loopback_is_kept_from_the_proxy(address: str, is_loopback: bool) -> None:
    assert agent._is_loopback(address) == is_loopback


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            ProtobufClient.from_server_address,
            ["server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"],
        ),
        (NodeAuthHttpInterceptor, ["private_key", "public_key"]),
        *[
            (getattr(FleetHttpClient, name), ["self", "request"])
            for name in (
                "ActivateNode",
                "DeactivateNode",
                "SendNodeHeartbeat",
                "PullMessages",
                "GetRun",
                "PullObject",
                "ConfirmMessageReceived",
                "PushMessages",
                "PushObject",
            )
        ],
        (get_object_tree, ["obj"]),
        (get_all_nested_objects, ["obj"]),
        (remove_content_from_message, ["message"]),
        (message_to_proto, ["message"]),
        (message_from_proto, ["message_proto"]),
    ],
)
def test_flower_still_has_what_the_agent_uses(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("request_type", "fields"),
    [
        (ActivateNodeRequest, {"public_key", "heartbeat_interval"}),
        (DeactivateNodeRequest, {"node_id"}),
        (SendNodeHeartbeatRequest, {"node", "heartbeat_interval"}),
        (PullMessagesRequest, {"node"}),
        (GetRunRequest, {"node", "run_id"}),
        (GetRunResponse, {"run"}),
        (Run, {"fab_hash"}),
        (PullObjectRequest, {"node", "run_id", "object_id"}),
        (ConfirmMessageReceivedRequest, {"node", "run_id", "message_object_id"}),
        (
            PushMessagesRequest,
            {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
        ),
        (PushObjectRequest, {"node", "run_id", "session_id", "object_id", "object_content"}),
    ],
)
def test_flower_still_asks_for_the_same_fields(request_type: Any, fields: set[str]) -> None:
    assert fields <= set(request_type.DESCRIPTOR.fields_by_name)


def test_flowers_client_can_still_be_kept_from_a_proxy() -> None:
    with FleetHttpClient("https://127.0.0.1:1", verify=False) as client:
        assert isinstance(client._client, httpx.Client)

"""How sites are asked, over a SuperLink made of dictionaries and Flower's own messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from server import app, link
from shared_models.envelope import letter_from, record_from
from shared_models.wire import Letter

Answer = Callable[[Letter], Letter | None]
LONG_S = 60.0


def letter(text: str, *, size: int = 0) -> Letter:
    return Letter("order", text, "k", "s", (b"x" * size,) if size else ())


def echo(order: Letter) -> Letter:
    return order._replace(kind="reply")


class Site:
    """A node: its key, whether it is there, what it answers, and what it was sent."""

    def __init__(self, node_id: int, answer: Answer = echo) -> None:
        public = ec.generate_private_key(ec.SECP384R1()).public_key()
        self.node_id, self.answer = node_id, answer
        self.key = public_key_to_bytes(public)
        self.line = app._line(self.key)
        self.activations = 1
        self.is_online = True
        self.heard: list[str] = []
        self.lasts_s = LONG_S

    def restart(self) -> None:
        self.activations += 1
        self.is_online = True

    @property
    def info(self) -> NodeInfo:
        return NodeInfo(
            node_id=self.node_id,
            public_key=self.key,
            online_until=time.time() + self.lasts_s,
            last_activated_at=f"activation {self.activations}",
        )


class Grid:
    """Flower's grid: delivers at once, and what is announced may still be uploading."""

    def __init__(self, *sites: Site) -> None:
        self.sites = {site.node_id: site for site in sites}
        self.node = Node(node_id=1)
        self.run = SimpleNamespace(run_id=7)
        self.replies: dict[str, Message] = {}
        self.objects: dict[str, bytes] = {}
        self.withheld: set[str] = set()
        self.asked: list[set[str]] = []
        self.pulled: list[str] = []
        self.confirmed = 0
        self.pushed: dict[str, list[str]] = {}
        self.contents: dict[str, bytes] = {}
        self._runtime_client = SimpleNamespace(
            PushMessages=self._push_messages,
            PushObject=self._push_object,
            PullMessages=self._pull_messages,
            PullObject=self._pull_object,
            ConfirmMessageReceived=self._confirm,
        )

    def get_nodes(self) -> list[NodeInfo]:
        return [site.info for site in self.sites.values() if site.is_online]

    def _push_messages(self, request: PushAppMessagesRequest) -> PushAppMessagesResponse:
        trees = request.message_object_trees
        self.pushed |= {
            tree.object_id: [p.object_id for p in iterate_object_tree(tree)] for tree in trees
        }
        wanted = dict.fromkeys(i for tree in trees for i in self.pushed[tree.object_id])
        ids = [tree.object_id for tree in trees]
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=wanted, session_id="s")

    def _push_object(self, request: PushObjectRequest) -> PushObjectResponse:
        self.contents[request.object_id] = request.object_content
        for message_id, parts in list(self.pushed.items()):
            if set(parts) <= self.contents.keys() and self.pushed.pop(message_id, None):
                contents = {part: self.contents[part] for part in parts}
                message = inflate_object_from_contents(message_id, contents)
                assert isinstance(message, Message)
                self._deliver(message)
        return PushObjectResponse(stored=True)

    def _deliver(self, message: Message) -> str:
        message.metadata.__dict__["_message_id"] = message.object_id
        site = self.sites[message.metadata.dst_node_id]
        order = letter_from(message.content)
        site.heard.append(order.document)
        said = site.answer(order)
        if said is not None:
            self.answer(message, said)
        return message.object_id

    def answer(self, message: Message, said: Letter) -> None:
        reply = Message(record_from(said), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.replies[message.object_id] = reply

    def _pull_messages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        self.asked.append(set(request.message_ids))
        found = [self.replies.pop(i) for i in request.message_ids if i in self.replies]
        trees = list[ObjectTree]()
        for reply in found:
            trees.append(get_object_tree(reply))
            parts = get_all_nested_objects(reply).items()
            self.objects |= {object_id: part.deflate() for object_id, part in parts}
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(r)) for r in found],
            message_object_trees=trees,
        )

    def _pull_object(self, request: PullObjectRequest) -> PullObjectResponse:
        self.pulled.append(request.object_id)
        content = self.objects.get(request.object_id)
        is_there = content is not None and request.object_id not in self.withheld
        return PullObjectResponse(
            object_found=content is not None,
            object_available=is_there,
            object_content=content if is_there and content else b"",
        )

    def _confirm(self, _: Any) -> None:
        self.confirmed += 1


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("ROLL_S", 0.0), ("POLL_S", 0.01), ("PULL_S", 0.1), ("LATE_S", 0.2)):
        monkeypatch.setattr(app, name, seconds)
    for name, number in (("_run_id", 7), ("_node_id", 1), ("_task_id", 3)):
        monkeypatch.setattr(TaskIdentity, name, number)  # whose messages those made here are


def asking(grid: Any, sites: dict[str, Site], **terms: Any) -> Any:
    roll = app.Roll(grid, {name: site.line for name, site in sites.items()})
    return app.ask_over(grid, roll=roll, **terms)


def heard(replies: Any) -> dict[str, str | None]:
    return {site: reply and reply.document for site, reply in replies}


@contextmanager
def meanwhile(grid: Any, event: Callable[[], None], *, after: int) -> Iterator[None]:
    """Let ``event`` happen at the grid's look number ``after`` at who is there."""
    real, looks = grid.get_nodes, iter(range(10**6))

    def get_nodes() -> list[NodeInfo]:
        if next(looks) == after:
            event()
        found: list[NodeInfo] = real()
        return found

    grid.get_nodes = get_nodes
    yield
    assert next(looks) > after, "it never happened"


def test_nodes_are_found_by_the_line_that_enrolled_them() -> None:
    site = Site(5)
    grid: Any = Grid(site)
    (line,) = app.nodes_by_key(grid)
    assert app.nodes_by_key(grid)[line].node_id == 5
    assert link._pem(line + " a comment") == site.key


def test_each_site_is_given_its_own_letter_and_its_reply_is_fetched() -> None:
    sites = {"north": Site(5), "south": Site(6)}
    grid: Any = Grid(*sites.values())
    ask = asking(grid, sites)
    replies = dict(ask({name: letter(f"to {name}", size=100) for name in sites}, LONG_S))
    assert {name: reply.buckets for name, reply in replies.items()} == dict.fromkeys(
        sites, (b"x" * 100,)
    )
    assert {name: site.heard for name, site in sites.items()} == {
        "north": ["to north"],
        "south": ["to south"],
    }
    assert grid.confirmed == 2


def test_a_site_that_left_and_came_back_is_given_its_order_again() -> None:
    """Flower delivers a message once, so what it had in hand when it was killed is lost."""
    answers: Iterator[Letter | None] = iter([None, letter("second try")])
    site = Site(5, lambda _: next(answers))
    grid: Any = Grid(site)
    with meanwhile(grid, site.restart, after=4):
        replies = heard(asking(grid, {"north": site})({"north": letter("train")}, LONG_S))
    assert site.heard == ["train", "train"]
    assert replies == {"north": "second try"}


def test_the_first_reply_counts_and_a_second_is_never_fetched() -> None:
    """The site was only off the net: it answers the order as given, and as given again."""
    orders: list[Message] = []
    site = Site(5, lambda _: None)
    grid: Any = Grid(site)
    real = grid._deliver

    def deliver(message: Message) -> str:
        orders.append(message)
        sent: str = real(message)
        if len(orders) == 2:
            for number, order in enumerate(orders):
                grid.answer(order, letter(f"answer {number}"))
        return sent

    grid._deliver = deliver
    with meanwhile(grid, site.restart, after=4):
        replies = heard(asking(grid, {"north": site})({"north": letter("train")}, LONG_S))
    assert replies["north"] in ("answer 0", "answer 1")
    assert grid.confirmed == 1


def test_a_site_that_keeps_coming_and_going_is_not_sent_its_order_without_end() -> None:
    site = Site(5, lambda _: None)
    grid: Any = Grid(site)
    real = grid.get_nodes

    def flapping() -> list[NodeInfo]:
        site.restart()
        found: list[NodeInfo] = real()
        return found

    grid.get_nodes = flapping
    assert heard(asking(grid, {"north": site})({"north": letter("train")}, 0.5)) == {"north": None}
    assert len(site.heard) == app.MOST_SENDS


def test_a_site_killed_amid_its_upload_is_given_its_order_again() -> None:
    answers = iter([letter("half", size=50), letter("whole", size=60)])
    site = Site(5, lambda _: next(answers))
    grid: Any = Grid(site)
    real = grid._pull_messages

    def withholding(request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        response = real(request)
        if len(site.heard) == 1:
            grid.withheld = set(grid.objects)
        return response

    grid._runtime_client.PullMessages = withholding
    with meanwhile(grid, site.restart, after=5):
        replies = heard(asking(grid, {"north": site})({"north": letter("train")}, LONG_S))
    assert replies == {"north": "whole"}
    assert site.heard == ["train", "train"]


def test_an_upload_that_is_slow_but_goes_on_is_waited_for_and_not_pulled_twice() -> None:
    site = Site(5, lambda _: letter("whole", size=50))
    grid: Any = Grid(site)
    sent, calls = list[str](), iter(range(10**6))

    def uploading(request: PullObjectRequest) -> PullObjectResponse:
        is_last = request.object_id == max(grid.objects)
        grid.withheld = {request.object_id} if is_last and next(calls) < 6 else set()
        response: PullObjectResponse = grid._pull_object(request)
        sent.extend([request.object_id] * response.object_available)
        return response

    grid._runtime_client.PullObject = uploading
    ask = asking(grid, {"north": site})
    assert heard(ask({"north": letter("train")}, LONG_S)) == {"north": "whole"}
    assert sorted(sent) == sorted(grid.objects)
    assert site.heard == ["train"]


def test_a_site_that_comes_late_is_asked_as_soon_as_it_is_there() -> None:
    sites = {"north": Site(5), "south": Site(6)}
    sites["north"].is_online = False
    grid: Any = Grid(*sites.values())
    with meanwhile(grid, sites["north"].restart, after=6):
        ask = asking(grid, sites, quorum=2, patience_s=0.0)
        replies = heard(ask({name: letter(name) for name in sites}, LONG_S))
    assert replies == {"north": "north", "south": "south"}


def test_the_others_do_not_wait_for_a_site_that_has_left() -> None:
    sites = {"north": Site(5), "south": Site(6)}
    sites["north"].is_online = False
    grid: Any = Grid(*sites.values())
    started = time.monotonic()
    ask = asking(grid, sites, quorum=1, patience_s=0.3)
    assert heard(ask({name: letter(name) for name in sites}, LONG_S)) == {
        "north": None,
        "south": "south",
    }
    assert 0.3 <= time.monotonic() - started < 10
    again = time.monotonic()
    heard(ask({name: letter(name) for name in sites}, LONG_S))
    assert time.monotonic() - again < 0.3, "it is known to be away"


def test_while_the_quorum_is_missed_a_site_that_has_left_is_waited_for_to_the_deadline() -> None:
    sites = {"north": Site(5), "south": Site(6)}
    sites["north"].is_online = False
    grid: Any = Grid(*sites.values())
    started = time.monotonic()
    ask = asking(grid, sites, quorum=2, patience_s=0.0)
    replies = heard(ask({name: letter(name) for name in sites}, 0.6))
    assert replies == {"north": None, "south": "south"}
    assert 0.6 <= time.monotonic() - started < 10


def test_a_site_without_a_key_here_is_not_waited_for() -> None:
    sites = {"north": Site(5)}
    ask = asking(Grid(*sites.values()), sites)
    assert heard(ask({"north": letter("a"), "west": letter("b")}, LONG_S)) == {
        "north": "a",
        "west": None,
    }


def test_an_offline_site_is_not_asked_about_before_the_deadline() -> None:
    """The SuperLink would drop what it holds of it."""
    site = Site(5, lambda _: None)
    grid: Any = Grid(site)

    def leave() -> None:
        site.is_online = False

    with meanwhile(grid, leave, after=3):
        ask = asking(grid, {"north": site}, quorum=1)
        assert heard(ask({"north": letter("train")}, 0.5)) == {"north": None}
    assert len([ids for ids in grid.asked if ids]) == 4  # three looks, and one at the end


def test_an_order_the_superlink_dropped_is_sent_again_on_return() -> None:
    """It says so when it is asked about a site that has left without our knowing yet."""
    site = Site(5, lambda _: None)
    grid: Any = Grid(site)
    real, orders = grid._deliver, list[Message]()

    def deliver(message: Message) -> str:
        orders.append(message)
        sent: str = real(message)
        if len(orders) == 1:
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            grid.replies[sent] = reply
        else:
            grid.answer(message, letter("back"))
        return sent

    grid._deliver = deliver
    ask = asking(grid, {"north": site})
    assert heard(ask({"north": letter("train")}, LONG_S)) == {"north": "back"}


def test_a_site_is_away_once_it_has_been_for_longer_than_patience() -> None:
    sites = {"north": Site(5), "south": Site(6)}
    grid: Any = Grid(*sites.values())
    ask = asking(grid, sites, patience_s=0.2)
    sites["north"].is_online = False
    assert ask.away() == []
    time.sleep(0.3)
    assert ask.away() == ["north"]
    sites["north"].restart()
    ask.roll.called_at = float("-inf")
    assert ask.away() == []


def test_the_last_look_asks_about_everybody() -> None:
    sites = {"north": Site(5, lambda _: None), "south": Site(6, lambda _: None)}
    grid: Any = Grid(*sites.values())
    ask = asking(grid, sites)
    assert heard(ask({name: letter(name) for name in sites}, 0.1)) == {"north": None, "south": None}
    assert len(grid.asked[-1]) == 1 and len(grid.asked[-2]) == 2


def test_a_reply_larger_than_the_order_accounts_for_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "SLACK_BYTES", 1000)
    parts = tuple(bytes([n]) * 1000 for n in range(100))
    site = Site(5, lambda order: order._replace(kind="reply", buckets=parts))
    grid: Any = Grid(site)
    replies = dict(asking(grid, {"north": site})({"north": letter("train", size=100)}, LONG_S))
    assert replies == {"north": app.UNREADABLE}
    assert len(grid.pulled) < 50


@pytest.mark.parametrize("spoilt", [b"", b"\xff" * 50, b"Message\x00nonsense"])
def test_what_is_no_message_is_unreadable_and_harms_nobody(spoilt: bytes) -> None:
    sites = {"north": Site(5), "south": Site(6)}
    grid: Any = Grid(*sites.values())
    real = grid._pull_messages

    def spoiling(request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        response: PullAppMessagesResponse = real(request)
        for message in response.messages_list:
            if message.metadata.src_node_id == 5:
                grid.objects[message.metadata.message_id] = spoilt
        return response

    grid._runtime_client.PullMessages = spoiling
    replies = dict(asking(grid, sites)({name: letter(name) for name in sites}, LONG_S))
    assert replies == {"north": app.UNREADABLE, "south": echo(letter("south"))}


def test_connecting_waits_for_those_expected_and_goes_on_without_them() -> None:
    sites = {"north": Site(5), "south": Site(6)}
    sites["north"].is_online = False
    grid: Any = Grid(*sites.values())
    keys = {name: site.line + " a comment" for name, site in sites.items()}
    started = time.monotonic()
    app.connect(grid, keys, expected={"south"})
    assert time.monotonic() - started < 5
    app.connect(grid, keys, wait_s=0.4)
    assert time.monotonic() - started >= 0.4
    with meanwhile(grid, sites["north"].restart, after=5):
        app.connect(grid, keys)

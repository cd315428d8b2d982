"""A door: the Flower app of the coordinator, and how it asks the sites.

Flower starts this app in a process of its own for each run. It hands the run directory to
``server.study`` together with a way to reach the sites, and decides nothing itself.

Guarantees:
    At most one reply's weights are fetched at a time, only when asked for, and not into memory.
    A site that errs, answers no letter or stays away costs the others nothing but the deadline.
    A site that left and came back before the deadline is given its order again.
    A reply that is larger than the order accounts for is not read to its end.
    What a site says about its own error is logged for debugging only.

Design: Flower's ``send_and_receive`` polls every three seconds and holds every reply; its
``pull_messages`` waits seconds for a reply that is still being uploaded. The calls below them are
used instead; ``tests/server/test_link.py`` fails when a new Flower renames one.

Flower delivers a message once, so what a site had in hand when it was killed is lost. A letter is
therefore sent for each time a site was activated while the round is open: sending it again is safe,
because a site answers an order asked again with the same bytes, or does it and charges it as its
next attempt. The first reply counts; another is never fetched and goes with the message's time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives import serialization
from flwr.app import ArrayRecord, Context, Message, MessageType
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects
from flwr.superlink.grid.http_grid import HttpGrid

from server.rounds import Ask, Circle
from shared_models.envelope import Parcel, letter_from, pause_s, record_from
from shared_models.errors import DocumentError, MachineError
from shared_models.weights import return_what_is_freed
from shared_models.wire import Letter

CONNECT_S = 120.0
POLL_S = 0.15
ROLL_S = 1.0  # how often the SuperLink is asked who is there
PULL_S = 2.0  # how long an upload may stand still before its site is looked for
PATIENCE_S = 30.0  # how long a site may be off the net before the others go on without it
LATE_S = 30.0  # for an upload that began before the deadline to be finished
TTL_MARGIN_S = 300.0  # for the replies in time to be fetched one after the other
SLACK_BYTES = 2**20  # of a reply, for its texts and Flower's own
PUSHES = 2  # objects on their way to the SuperLink at once
MOST_SENDS = 5  # of one order to one site: it costs the SuperLink memory each time

log = logging.getLogger(__name__)

app = ServerApp()

#: Stands for what came and is no letter: the round loop will not believe it, and say so.
UNREADABLE = Letter("reply", "", "", "")


class Presence(NamedTuple):
    """A site that is there: its node, since when without a break, and until when at least."""

    node_id: int
    activated_at: str
    online_until: float


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in the run directory that the run's configuration names."""
    from server import fingerprint, store, study

    if not isinstance(grid, HttpGrid):
        raise MachineError(f"expected Flower's HTTP grid, got {type(grid).__name__}")
    return_what_is_freed()
    http_grid, run_dir = grid, Path(str(context.run_config["run-dir"]))

    def reach(circle: Circle) -> Ask:
        return connect(
            http_grid,
            circle.keys,
            expected=circle.expected,
            quorum=circle.quorum,
            folder=run_dir,
        )

    run_dir = Path(str(context.run_config["run-dir"]))
    if store.read_plan(run_dir).plan.fingerprint is not None:
        fingerprint.run(run_dir, reach)
    else:
        study.run(run_dir, reach)


def connect(
    grid: HttpGrid,
    keys: Mapping[str, str],
    *,
    expected: Collection[str] | None = None,
    quorum: int = 0,
    wait_s: float = CONNECT_S,
    folder: Path | None = None,
) -> Ask:
    """Wait for the sites (name to OpenSSH public key line) and return the way to ask them.

    Those ``expected``, or else all, are waited for; after ``wait_s`` it goes on with those that are
    there, and the others may join in at any time. ``quorum`` and ``folder`` are as for
    ``ask_over``.
    """
    roll = Roll(grid, keys)
    wanted = set(keys if expected is None else expected)
    until = time.monotonic() + wait_s
    while not wanted <= set(roll.call()) and time.monotonic() < until:
        time.sleep(POLL_S)
    if missing := sorted(wanted - set(roll.call())):
        log.warning("not connected yet: %s", ", ".join(missing))
    return ask_over(grid, roll=roll, quorum=quorum, folder=folder)


class Roll:
    """Which of the sites (name to OpenSSH public key line) are there, and when they last were."""

    def __init__(self, grid: Grid, keys: Mapping[str, str]) -> None:
        self.grid = grid
        self.sites = {" ".join(line.split()[:2]): site for site, line in keys.items()}
        self.seen = dict.fromkeys(keys, time.monotonic())
        self.present: dict[str, Presence] = {}
        self.called_at = float("-inf")

    def call(self) -> dict[str, Presence]:
        """Return the sites that are there; the SuperLink is asked once in ``ROLL_S`` at most."""
        if time.monotonic() >= self.called_at + ROLL_S:
            self.called_at = time.monotonic()
            self.present = {
                self.sites[line]: presence
                for line, presence in nodes_by_key(self.grid).items()
                if line in self.sites
            }
        now = time.time()
        self.present = {s: found for s, found in self.present.items() if now < found.online_until}
        self.seen |= dict.fromkeys(self.present, time.monotonic())
        return self.present

    def is_lost(self, site: str, *, patience_s: float) -> bool:
        """Whether ``site`` has been away for longer than ``patience_s``, or has no key here."""
        return time.monotonic() > self.seen.get(site, float("-inf")) + patience_s


def nodes_by_key(grid: Grid) -> dict[str, Presence]:
    """Return every node that is online, by its OpenSSH public key line."""
    return {
        _line(node.public_key): Presence(node.node_id, node.last_activated_at, node.online_until)
        for node in grid.get_nodes()
    }


def ask_over(
    grid: HttpGrid,
    *,
    roll: Roll,
    quorum: int = 0,
    patience_s: float = PATIENCE_S,
    folder: Path | None = None,
) -> Ask:
    """Return a function that asks sites over Flower's grid; large replies are put in ``folder``.

    A site that errs or misses the deadline gives None. So does one that has been off the net for
    longer than ``patience_s``, once ``quorum`` sites have answered and only such are waited for.
    """

    def ask(
        letters: Mapping[str, Letter], deadline_s: float
    ) -> Iterator[tuple[str, Letter | None]]:
        until = time.monotonic() + deadline_s
        post = _Post(
            grid,
            letters,
            roll=roll,
            until=until,
            quorum=quorum,
            patience_s=patience_s,
            folder=folder,
        )
        return _replies(post, sorted(letters))

    return _Way(ask, roll, patience_s)


@dataclass(frozen=True)
class _Way:
    """A way to ask sites that knows which of them have been off the net for ``patience_s``."""

    ask: Ask
    roll: Roll
    patience_s: float

    def __call__(
        self, letters: Mapping[str, Letter], deadline_s: float
    ) -> Iterator[tuple[str, Letter | None]]:
        """Ask the sites."""
        return self.ask(letters, deadline_s)

    def away(self) -> list[str]:
        """Return who would not hear."""
        self.roll.call()
        return [s for s in self.roll.seen if self.roll.is_lost(s, patience_s=self.patience_s)]


class _Post:
    """The letters on their way: which are out, which replies are announced, who may still answer.

    The SuperLink drops a reply, even one it holds, when it is asked for it while its site is
    offline. So replies are claimed as soon as they are announced, in any order, and nothing is
    asked about a site that is offline until it is back.
    """

    def __init__(
        self,
        grid: HttpGrid,
        letters: Mapping[str, Letter],
        *,
        roll: Roll,
        until: float,
        quorum: int,
        patience_s: float,
        folder: Path | None,
    ) -> None:
        self.grid, self.letters, self.roll, self.folder = grid, letters, roll, folder
        self.until, self.quorum, self.patience_s = until, quorum, patience_s
        self.waiting = set(letters)
        self.sites: dict[str, str] = {}  # by the ids of the messages that went to them
        self.sent: dict[str, list[str]] = {site: [] for site in letters}  # when to, by activation
        self.announced: dict[str, tuple[str, ObjectTree]] = {}

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.until

    def look(self) -> None:
        """Send what is to be sent, claim what has been announced, give up who has left."""
        is_last = self.is_over
        present = self.roll.call()
        if not is_last:
            self._send([site for site in sorted(self.waiting) if self._is_due(site)])
        asked = [
            i for i, s in self.sites.items() if s in self.waiting and (is_last or s in present)
        ]
        if asked:
            self._claim(asked)
        lost = {s for s in self.waiting if self.roll.is_lost(s, patience_s=self.patience_s)}
        if lost == self.waiting and len(self.letters) - len(lost) >= self.quorum:
            for site in sorted(lost):
                log.warning("site %s has left", site)
            self.waiting.clear()

    def fetch(self, site: str) -> Letter | None:
        """Fetch the announced reply of ``site``, which may still be uploading it.

        None if it is not whole in time, or an error; ``site`` is waited for again if it has come
        back since its order was sent, and may be given the order again.
        """
        message_id, tree = self.announced.pop(site)
        run_id = self.grid.run.run_id
        parcel = self._pulled(site, tree)
        if parcel is None:
            return None
        self.grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.grid.node, run_id=run_id, message_object_id=message_id
            )
        )
        try:
            reply = parcel.message()
            if not reply.has_error():
                return letter_from(reply.content)
        except Exception as error:  # whatever a site may make of Flower's reader
            log.warning("site %s did not answer a letter (%s)", site, type(error).__name__)
            return UNREADABLE
        log.warning("site %s could not answer (code %d)", site, reply.error.code)
        log.debug("it said: %s", reply.error.reason)
        return None

    def _pulled(self, site: str, tree: ObjectTree) -> Parcel | None:
        """Pull a reply's objects, keeping those that are there until the others are too.

        A reply larger than twice its order (a masked number is twice a weight) is left as it is,
        and reads as nothing.
        """
        client, run_id = self.grid._runtime_client, self.grid.run.run_id
        pull = make_pull_object_fn_protobuf(client.PullObject, self.grid.node, run_id)
        most = 2 * self.letters[site].size_bytes + SLACK_BYTES
        parcel = Parcel(tree, most_bytes=most, folder=self.folder)

        def pulled(object_id: str) -> bytes:  # by several threads at once
            if object_id not in parcel:
                parcel.add(object_id, pull(object_id))
            return b""

        while True:
            tried_at = time.monotonic()
            try:
                pull_objects(
                    list(parcel.wanted),
                    pulled,
                    max_time=PULL_S,
                    max_tries_per_object=None,
                    initial_backoff=0.05,
                    backoff_cap=0.5,
                )
                return parcel
            except DocumentError as error:
                log.warning("site %s: its reply is too large or no message (%s)", site, error)
                return parcel
            except ObjectPullError:
                self.roll.call()
                if self._is_due(site) and not self.is_over:
                    self.waiting.add(site)
                    return None
                is_gone = time.monotonic() < tried_at + PULL_S  # or it would have been tried longer
                is_lost = self.roll.is_lost(site, patience_s=self.patience_s)
                if is_gone or is_lost or time.monotonic() >= self.until + LATE_S:
                    log.warning("site %s: its reply is incomplete", site)
                    return None

    def _is_due(self, site: str) -> bool:
        """Whether ``site`` is there and has not been sent its order since it came."""
        found, sent = self.roll.present.get(site), self.sent[site]
        return found is not None and found.activated_at not in sent and len(sent) < MOST_SENDS

    def _send(self, due: list[str]) -> None:
        ttl_s = self.until - time.monotonic() + TTL_MARGIN_S
        nodes = {site: self.roll.present[site].node_id for site in due}
        letters = {site: self.letters[site] for site in due}
        for site, message_id in _pushed(self.grid, letters, nodes=nodes, ttl_s=ttl_s).items():
            if self.sent[site]:
                log.warning("site %s was away; it is given its order again", site)
            self.sent[site].append(self.roll.present[site].activated_at)
            self.sites[message_id] = site

    def _claim(self, message_ids: list[str]) -> None:
        response = self.grid._runtime_client.PullMessages(
            PullAppMessagesRequest(message_ids=message_ids)
        )
        for message, tree in zip(
            response.messages_list, response.message_object_trees, strict=True
        ):
            site = self.sites.pop(message.metadata.reply_to_message_id, None)
            if site is None or site not in self.waiting:
                continue
            if message.HasField("error") and message.error.code == ErrorCode.NODE_UNAVAILABLE:
                # the SuperLink's own words for a site that has just left; the order is dropped
                self.sent[site] = [""] * len(self.sent[site])
                self.roll.present.pop(site, None)
                continue
            self.announced[site] = (message.metadata.message_id, tree)
            self.waiting.discard(site)


def _replies(post: _Post, sites: list[str]) -> Iterator[tuple[str, Letter | None]]:
    asked = time.monotonic()
    for site in sites:
        reply: Letter | None = None
        while reply is None:
            while site in post.waiting:
                is_last = post.is_over
                post.look()
                if is_last:
                    post.waiting.discard(site)
                elif site in post.waiting:
                    time.sleep(pause_s(time.monotonic() - asked))
            if site not in post.announced:
                break
            reply = post.fetch(site)
            if site not in post.waiting:
                break
        yield site, reply
        del reply


def _pushed(
    grid: HttpGrid, letters: Mapping[str, Letter], *, nodes: Mapping[str, int], ttl_s: float
) -> dict[str, str]:
    """Push the letters and return the message id by site; equal buckets are pushed once.

    Flower's own ``push_messages`` would make all objects before it sends the first.
    """
    weights: dict[int, ArrayRecord] = {}
    messages = []
    for site, letter in letters.items():
        content = record_from(letter)
        if "weights" in content:
            record = content.array_records["weights"]
            content["weights"] = weights.setdefault(id(letter.buckets), record)
        messages.append(Message(content, nodes[site], MessageType.TRAIN, ttl=ttl_s))
    ids = _announced(grid, messages) if messages else []
    return {site: sent for site, sent in zip(letters, ids, strict=True) if sent}


def _announced(grid: HttpGrid, messages: list[Message]) -> list[str]:
    """Announce the messages to the SuperLink, give it the objects it lacks, and return their ids.

    An id is empty if the SuperLink refused its message.
    """
    objects: dict[str, InflatableObject] = {}
    client, run_id = grid._runtime_client, grid.run.run_id
    with no_object_id_recompute():
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            objects |= get_all_nested_objects(message)
        trees = [get_object_tree(message) for message in messages]
    response = client.PushMessages(
        PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(m)) for m in messages],
            message_object_trees=trees,
        )
    )
    push = make_push_object_fn_protobuf(client.PushObject, grid.node, run_id, response.session_id)
    lacking = set(response.objects_to_push)
    left = iter([object_id for object_id in objects if object_id in lacking])

    def push_some() -> None:
        for object_id in left:  # of one list, whose iterator no two threads are given the same from
            push(object_id, objects[object_id].deflate())

    with ThreadPoolExecutor(PUSHES) as pool:
        for pushed in [pool.submit(push_some) for _ in range(PUSHES)]:
            pushed.result()
    return list(response.message_ids)


def _line(pem: bytes) -> str:
    key = serialization.load_pem_public_key(pem)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line.decode()

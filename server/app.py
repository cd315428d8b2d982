"""A door: the Flower app of the coordinator, and how it asks the sites.

Flower starts this app in a process of its own for each run. It hands the run directory to
``server.study`` together with a way to reach the sites, and decides nothing itself.

Guarantees:
    At most one reply's weights are fetched at a time, and only when asked for.
    A site that errs, answers no letter or stays away costs the others nothing but the deadline.
    What a site says about its own error is logged for debugging only.

Design: Flower's ``send_and_receive`` polls every three seconds and holds every reply; its
``pull_messages`` waits seconds for a reply that is still being uploaded. The calls below them are
used instead; ``tests/server/test_link.py`` fails when a new Flower renames one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from flwr.app import ArrayRecord, Context, Message, MessageType
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.superlink.grid.http_grid import HttpGrid

from server.rounds import Ask
from shared_models.envelope import letter_from, pause_s, record_from
from shared_models.errors import DocumentError, MachineError
from shared_models.wire import Letter

CONNECT_S = 120.0
POLL_S = 0.15
PATIENCE_S = 30.0  # how long a site may be off the net before its round is given up
LATE_S = 30.0  # for an upload that began before the deadline to be finished
TTL_MARGIN_S = 300.0  # for the replies in time to be fetched one after the other

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in the run directory that the run's configuration names."""
    from server.study import run

    if not isinstance(grid, HttpGrid):
        raise MachineError(f"expected Flower's HTTP grid, got {type(grid).__name__}")
    run(Path(str(context.run_config["run-dir"])), lambda keys: connect(grid, keys))


def connect(grid: HttpGrid, keys: Mapping[str, str], *, wait_s: float = CONNECT_S) -> Ask:
    """Wait for the sites (name to OpenSSH public key line) and return the way to ask them.

    After ``wait_s`` it goes on with those that are there; the others may join in a later round.
    """
    lines = {site: " ".join(line.split()[:2]) for site, line in keys.items()}
    nodes: dict[str, int] = {}
    until = time.monotonic() + wait_s
    while True:
        _find(grid, lines, nodes=nodes)
        if len(nodes) == len(lines) or time.monotonic() >= until:
            break
        time.sleep(POLL_S)
    if missing := sorted(set(lines) - set(nodes)):
        log.warning("not connected yet: %s", ", ".join(missing))

    def ask(
        letters: Mapping[str, Letter], deadline_s: float
    ) -> Iterator[tuple[str, Letter | None]]:
        if len(nodes) < len(lines):
            _find(grid, lines, nodes=nodes)
        return ask_over(grid, nodes=nodes)(letters, deadline_s)

    return ask


def nodes_by_key(grid: Grid) -> dict[str, int]:
    """Return the node id of every site that is online, by its OpenSSH public key line."""
    return {_line(node.public_key): node.node_id for node in grid.get_nodes()}


def ask_over(grid: HttpGrid, *, nodes: Mapping[str, int], patience_s: float = PATIENCE_S) -> Ask:
    """Return a function that asks sites (name to node id) over Flower's grid.

    A site that errs, answers no letter, misses the deadline, or is off the net for longer than
    ``patience_s`` gives None.
    """

    def ask(
        letters: Mapping[str, Letter], deadline_s: float
    ) -> Iterator[tuple[str, Letter | None]]:
        sent = _send(grid, letters, nodes=nodes, ttl_s=deadline_s + TTL_MARGIN_S)
        post = _Post(grid, sent, nodes=nodes, patience_s=patience_s)
        return _replies(post, sorted(letters), until=time.monotonic() + deadline_s)

    return ask


class _Post:
    """The letters on their way: which replies have been announced, and who may still answer.

    The SuperLink drops a reply, even one it holds, when it is asked for it while its site is
    offline. So replies are claimed as soon as they are announced, in any order, and nothing is
    asked about a site that is offline until it is back or patience ends.
    """

    def __init__(
        self, grid: HttpGrid, sent: dict[str, str], *, nodes: Mapping[str, int], patience_s: float
    ) -> None:
        self.grid, self.nodes, self.patience_s = grid, nodes, patience_s
        self.waiting = dict(sent)
        self.announced: dict[str, tuple[str, ObjectTree]] = {}
        self.online_until = dict.fromkeys(sent, 0.0)
        self.seen = dict.fromkeys(sent, time.time())

    def look(self, *, is_last: bool) -> None:
        """Claim what has been announced since the last look."""
        self._call_the_roll()
        now = time.time()
        lost = {site for site in self.waiting if now > self.seen[site] + self.patience_s}
        due = {
            message_id: site
            for site, message_id in self.waiting.items()
            if is_last or site in lost or now < self.online_until[site]
        }
        if due:
            request = PullAppMessagesRequest(message_ids=list(due))
            response = self.grid._runtime_client.PullMessages(request)
            for message, tree in zip(
                response.messages_list, response.message_object_trees, strict=True
            ):
                if site := due.get(message.metadata.reply_to_message_id):
                    self.announced[site] = (message.metadata.message_id, tree)
                    del self.waiting[site]
        for site in lost & set(self.waiting):
            log.warning("site %s has left", site)
            del self.waiting[site]

    def fetch(self, site: str, *, seconds: float) -> Message | None:
        """Fetch the reply of ``site``, which may still be uploading it."""
        message_id, tree = self.announced.pop(site)
        client, run_id = self.grid._runtime_client, self.grid.run.run_id
        try:
            contents = pull_objects(
                [part.object_id for part in iterate_object_tree(tree)],
                make_pull_object_fn_protobuf(client.PullObject, self.grid.node, run_id),
                max_time=seconds,
                max_tries_per_object=None,
                initial_backoff=0.05,
                backoff_cap=0.5,
            )
            reply = inflate_object_from_contents(message_id, contents)
        except (ObjectPullError, ValueError, KeyError) as error:
            log.warning("site %s: its reply is incomplete (%s)", site, type(error).__name__)
            return None
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.grid.node, run_id=run_id, message_object_id=message_id
            )
        )
        return reply if isinstance(reply, Message) else None

    def _call_the_roll(self) -> None:
        now = time.time()
        if any(now > self.online_until[site] for site in self.waiting):
            until = {node.node_id: node.online_until for node in self.grid.get_nodes()}
            for site in self.waiting:
                self.online_until[site] = until.get(self.nodes[site], 0.0)
        for site in self.waiting:
            if now < self.online_until[site]:
                self.seen[site] = now


def _replies(post: _Post, sites: list[str], *, until: float) -> Iterator[tuple[str, Letter | None]]:
    asked = time.monotonic()
    for site in sites:
        while site in post.waiting:
            is_last = time.monotonic() >= until
            post.look(is_last=is_last)
            if is_last:
                break
            if site in post.waiting:
                time.sleep(pause_s(time.monotonic() - asked))
        yield site, _read(post, site, seconds=max(until - time.monotonic(), 0.0) + LATE_S)


def _read(post: _Post, site: str, *, seconds: float) -> Letter | None:
    reply = post.fetch(site, seconds=seconds) if site in post.announced else None
    if reply is None:
        return None
    if reply.has_error():
        log.warning("site %s could not answer (code %d)", site, reply.error.code)
        log.debug("it said: %s", reply.error.reason)
        return None
    try:
        return letter_from(reply.content)
    except DocumentError as error:
        log.warning("site %s did not answer a letter: %s", site, error)
        return None


def _send(
    grid: Grid, letters: Mapping[str, Letter], *, nodes: Mapping[str, int], ttl_s: float
) -> dict[str, str]:
    """Push the letters and return the message id by site; equal buckets are pushed once."""
    known = sorted(site for site in letters if site in nodes)
    weights: dict[tuple[bytes, ...], ArrayRecord] = {}
    messages = []
    for site in known:
        content = record_from(letters[site])
        if "weights" in content:
            record = content.array_records["weights"]
            content["weights"] = weights.setdefault(letters[site].buckets, record)
        messages.append(Message(content, nodes[site], MessageType.TRAIN, ttl=ttl_s))
    ids = list(grid.push_messages(messages)) if messages else []
    return {site: sent for site, sent in zip(known, ids, strict=True) if sent}


def _find(grid: Grid, lines: Mapping[str, str], *, nodes: dict[str, int]) -> None:
    present = nodes_by_key(grid)
    nodes.update({site: present[line] for site, line in lines.items() if line in present})


def _line(pem: bytes) -> str:
    key = serialization.load_pem_public_key(pem)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line.decode()

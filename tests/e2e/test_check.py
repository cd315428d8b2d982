"""consilia-site check against Flower's real SuperLink: it asks, and takes no seat."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supernode import node_auth_http_interceptor

from client import agent
from server.consortium import certificates
from server.link import free_port, superlink


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_knock_tells_enrolled_from_unknown_and_a_wrong_clock_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = certificates(tmp_path / "tls", hosts=["127.0.0.1"])
    line = agent.create_node_key(tmp_path / "node")
    with superlink(tmp_path, tls=tls, port=free_port(), log_file=tmp_path / "log") as link:
        place = agent.FleetLink(link.address, tls.authority, tmp_path / "node")
        unknown = agent.knock(place)
        link.register(line, "north")
        known = agent.knock(place)
        (node,) = link.client.ListNodes(ListNodesRequest()).nodes_info
        real = node_auth_http_interceptor.now
        with monkeypatch.context() as ahead:
            ahead.setattr(node_auth_http_interceptor, "now", lambda: real() + timedelta(seconds=60))
            early = agent.knock(place)
    assert (unknown.status, unknown.is_enrolled) == (412, False)
    assert known.is_enrolled
    assert node.status == "registered"
    assert (early.status, early.is_enrolled) == (401, False)
    assert all(one.date is not None and one.round_trip_s > 0 for one in (unknown, known, early))

"""Real SuperLinks with TLS and enrolled keys, agents in threads, and a small server app of ours."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from client.agent import FleetLink, create_node_key, run
from server.consortium import TlsFiles, certificates
from server.link import SuperLink, free_port, superlink, thin_app
from shared_models.wire import Letter

SITES = ("north", "south")

SERVER_APP = '''\
"""Asks the sites what ``asks.json`` says and writes down what came back."""
import json, time
from pathlib import Path
from flwr.serverapp import ServerApp
from server.app import connect
from shared_models.wire import Letter

app = ServerApp()

@app.main()
def main(grid, context):
    folder = Path(context.run_config["run-dir"])
    plan = json.loads((folder / "asks.json").read_text())
    ask = connect(grid, plan["keys"], wait_s=20)
    rounds = []
    for word, size, deadline_s in plan["asks"]:
        buckets = (b"a" * size, b"b") if size else ()
        letters = {
            site: Letter("order", f"{word} {site}", "k", "s", buckets) for site in plan["keys"]
        }
        start = time.monotonic()
        heard = {}
        for site, reply in ask(letters, deadline_s):
            heard[site] = reply and [reply.document, reply.buckets == buckets]
        rounds.append([heard, time.monotonic() - start])
    (folder / "rounds.json").write_text(json.dumps(rounds))
'''


def echo(letter: Letter) -> Letter:
    if letter.document == "late south":
        time.sleep(2.0)
    if letter.document == "error south":
        raise ValueError("planted secret")
    return letter._replace(kind="reply")


def processes_of(folder: Path) -> dict[int, str]:
    """Return the processes, by id, whose environment names ``folder`` as Flower's home."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={folder}/".encode() in (entry / "environ").read_bytes():
                words = (entry / "cmdline").read_bytes().split(b"\0")
                found[int(entry.name)] = b" ".join(words).decode()
        except OSError:
            continue
    return found


@contextmanager
def agent(
    link: FleetLink, answer: Callable[[Letter], Letter], *, stop: threading.Event | None = None
) -> Iterator[None]:
    stop = stop or threading.Event()
    thread = threading.Thread(target=run, args=(link, answer), kwargs={"stop": stop})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], Any], *, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)


def asking_app(folder: Path) -> Path:
    """Write a bundle that names the server app above."""
    app_dir = thin_app(folder)
    project = app_dir / "pyproject.toml"
    project.write_text(project.read_text().replace("server.app:app", "asking:app"))
    return app_dir


def bundle_of(folder: Path) -> str:
    """Return the digest of that bundle, for the agents to know."""
    return hashlib.sha256(build_fab_from_disk(asking_app(folder))).hexdigest()


def asked(
    link: SuperLink, folder: Path, *, keys: dict[str, str], asks: list[tuple[str, int, float]]
) -> int:
    folder.mkdir()
    (folder / "asks.json").write_text(json.dumps({"keys": keys, "asks": asks}))
    return link.submit(asking_app(folder / "bundle"), {"run-dir": str(folder)})


def rounds_of(link: SuperLink, folder: Path, *, run_id: int) -> list[Any]:
    wait_until(lambda: link.status(run_id).is_finished)
    assert link.status(run_id).is_completed, link.status(run_id).details
    rounds: list[Any] = json.loads((folder / "rounds.json").read_text())
    return rounds


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return {site: create_node_key(tmp_path / site) for site in SITES}


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return certificates(tmp_path / "tls", hosts=["127.0.0.1", "localhost"])


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "asking.py").write_text(SERVER_APP)
    here = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{here}")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing here may go through it
    monkeypatch.setenv("no_proxy", "example.org")


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_letters_travel_and_a_stranger_gets_none(
    tmp_path: Path,
    keys: dict[str, str],
    tls: TlsFiles,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    create_node_key(tmp_path / "stranger")
    heard_by_stranger: list[Letter] = []
    leaving = threading.Event()

    def south(letter: Letter) -> Letter:
        if letter.document == "bye south":
            leaving.set()
        return echo(letter)

    answers = {"north": echo, "south": south}
    answers["stranger"] = lambda letter: heard_by_stranger.append(letter) or letter
    log_file, bundle = tmp_path / "superlink.log", bundle_of(tmp_path / "bundle")
    times = [time.monotonic()]
    with (
        superlink(tmp_path, tls=tls, port=free_port(), log_file=log_file) as link,
        ExitStack() as agents,
    ):
        times.append(time.monotonic())
        ids = {site: link.register(line, site) for site, line in keys.items()}
        assert {site: link.register(line, site) for site, line in keys.items()} == ids
        for name, answer in answers.items():
            place = FleetLink(link.address, tls.authority, tmp_path / name, bundle)
            agents.enter_context(agent(place, answer, stop=leaving if name == "south" else None))
        asks = [("empty", 0, 20.0), ("empty", 0, 20.0), ("full", 6_000_000, 20.0)]
        asks += [("error", 0, 20.0), ("late", 0, 1.0), ("bye", 0, 20.0), ("gone", 0, 1.0)]
        run_id = asked(link, tmp_path / "run", keys=keys, asks=asks)
        rounds = rounds_of(link, tmp_path / "run", run_id=run_id)
        times.append(time.monotonic())
    times.append(time.monotonic())
    logging.info("seconds: %s", [after - before for before, after in pairwise(times)])
    logging.info("seconds per round: %s", [seconds for _, seconds in rounds])
    both = [[f"{word} north", True] for word, _, _ in asks]
    assert [heard["north"] for heard, _ in rounds] == both
    heard_from_south = [heard["south"] and heard["south"][0] for heard, _ in rounds]
    assert heard_from_south == [*["empty south"] * 2, "full south", None, None, "bye south", None]
    assert [list(heard) for heard, _ in rounds] == [list(SITES)] * len(asks)
    assert "planted secret" not in log_file.read_text() + caplog.text
    assert heard_by_stranger == []
    assert "not admitted" in caplog.text
    assert processes_of(tmp_path) == {}


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_agents_outlive_a_killed_superlink_and_no_process_is_left(
    tmp_path: Path, keys: dict[str, str], tls: TlsFiles
) -> None:
    port, log_file = free_port(), tmp_path / "superlink.log"
    bundle = bundle_of(tmp_path / "bundle")
    missing = keys | {"west": create_node_key(tmp_path / "west")}
    with ExitStack() as agents:
        for site in SITES:
            place = FleetLink(f"127.0.0.1:{port}", tls.authority, tmp_path / site, bundle)
            agents.enter_context(agent(place, echo))
        with superlink(tmp_path, tls=tls, port=port, log_file=log_file) as link:
            for site, line in keys.items():
                link.register(line, site)
            asked(link, tmp_path / "waiting", keys=missing, asks=[])
            wait_until(lambda: "flwr-serverapp" in str(processes_of(tmp_path)))
            leaders = {os.getsid(pid) for pid in processes_of(tmp_path)}
            assert len(leaders) > 1, "one session at last: killing the group would do"
            os.kill(link.process.pid, signal.SIGKILL)
        assert processes_of(tmp_path) == {}
        with superlink(tmp_path, tls=tls, port=port, log_file=log_file) as link:
            for site, line in keys.items():
                link.register(line, site)
            run_id = asked(link, tmp_path / "run", keys=keys, asks=[("again", 0, 20.0)])
            heard, _ = rounds_of(link, tmp_path / "run", run_id=run_id)[0]
    assert heard == {site: [f"again {site}", True] for site in SITES}
    assert processes_of(tmp_path) == {}

"""What the conductor does when things die, on a SuperLink made of a few lists."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from server import conduct, link, report, store
from server.conduct import News, Place
from server.consortium import TlsFiles
from server.link import RunState
from shared_models.envelope import BUNDLE_DIGEST
from shared_models.errors import DocumentError, MachineError, RunError

RUNNING = RunState("running", "", "")
FAILED = RunState("finished", "failed", "")


class SuperLink:
    """Knows its nodes and runs; ``begin`` stands for what a server app does when it starts."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.nodes: dict[int, str] = {}
        self.states: dict[int, RunState] = {}
        self.exit_code: int | None = None
        self.is_silent = False
        self.process = SimpleNamespace(poll=lambda: self.exit_code)

    def check(self) -> None:
        if self.is_silent:
            raise MachineError("the SuperLink does not answer")

    def register(self, line: str, name: str) -> int:
        if line == "nonsense":
            raise DocumentError("expected a public key")
        self.nodes[self.world.number()] = name
        return max(self.nodes)

    def unregister(self, node_id: int) -> None:
        self.nodes.pop(node_id, None)

    def submit(self, app_dir: Path, run_config: Mapping[str, Any], *, bundle: str) -> int:
        if bundle != self.world.bundle:
            raise RunError(f"this machine packs {self.world.bundle}")
        run_id = self.world.number()
        self.states[run_id] = RUNNING
        self.world.begun.append(Path(run_config["run-dir"]))
        self.world.begin(self, run_id, Path(run_config["run-dir"]))
        return run_id

    def status(self, run_id: int) -> RunState:
        return self.states[run_id]

    def stop(self, run_id: int) -> bool:
        self.world.stopped.append(run_id)
        return True


class World:
    """All that the tests look at: one SuperLink after the other, what was begun and stopped."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.links: list[SuperLink] = []
        self.begun: list[Path] = []
        self.stopped: list[int] = []
        self.begin: Callable[[SuperLink, int, Path], Any] = lambda *_: None
        self.wont_start: Iterator[bool] = iter(())
        self.is_up = False
        self.bundle = BUNDLE_DIGEST
        self.held = ExitStack()
        self.numbers = iter(range(1, 10**6))
        self.stop = Event()
        self.wanted: list[Path] = []
        self.keys: dict[str, str] = {"north": "line of north"}

    def number(self) -> int:
        return next(self.numbers)

    @contextmanager
    def superlink(self, folder: Path, **_: Any) -> Iterator[SuperLink]:
        if next(self.wont_start, False):
            raise MachineError("the port is taken")
        self.links.append(SuperLink(self))
        self.is_up = True
        try:
            yield self.links[-1]
        finally:
            self.held.close()  # what it started ends with it
            self.is_up = False

    def hold(self, run_dir: Path) -> None:
        """Be the process that runs the study."""
        self.held.enter_context(store.lock(run_dir))

    def study(self, name: str = "study") -> Path:
        run_dir = self.tmp_path / name
        run_dir.mkdir()
        self.wanted.append(run_dir)
        return run_dir

    def conducted(self) -> Any:
        place = Place(self.tmp_path / "office", TlsFiles(*[Path("none")] * 3), "127.0.0.1", 1)
        made: Generator[News, None, None] = conduct.conduct(
            place, studies=lambda: self.wanted, enrolled=lambda: self.keys, stop=self.stop
        )
        return closing(made)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(link, "superlink", made.superlink)
    for name in ("POLL_S", "STATUS_S", "FIRST_DELAY_S"):
        monkeypatch.setattr(conduct, name, 0.002)
    return made


def finish(_: SuperLink, __: int, run_dir: Path) -> None:
    add_round(run_dir)
    for name in (report.JSON_NAME, report.HTML_NAME):
        (run_dir / name).write_text("{}")


def add_round(run_dir: Path) -> None:
    with (run_dir / store.ROUNDS).open("ab") as stream:
        stream.write(b"{}\n")


def until(news: Iterator[News], kind: str) -> list[News]:
    """Return what happened, but for idling, up to the first news of ``kind``."""
    seen = []
    for turns, each in enumerate(news):
        assert turns < 3000, seen
        seen += [each] * (each.kind != "idle")
        if each.kind == kind:
            return seen
    raise AssertionError(f"it ended before {kind}: {seen}")


def kinds(news: list[News]) -> list[str]:
    return [each.kind for each in news]


def test_a_study_is_run_to_its_report_and_nothing_is_left_running(world: World) -> None:
    run_dir = world.study()
    world.begin = finish
    with world.conducted() as news:
        assert kinds(until(news, "done")) == ["up", "begun", "round", "done"]
        assert world.is_up
        for _ in range(20):
            assert next(news).kind == "idle"
    assert world.begun == [run_dir]
    assert not world.is_up


def test_a_server_app_that_dies_is_started_again(world: World) -> None:
    run_dir = world.study()

    def begin(superlink: SuperLink, run_id: int, run_dir: Path) -> None:
        if len(world.begun) == 3:
            finish(superlink, run_id, run_dir)
        else:
            world.hold(run_dir)

    world.begin = begin
    with world.conducted() as news:
        for _ in range(2):
            until(news, "begun")
            until(news, "idle")
            until(news, "idle")
            world.held.close()  # killed
            again = until(news, "again")[-1]
            assert (again.study, again.text) == (run_dir, ("its process ended",))
        until(news, "done")
    assert len(world.begun) == 3
    assert world.stopped == [], "sites would break off what they have begun"
    assert len(world.links) == 1


def test_a_server_app_that_ends_before_it_begins_is_started_again(world: World) -> None:
    world.study()

    def begin(superlink: SuperLink, run_id: int, run_dir: Path) -> None:
        if len(world.begun) == 2:
            finish(superlink, run_id, run_dir)
        superlink.states[run_id] = FAILED

    world.begin = begin
    with world.conducted() as news:
        assert kinds(until(news, "done")) == ["up", "begun", "again", "begun", "round", "done"]


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_superlink_that_dies_is_started_again_with_its_nodes_and_runs(
    world: World, how: str
) -> None:
    world.study()
    world.keys |= {"south": "line of south"}
    world.begin = lambda superlink, run_id, run_dir: world.hold(run_dir)
    with world.conducted() as news:
        until(news, "begun")
        if how == "killed":
            world.links[0].exit_code = -9
        else:
            world.links[0].is_silent = True
        world.begin = finish
        assert kinds(until(news, "done")) == ["down", "up", "begun", "round", "done"]
    assert [sorted(each.nodes.values()) for each in world.links] == [["north", "south"]] * 2


def test_a_superlink_that_never_starts_a_server_app_is_started_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "BEGIN_S", 0.05)
    world.study()
    with world.conducted() as news:
        down = until(news, "down")[-1]
        assert down.text == ("it has not started a server app",)
        world.begin = finish
        until(news, "done")


def test_a_study_that_keeps_dying_is_given_up_and_the_others_are_not(world: World) -> None:
    bad, good = world.study("bad"), world.study("good")

    def begin(superlink: SuperLink, run_id: int, run_dir: Path) -> None:
        if run_dir == bad:
            superlink.states[run_id] = FAILED
        else:
            world.hold(run_dir)

    world.begin = begin
    with world.conducted() as news:
        failed = until(news, "failed")[-1]
        assert failed.study == bad
        assert "6 times without a round more; see" in failed.text[0]
        assert "superlink.log" in failed.text[0]
        assert store.read_failure(bad) == failed.text
        assert store.is_running(good)
    assert world.begun.count(bad) == conduct.MOST_FAILURES + 1


def test_a_round_more_is_progress_and_counts_the_failures_anew(world: World) -> None:
    run_dir = world.study()

    def begin(superlink: SuperLink, run_id: int, run_dir: Path) -> None:
        if len(world.begun) == 3 * conduct.MOST_FAILURES:
            finish(superlink, run_id, run_dir)
        if len(world.begun) % conduct.MOST_FAILURES == 0:
            add_round(run_dir)
        superlink.states[run_id] = FAILED

    world.begin = begin
    with world.conducted() as news:
        until(news, "done")
    assert not (run_dir / store.FAILED).exists()


def test_a_study_that_needs_a_person_is_left_alone_until_its_failure_is_forgotten(
    world: World,
) -> None:
    run_dir = world.study()

    def refuse(_: SuperLink, __: int, run_dir: Path) -> None:
        store.write_failure(run_dir, ["too few sites", "north: no-answer"])

    world.begin = refuse
    with world.conducted() as news:
        failed = until(news, "failed")[-1]
        assert failed.text == ("too few sites", "north: no-answer")
        for _ in range(20):
            assert next(news).kind == "idle"
        store.forget_failure(run_dir)
        world.begin = finish
        until(news, "done")
    assert len(world.begun) == 2


def test_a_study_that_had_failed_before_is_not_begun_by_itself(world: World) -> None:
    store.write_failure(world.study(), ["too few sites"])
    with world.conducted() as news:
        assert kinds(until(news, "failed")) == ["up", "failed"]
    assert world.begun == []


def test_a_study_whose_run_cannot_be_submitted_needs_a_person_and_says_why(world: World) -> None:
    run_dir = world.study()
    world.begin, world.bundle = finish, "other bytes"
    with world.conducted() as news:
        (failed,) = [each for each in until(news, "failed") if each.kind != "up"]
        assert (failed.study, failed.text) == (run_dir, ("this machine packs other bytes",))
        world.bundle = BUNDLE_DIGEST
        store.forget_failure(run_dir)
        until(news, "done")
    assert len(world.links) == 1


def test_a_study_that_another_process_runs_is_not_begun(world: World) -> None:
    run_dir = world.study()
    world.begin = finish
    with world.conducted() as news:
        until(news, "up")
        with store.lock(run_dir):
            for _ in range(20):
                assert next(news).kind == "idle"
        until(news, "done")


def test_studies_come_and_go_as_they_are_wanted(world: World) -> None:
    first = world.study("first")
    world.begin = lambda superlink, run_id, run_dir: world.hold(run_dir)
    with world.conducted() as news:
        until(news, "begun")
        second = world.study("second")
        assert until(news, "begun")[-1].study == second
        assert world.stopped == []
        world.wanted.remove(first)
        until(news, "idle")
        until(news, "idle")
    assert len(world.stopped) == 1


def test_a_site_that_is_enrolled_no_longer_is_cut_off_and_a_new_one_let_in(world: World) -> None:
    with world.conducted() as news:
        until(news, "idle")
        assert list(world.links[0].nodes.values()) == ["north"]
        world.keys = {"south": "line of south", "broken": "nonsense"}
        until(news, "idle")
        until(news, "idle")
        assert list(world.links[0].nodes.values()) == ["south"]
        world.keys = {"south": "another line of south"}
        until(news, "idle")
        until(news, "idle")
        assert list(world.links[0].nodes.values()) == ["south"]
        assert len(world.links) == 1


def test_a_revoked_key_that_is_enrolled_again_takes_a_new_superlink(world: World) -> None:
    """Flower never forgets a key that it has unregistered."""
    with world.conducted() as news:
        for keys, kind in (({"north": "line"}, "idle"), ({}, "idle"), ({"north": "line"}, "up")):
            world.keys = keys
            until(news, kind)
        until(news, "idle")
        assert list(world.links[-1].nodes.values()) == ["north"]


def test_the_log_is_bounded_however_long_it_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = functools.partial(link.bound_log, most_bytes=100)
    monkeypatch.setattr(link, "bound_log", bounded)
    file = world.tmp_path / "office" / "superlink.log"
    with world.conducted() as news:
        until(news, "up")
        for _ in range(3):
            file.write_bytes(b"x" * 101)
            for turns, _ in enumerate(news):
                assert turns < 3000
                if not file.stat().st_size:
                    break
        file.unlink()
        file.mkdir()  # nothing that could be cut
        until(news, "idle")
        assert len(world.links) == 1


def test_a_superlink_that_cannot_be_started_at_first_is_told_at_once(world: World) -> None:
    world.wont_start = iter([True])
    with world.conducted() as news, pytest.raises(MachineError, match=r"taken\nmore in .*log"):
        next(news)


def test_a_superlink_that_keeps_dying_is_given_up(world: World) -> None:
    world.study()

    def die(superlink: SuperLink, run_id: int, run_dir: Path) -> None:
        superlink.exit_code = 3

    world.begin = die
    seen = list[News]()
    with world.conducted() as news, pytest.raises(MachineError, match=r"ended with 3\nmore in"):
        seen.extend(news)
    assert kinds(seen).count("up") == conduct.MOST_FAILURES + 1
    assert not world.is_up


def test_a_superlink_may_die_often_in_a_long_life(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "STEADY_S", 0.0)
    with world.conducted() as news:
        for _ in range(3 * conduct.MOST_FAILURES):
            until(news, "up")
            until(news, "idle")
            world.links[-1].exit_code = -9
            until(news, "down")


def test_it_ends_when_it_is_told_to(world: World) -> None:
    world.study()
    with world.conducted() as news:
        until(news, "begun")
        world.stop.set()
        assert kinds([each for each in news if each.kind != "idle"]) == []
    assert not world.is_up


def test_the_delay_grows_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    delays = [conduct._delay_s(failures) for failures in range(1, 9)]
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]

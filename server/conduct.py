"""Keeps one consortium's SuperLink up and its studies running, whatever is killed.

A study's rounds run in a server app of their own, a process that the SuperLink starts. All that
counts stands in the study's run directory (``store.py``), so whatever dies is started again: the
SuperLink, which forgets everything, with the sites' keys registered anew; the server app, on the
same run directory, from the last round that has its line.

Guarantees:
    A SuperLink or a server app that dies is started again, and the study goes on where it was.
    What keeps dying without a round more is given up, with a sentence that names the log.
    A site that is enrolled no longer is cut off; one enrolled later is let in.
    A study that needs a person is left alone until that person has acted.
    The log of all this is bounded, however long it goes on.
    When ``conduct`` is left, nothing that it started is left running.

Design: a server app holds the lock of its run directory as long as it lives, so its death is seen
at once, long before Flower notices a silent process. What the conductor itself leaves behind when
it is killed with ``kill -9`` is found and ended by the next one on the same folder (``link.py``).

A run whose server app died is not stopped: sites would break off what they have reserved and begun.
They finish it, and answer the next run's same order with what they kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event
from typing import Literal, NamedTuple

from server import link, report, store
from server.consortium import TlsFiles
from shared_models.envelope import BUNDLE_DIGEST
from shared_models.errors import ConsiliaError, DocumentError, MachineError, RunError

POLL_S = 0.2
STATUS_S = 2.0  # how often the SuperLink is asked whether it and its runs are alive
BEGIN_S = 120.0  # for a server app to have started and imported what it needs
FIRST_DELAY_S, MOST_DELAY_S = 1.0, 60.0
MOST_FAILURES = 5  # one after the other, without a round more
STEADY_S = 600.0  # a SuperLink that lived this long did not die of how it was started

log = logging.getLogger(__name__)

NewsKind = Literal["up", "down", "begun", "round", "again", "done", "failed", "idle"]


class Place(NamedTuple):
    """Where a consortium's SuperLink lives, and on which address and port hospitals reach it."""

    folder: Path
    tls: TlsFiles
    host: str
    port: int

    @property
    def log_file(self) -> Path:
        """What the SuperLink and the server apps say."""
        return self.folder / "superlink.log"


class News(NamedTuple):
    """What has happened: ``study`` is a run directory, None of the SuperLink; ``text`` says why.

    "up", "down": the SuperLink. "begun": the study's orders will go out. "round": a line more in
    ``rounds.jsonl``. "again": its server app died. "done": it has its report. "failed": it needs a
    person. "idle": nothing has happened, once in each turn.
    """

    kind: NewsKind
    study: Path | None = None
    text: tuple[str, ...] = ()


class _LostError(Exception):
    """The SuperLink is gone, or of no more use."""


class _Study:
    """What is known of one study that is to be run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.num_lines = _num_lines(run_dir)
        self.run_id: int | None = None
        self.begun_at = 0.0
        self.asked_at = 0.0
        self.has_run = False
        self.is_over = False
        self.failures = 0
        self.not_before = 0.0

    def fail(self) -> None:
        """Note that the study's process is gone, and wait longer each time."""
        self.run_id, self.has_run = None, False
        self.failures += 1
        self.not_before = time.monotonic() + _delay_s(self.failures)


def conduct(
    place: Place,
    *,
    studies: Callable[[], Collection[Path]],
    enrolled: Callable[[], Mapping[str, str]],
    stop: Event,
) -> Generator[News, None, None]:
    """Keep the SuperLink up and run ``studies`` until ``stop`` is set or the iterator is closed.

    Args:
        place: one consortium's; another conductor's is refused.
        studies: the run directories of the studies that are wanted now. It is asked in each turn:
            one that appears is begun, one that is gone is stopped. One that has failed is begun
            again once its failure is forgotten (``store.forget_failure``).
        enrolled: the node keys (OpenSSH lines) of the sites enrolled now, by name; asked likewise.
        stop: ends the iteration within a turn.

    Raises:
        MachineError: if the SuperLink cannot be started, or keeps dying without a round more.
    """
    desk = _Desk(place, studies=studies, enrolled=enrolled)
    deaths, up_at = 0, float("inf")
    while not stop.is_set():
        try:
            with _superlink(place) as superlink:
                up_at = time.monotonic()
                yield News("up")
                for news in desk.turns(superlink, stop):
                    deaths = 0 if news.kind in ("round", "done") else deaths
                    yield news
        except (_LostError, MachineError) as error:
            deaths = 1 if time.monotonic() > up_at + STEADY_S else deaths + 1
            if up_at == float("inf") or deaths > MOST_FAILURES:
                raise MachineError(_given_up(error, place)) from error
            log.error("the SuperLink is started again: %s", error)
            desk.forget_runs()
            yield News("down", text=(str(error),))
            stop.wait(_delay_s(deaths))


class _Desk:
    """The studies under way and the sites let in, on one SuperLink after the other."""

    def __init__(
        self,
        place: Place,
        *,
        studies: Callable[[], Collection[Path]],
        enrolled: Callable[[], Mapping[str, str]],
    ) -> None:
        self.place, self.wanted, self.enrolled = place, studies, enrolled
        self.studies: dict[Path, _Study] = {}
        self.asked_at = 0.0

    def turns(self, superlink: link.SuperLink, stop: Event) -> Iterator[News]:
        """Do what is to be done, turn after turn, until ``stop`` is set.

        Raises:
            _LostError: if the SuperLink has to be started again.
            MachineError: if it does not answer.
        """
        admitted: dict[str, tuple[str, int]] = {}
        cut_off = set[str]()
        while not stop.wait(POLL_S):
            self._check(superlink)
            self._admit(superlink, admitted, cut_off)
            wanted = {run_dir.resolve() for run_dir in self.wanted()}
            for run_dir in self.studies.keys() - wanted:
                self._drop(superlink, run_dir)
            for run_dir in sorted(wanted):
                yield from self._turn(superlink, run_dir)
            yield News("idle")

    def forget_runs(self) -> None:
        """Note that all server apps are gone with their SuperLink."""
        for study in self.studies.values():
            if study.run_id is not None:
                study.fail()

    def _check(self, superlink: link.SuperLink) -> None:
        if (code := superlink.process.poll()) is not None:
            raise _LostError(f"it ended with {code}")
        if time.monotonic() > self.asked_at + STATUS_S:
            superlink.check()
            self._bound_log()
            self.asked_at = time.monotonic()

    def _bound_log(self) -> None:
        try:
            link.bound_log(self._log)
        except OSError as error:  # a full disk ends no study
            log.warning("the SuperLink's log cannot be cut: %s", type(error).__name__)

    def _admit(
        self, superlink: link.SuperLink, admitted: dict[str, tuple[str, int]], cut_off: set[str]
    ) -> None:
        """Let in who is enrolled, and nobody else."""
        enrolled = self.enrolled()
        for site, (key, node_id) in list(admitted.items()):
            if enrolled.get(site) != key:
                log.warning("site %s is enrolled no longer", site)
                superlink.unregister(node_id)
                cut_off.add(key)
                del admitted[site]
        for site in sorted(enrolled.keys() - admitted.keys()):
            if enrolled[site] in cut_off:
                raise _LostError(f"the key of {site} is enrolled again, which takes a new start")
            admitted[site] = (enrolled[site], _registered(superlink, site, key=enrolled[site]))

    def _turn(self, superlink: link.SuperLink, run_dir: Path) -> Iterator[News]:
        """See what has become of a study, and begin it if it is not under way."""
        study = self.studies.setdefault(run_dir, _Study(run_dir))
        is_running = store.is_running(run_dir)
        failure = () if is_running else store.read_failure(run_dir)
        is_done = not is_running and _is_done(run_dir)
        if study.is_over:
            if not is_done and not failure:  # a person wants it again
                del self.studies[run_dir]
            return
        if (num_lines := _num_lines(run_dir)) > study.num_lines:
            study.num_lines, study.failures = num_lines, 0
            yield News("round", run_dir)
        if is_done or failure:
            study.run_id, study.is_over = None, True
            yield News("done", run_dir) if is_done else News("failed", run_dir, failure)
        elif study.run_id is not None:
            yield from self._watched(superlink, study, is_running=is_running)
        elif time.monotonic() >= study.not_before and not is_running:
            try:
                self._begin(superlink, study)
            except RunError as error:
                store.write_failure(run_dir, error.objections)  # told in the next turn
                return
            yield News("begun", run_dir)

    def _begin(self, superlink: link.SuperLink, study: _Study) -> None:
        app_dir = link.thin_app(self.place.folder / "app")
        told = {"run-dir": str(study.run_dir)}
        study.run_id = superlink.submit(app_dir, told, bundle=BUNDLE_DIGEST)
        study.begun_at = study.asked_at = time.monotonic()

    def _watched(
        self, superlink: link.SuperLink, study: _Study, *, is_running: bool
    ) -> Iterator[News]:
        """See whether the server app of a study that has no outcome yet is alive."""
        if is_running:
            study.has_run = True
            return
        reason = self._death(superlink, study)
        if reason is None or _is_done(study.run_dir) or store.read_failure(study.run_dir):
            return  # it lives, or has come to its end since the files were looked at
        study.fail()
        if study.failures > MOST_FAILURES:
            text = f"it failed {study.failures} times without a round more; see {self._log}"
            store.write_failure(study.run_dir, [text])
            return
        log.error("%s: its server app is started again: %s", study.run_dir.name, reason)
        yield News("again", study.run_dir, (reason,))

    def _death(self, superlink: link.SuperLink, study: _Study) -> str | None:
        """Return how it is known that a study's process, which holds no lock, is gone."""
        if study.has_run:
            return "its process ended"
        if time.monotonic() > study.begun_at + BEGIN_S:
            raise _LostError("it has not started a server app")
        if time.monotonic() > study.asked_at + STATUS_S and study.run_id is not None:
            study.asked_at = time.monotonic()
            state = superlink.status(study.run_id)
            if state.is_finished:
                return f"Flower ended its run ({state.sub_status})"
        return None

    def _drop(self, superlink: link.SuperLink, run_dir: Path) -> None:
        """Stop a study that is no longer wanted."""
        study = self.studies.pop(run_dir)
        if study.run_id is not None:
            superlink.stop(study.run_id)

    @property
    def _log(self) -> Path:
        return self.place.log_file


def _superlink(place: Place) -> AbstractContextManager[link.SuperLink]:
    place.folder.mkdir(parents=True, exist_ok=True)
    return link.superlink(
        place.folder / "superlink",
        tls=place.tls,
        host=place.host,
        port=place.port,
        log_file=place.log_file,
    )


def _registered(superlink: link.SuperLink, site: str, *, key: str) -> int:
    """Let a site in and return its node's id; one whose key cannot be read harms only itself."""
    try:
        return superlink.register(key, site)
    except (DocumentError, RunError) as error:
        log.error("site %s is not let in: %s", site, error)
        return 0


def _given_up(error: Exception, place: Place) -> tuple[str, ...]:
    said = error.objections if isinstance(error, ConsiliaError) else (f"the SuperLink: {error}",)
    return (*said, f"more in {place.log_file}")


def _is_done(run_dir: Path) -> bool:
    """Whether the study has its report or fingerprint, which is written after everything else."""
    if store.has_fingerprint(run_dir):
        return True
    return (run_dir / report.JSON_NAME).exists() and (run_dir / report.HTML_NAME).exists()


def _num_lines(run_dir: Path) -> int:
    try:
        return (run_dir / store.ROUNDS).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _delay_s(failures: int) -> float:
    return float(min(FIRST_DELAY_S * 2 ** (failures - 1), MOST_DELAY_S))

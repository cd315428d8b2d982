"""Starts and watches the process that trains, gives it jobs, and trusts nothing that it answers.

The one who asks holds the keys, the ledger and the journal, and reads no image; the one who trains
reads images and holds none of these. Between them goes one length, one JSON document and one run of
float32, nothing that could be executed.

Guarantees:
    A worker that crashes, hangs, takes too much or answers rubbish ends; its job has failed.
    A worker is given no key, no ledger, no journal, and no path to them.
    An answer is read into memory only as far as its job can have one.
    After a job that failed the next one finds a new worker.
    A net is described only by a worker that has read no image.

Design: memory is bounded by looking at what the worker holds, ten times a second, rather than by
RLIMIT_AS, under which CUDA does not start for it reserves far more addresses than it uses. A worker
may overshoot by what it takes in a tenth of a second; it asks the kernel to be ended before others.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from client.config import SiteConfig
from client.confinement import Confinement, readable_by_default
from client.work import Job, Outcome
from client.worker import HEAD, MAGIC
from shared_models.contracts import Contract
from shared_models.errors import DataError, MachineError
from shared_models.files import replace
from shared_models.weights import Array, Flat, flat_of

MOST_DOCUMENT_BYTES = 16 * 2**20
CHUNK_BYTES = 2**20
WATCH_S = 0.1
LINGER_S = 1.0
START_S = 300.0
SHARE_OF_MEMORY = 0.75
#: Of the parent's environment, what the worker gets too.
KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
KEPT_FAMILIES = ("OMP_", "MKL_", "CUDA_", "CUBLAS_", "NVIDIA_", "TORCH_", "PYTORCH_")

OUTSIDE = (
    "the worker reads what lies in data.root only; if these files lie elsewhere, or links lead "
    "there, name the folder in limits.readable of site.toml"
)

TOLD = "worker.json"  # in the state folder: what the agent's worker gave up

Watch = Callable[[], None]

log = logging.getLogger(__name__)


class Told(Contract):
    """What a worker of this site's agent gave up, and when it said so."""

    when: datetime
    confinement: Confinement


class Answer(Contract):
    """What a worker says to a job: an outcome, or that there is none. An update follows it."""

    outcome: Outcome | None = None
    failure: Literal["data", "failed"] | None = None
    sentences: Annotated[
        tuple[Annotated[str, Field(max_length=2000)], ...], Field(max_length=100)
    ] = ()


def send(
    channel: socket.socket,
    document: bytes,
    vector: Array | Flat | None,
    *,
    watch: Watch | None = None,
) -> None:
    """Send a document and, if there is one, a float32 vector, or the bytes of one where they lie.

    ``watch`` is called while that takes time.

    Raises:
        OSError: if the other end is gone.
    """
    flat = (
        vector if isinstance(vector, Flat) else flat_of(np.zeros(0) if vector is None else vector)
    )
    head = HEAD.pack(MAGIC, len(document), flat.size)
    for part in chain((head, document), flat.stretches()):
        view = memoryview(part)
        while view:
            try:
                view = view[channel.send(view[:CHUNK_BYTES]) :]
            except TimeoutError:
                _call(watch)


def receive(
    channel: socket.socket, *, size: int | None = None, watch: Watch | None = None
) -> tuple[bytes, Array | None] | None:
    """Return the next document and the vector beside it, or None if the other end is closed.

    ``size`` is how many numbers the vector has, if there is one; without it, any.

    Raises:
        ValueError: if what comes is too large, or no message.
        OSError: if the other end is gone in the middle of it.
    """
    head = bytearray(HEAD.size)
    if not _fill(memoryview(head), channel, watch):
        return None
    magic, num_bytes, num_raw = HEAD.unpack(head)
    if magic != MAGIC or num_bytes > MOST_DOCUMENT_BYTES:
        raise ValueError("expected a message, got something else")
    if num_raw % 4 or (size is not None and num_raw not in (0, 4 * size)):
        raise ValueError("expected as many numbers as were asked for")
    document = bytearray(num_bytes)
    vector = np.empty(num_raw // 4, "<f4")
    for view in (memoryview(document), memoryview(vector.data).cast("B")):
        if view and not _fill(view, channel, watch):
            raise ConnectionResetError("the other end closed in the middle of a message")
    return bytes(document), vector if num_raw else None


def _fill(view: memoryview, channel: socket.socket, watch: Watch | None) -> bool:
    """Fill ``view``; False if the other end closed before its first byte."""
    is_begun = False
    while view:
        try:
            got = channel.recv_into(view[:CHUNK_BYTES])
        except TimeoutError:
            _call(watch)
            continue
        if not got and is_begun:
            raise ConnectionResetError("the other end closed in the middle of a message")
        if not got:
            return False
        is_begun, view = True, view[got:]
        _call(watch)
    return True


def _call(watch: Watch | None) -> None:
    if watch is not None:
        watch()


class Supervisor:
    """Does jobs by a worker process, which is started anew whenever it has ended."""

    def __init__(self, config: SiteConfig, *, command: Sequence[str] | None = None) -> None:
        self.config = config
        self.command = command or [sys.executable, "-P", "-s", "-B", "-m", "client.worker"]
        self.cancelled = threading.Event()
        self.most_memory = most_memory_bytes(config.limits.max_memory_gb)
        self.scratch = Path(tempfile.mkdtemp(prefix="consilia-worker-"))
        self.worker: _Worker | None = None

    def __call__(self, job: Job, weights: Flat | None) -> tuple[Outcome, Array | None]:
        """Have ``job`` done.

        Raises:
            DataError: if the site's images or labels cannot be used.
            MachineError: if the worker ended, had to be ended, or answered what cannot be read.
        """
        self.cancelled.clear()
        if self.worker is not None and (
            not self.worker.is_alive() or (job.step == "judge" and self.worker.has_read)
        ):
            self.end_worker()
        worker = self.start()
        until = time.monotonic() + job.limit_s
        try:
            worker.greet(lambda: self._watch(worker, until))
            return worker.do(job, weights, watch=lambda: self._watch(worker, until))
        except DataError:
            raise
        except Exception as error:
            worker.linger()
            self.end_worker()
            self.start()  # so that it is warm when the next order comes
            if isinstance(error, OSError | ValueError):
                raise MachineError(worker.last_words(error)) from None
            raise

    def start(self) -> _Worker:
        """Start the worker if there is none.

        Raises:
            MachineError: if no process can be started.
        """
        if self.worker is None:
            try:
                self.worker = _Worker(self.command, self.config, self.scratch)
            except OSError as error:
                raise MachineError(f"no worker could be started: {error.strerror}") from error
        return self.worker

    def confinement(self) -> Confinement:
        """Return what the worker gave up, once it has told.

        Raises:
            MachineError: if it does not.
        """
        worker = self.start()
        until = time.monotonic() + START_S
        try:
            return worker.greet(lambda: self._watch(worker, until))
        except (OSError, ValueError) as error:
            worker.linger()
            self.end_worker()
            raise MachineError(worker.last_words(error)) from None

    def cancel(self) -> None:
        """End the job that is being done, if there is one; for another thread to call."""
        self.cancelled.set()

    def end_worker(self) -> None:
        """End the worker with all it started."""
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def close(self) -> None:
        """End the worker and remove its scratch folder."""
        self.end_worker()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _watch(self, worker: _Worker, until: float) -> None:
        if self.cancelled.is_set():
            raise MachineError("the worker was ended: nobody waits for its answer any more")
        if not worker.is_alive():  # what it started may hold the channel open
            raise ConnectionResetError("the worker ended")
        if time.monotonic() > until:
            raise MachineError("the worker was ended: it took longer than its limit")
        if worker.memory_bytes() > self.most_memory:
            most = f"{self.most_memory / 2**30:.3g} GB"
            raise MachineError(f"the worker was ended: it held more than {most} of memory")


def confinement_of(config: SiteConfig) -> Confinement:
    """Start a worker only to learn what this machine lets it give up.

    Raises:
        MachineError: if it cannot be started or does not tell.
    """
    with closing(Supervisor(config)) as supervisor:
        return supervisor.confinement()


def tell(supervisor: Supervisor, state_dir: Path) -> None:
    """Write down what the agent's worker gave up, for ``consilia-site status``.

    Nothing is left there if it does not tell: the site answers orders all the same, or refuses.
    """
    try:
        told = Told(when=datetime.now(UTC), confinement=supervisor.confinement())
        state_dir.mkdir(parents=True, exist_ok=True)
        replace(state_dir / TOLD, told.model_dump_json().encode())
    except (MachineError, OSError) as error:
        log.error("what the worker gave up is not known: %s", type(error).__name__)
        (state_dir / TOLD).unlink(missing_ok=True)


def told(state_dir: Path) -> Told | None:
    """Return what the last worker that told gave up; None if none did."""
    try:
        return Told.model_validate_json((state_dir / TOLD).read_bytes())
    except (OSError, ValidationError):
        return None


def most_memory_bytes(max_memory_gb: float) -> float:
    """Return how much main memory a worker may hold; 0 means a share of the machine's."""
    if max_memory_gb > 0:
        return max_memory_gb * 2**30
    there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" is no number: this group of processes has no limit
        there_is = min(there_is, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return SHARE_OF_MEMORY * there_is


def readable_of(config: SiteConfig) -> tuple[str, ...]:
    """Return all that a worker of this site may read."""
    data = (config.data.manifest, config.data.root, *config.limits.readable)
    return (*readable_by_default(), *map(str, data))


def lasting_of(config: SiteConfig) -> tuple[str, ...]:
    """Return what a worker may write to that outlives it: the cache, made if there is none."""
    if not config.cache.most_gb:
        return ()
    with suppress(OSError):  # the worker goes without, and says so
        config.cache.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return (str(config.cache.folder),)


def exposed(config: SiteConfig) -> list[Path]:
    """Return which of the site's secrets lie within a folder that its worker may read."""
    read = (*readable_of(config), *lasting_of(config))
    readable = [Path(path).resolve() for path in read]
    secrets = (config.signing_key, config.link.node_key, config.state_dir, config.ingest.private)
    return [
        secret
        for secret in secrets
        if any(secret.resolve().is_relative_to(path) for path in readable)
    ]


class _Worker:
    """One process and the channel to it."""

    def __init__(self, command: Sequence[str], config: SiteConfig, scratch: Path) -> None:
        self.site = config.name
        self.has_read = False
        self.confinement: Confinement | None = None
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(WATCH_S)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    cwd="/",
                    env=_environment(scratch),
                    start_new_session=True,
                )
            except OSError:
                self.channel.close()
                raise
        told = {
            "readable": readable_of(config),
            "scratch": str(scratch),
            "lasting": lasting_of(config),
            "log_level": log.getEffectiveLevel(),
        }
        with suppress(OSError):  # if it has ended already, that is found when it is greeted
            self.channel.sendall(json.dumps(told).encode() + b"\n")

    def is_alive(self) -> bool:
        """Tell whether it runs; its id stays its own until it is killed, so that no other is."""
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is None

    def greet(self, watch: Watch) -> Confinement:
        """Return what the worker gave up, which is the first thing it says."""
        if self.confinement is None:
            received = receive(self.channel, size=0, watch=watch)
            if received is None:
                raise ConnectionResetError("the worker said nothing")
            self.confinement = TypeAdapter(Confinement).validate_json(received[0])
            log.info("%s", _printable(self.confinement.sentence()))
        return self.confinement

    def do(self, job: Job, weights: Flat | None, *, watch: Watch) -> tuple[Outcome, Array | None]:
        self.has_read |= job.step != "judge"
        send(self.channel, job.model_dump_json().encode(), weights, watch=watch)
        size = weights.size // 4 if weights is not None and job.step == "train" else 0
        received = receive(self.channel, size=size, watch=watch)
        if received is None:
            raise ConnectionResetError("the worker closed its end")
        document, update = received
        answer = Answer.model_validate_json(document)
        if answer.failure == "data":
            is_outside = any("PermissionError" in sentence for sentence in answer.sentences)
            cure = [OUTSIDE] if is_outside else []
            raise DataError([*map(_printable, answer.sentences), *cure])
        if answer.failure is not None or answer.outcome is None:
            raise MachineError("the worker could not do it; its own log line says why")
        if (update is not None) != bool(size):
            raise ValueError("expected an update from training, and only then")
        return answer.outcome, update

    def memory_bytes(self) -> int:
        """Return the main memory the process holds; 0 where the system does not tell."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_bytes().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * resource.getpagesize()

    def last_words(self, error: Exception) -> str:
        """Say how the worker ended; it has been killed by now if it had not ended by itself."""
        if isinstance(error, ValueError):
            return "the worker was ended: it answered what cannot be read"
        code = self.process.returncode
        if code is not None and code < 0:
            return f"the worker ended by signal {signal.Signals(-code).name}"
        return f"the worker ended with status {code}"

    def linger(self) -> None:
        """Wait a moment for a process that closed its end, so that how it ended is known."""
        until = time.monotonic() + LINGER_S
        while self.is_alive() and _is_closed(self.channel) and time.monotonic() < until:
            time.sleep(WATCH_S / 10)

    def kill(self) -> None:
        """End the process and all of its group; how it ended before that stays known."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()


def _is_closed(channel: socket.socket) -> bool:
    try:
        return channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except OSError as error:
        return not isinstance(error, BlockingIOError)


def _environment(scratch: Path) -> dict[str, str]:
    """Return what a worker is told of its surroundings: no proxy, no home, no secret."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name.startswith(KEPT_FAMILIES)
    }
    paths = [str(Path(entry).resolve()) for entry in sys.path if entry]
    places = dict.fromkeys(("HOME", "TMPDIR", "CUDA_CACHE_PATH"), str(scratch))
    return kept | places | {"PYTHONPATH": os.pathsep.join(paths), "JOBLIB_MULTIPROCESSING": "0"}


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)

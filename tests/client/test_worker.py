"""The process that trains: what it gives up, what it can do to the one who asks, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from client import config as configs
from client.config import SiteConfig
from client.confinement import Confinement
from client.supervisor import (
    Supervisor,
    confinement_of,
    exposed,
    most_memory_bytes,
    readable_of,
    receive,
    send,
)
from client.work import Bench, Cohort, Job, Outcome
from shared_models import nets
from shared_models.errors import DataError, MachineError
from shared_models.nets.base import weights_of
from shared_models.signing import digest
from shared_models.weights import Flat, flat_of, packed

WEIGHTS = np.arange(5, dtype=np.float32)
GIVEN = flat_of(WEIGHTS)

#: A worker that says it gave up everything, takes one job after the other, and then misbehaves.
SCRIPT = """
import ctypes, json, os, signal, socket, struct, sys, time
from pathlib import Path
import numpy as np
from client.supervisor import HEAD, MAGIC, Answer, receive, send
from client.work import Outcome
channel = socket.socket(fileno=int(sys.argv[-1]))
scratch = Path(os.environ["TMPDIR"])
with channel.makefile("rb") as stream:
    told = stream.readline()
send(channel, json.dumps([None] * 5).encode(), None)

def say(vector=None, **fields):
    send(channel, Answer(**fields).model_dump_json().encode(), vector)

def raw(document, vector=b"", *, magic=MAGIC, num_bytes=None, num_raw=None):
    num_bytes = len(document) if num_bytes is None else num_bytes
    num_raw = len(vector) if num_raw is None else num_raw
    channel.sendall(HEAD.pack(magic, num_bytes, num_raw) + document + vector)

while True:
    document, weights = receive(channel)
    job = json.loads(document)
    BEHAVIOUR
"""
HONEST = "say(weights, outcome=Outcome()) if job['step'] == 'train' else say(outcome=Outcome())"

Workers = Callable[..., Supervisor]


@pytest.fixture
def config(site_of, tmp_path: Path) -> SiteConfig:
    changes = {"signing_key": tmp_path / "k" / "signing.pem", "state_dir": tmp_path / "k" / "state"}
    return site_of(changes)


@pytest.fixture
def workers(config: SiteConfig) -> Iterator[Workers]:
    """Return what makes a supervisor whose workers behave as a line of Python says."""
    made: list[Supervisor] = []

    def make(behaviour: str, **limits: Any) -> Supervisor:
        script = SCRIPT.replace("BEHAVIOUR", behaviour.replace("\n", "\n    "))
        limited = config.limits.model_copy(update=limits)
        changed = config.model_copy(update={"limits": limited})
        made.append(Supervisor(changed, command=[sys.executable, "-c", script]))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def job_of(plan_of, config: SiteConfig) -> Callable[..., Job]:
    def make(step: str = "train", plan: dict[str, Any] | None = None, **changed: Any) -> Job:
        agreed = plan_of(plan or {})
        fields = {
            "step": step,
            "study": digest(agreed),
            "plan": agreed,
            "site": "north",
            "data": config.data,
            "performance": config.performance,
            "today": datetime.now(UTC).date(),
            "limit_s": 60.0,
        }
        return Job.model_validate(fields | changed)

    return make


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], *, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def pid_of(workers: Supervisor) -> int:
    assert workers.worker is not None
    return workers.worker.process.pid


# --- the channel


@pytest.mark.parametrize("size", [0, 1, 5, 1_000_003])
def test_a_message_arrives_as_it_was_sent(size: int) -> None:
    ours, theirs = socket.socketpair()
    vector = np.random.Generator(np.random.PCG64(0)).normal(size=size).astype(np.float32)
    with ours, theirs:
        sender = threading.Thread(target=send, args=(ours, b'{"a": 1}', vector if size else None))
        sender.start()
        received = receive(theirs)
        sender.join()
        ours.close()
        assert receive(theirs) is None
    assert received is not None
    document, arrived = received
    assert document == b'{"a": 1}'
    assert (arrived is None) == (size == 0)
    assert arrived is None or np.array_equal(arrived, vector)


# --- a worker that misbehaves

ENDS = {
    "it exits": ("os._exit(3)", "ended with status 3"),
    "it exits without a word": ("os._exit(0)", "ended with status 0"),
    "it crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal SIGSEGV"),
    "it aborts": ("os.abort()", "ended by signal SIGABRT"),
    "it raises": ("1 / 0", "ended with status 1"),
    "it is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal SIGKILL"),
    "it closes its end": ("channel.close()\ntime.sleep(60)", "ended by signal SIGKILL"),
    "it answers half": ("channel.sendall(MAGIC)\nos._exit(0)", "ended with status 0"),
    "it says that it failed": ("say(failure='failed')", "could not do it"),
    "it says nothing": ("raw(b'{}')", "could not do it"),
}
RUBBISH = {
    "no message": "channel.sendall(b'rubbish' * 1000)",
    "an older message": "raw(b'{}', magic=b'job0')",
    "no document": "raw(b'rubbish')",
    "a number": "raw(b'7')",
    "a list": "raw(b'[' * 9000)",
    "an unknown field": """raw(b'{"outcome": {}, "note": "x"}')""",
    "an unknown field inside": """raw(b'{"outcome": {"note": "x"}}')""",
    "a loss that is not finite": """raw(b'{"outcome": {"loss": NaN}}')""",
    "a metric that is not finite": (
        """raw(b'{"outcome": {"evaluation": {"metrics": {"auc": Infinity},"""
        """ "num_patients": 6, "num_images": 6}}}')"""
    ),
    "a metric that is text": (
        """raw(b'{"outcome": {"evaluation": {"metrics": {"auc": "x"},"""
        """ "num_patients": 6, "num_images": 6}}}')"""
    ),
    "a negative count": (
        """raw(b'{"outcome": {"cohort": {"num_patients": -1, "num_test_patients": 1,"""
        """ "num_test_images": 1, "is_mixed": false}}}')"""
    ),
    "a document too large": "raw(b'', num_bytes=2**31)",
    "a document larger than memory": "raw(b'', num_bytes=2**32 - 1, num_raw=2**63)",
    "an update too large": """raw(b'{"outcome": {}}', num_raw=2**62)""",
    "one number more": """raw(b'{"outcome": {}}', bytes(24))""",
    "one number less": """raw(b'{"outcome": {}}', bytes(16))""",
    "half a number": """raw(b'{"outcome": {}}', bytes(19))""",
    "no update": "say(outcome=Outcome())",
    "a pickle": "raw(b'\\x80\\x04\\x95.', bytes(20))",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_worker_that_crashes_ends_and_its_job_has_failed(
    name: str, workers: Workers, job_of: Callable[..., Job]
) -> None:
    behaviour, sentence = ENDS[name]
    one = workers(behaviour)
    first = one.start().process.pid
    with pytest.raises(MachineError, match=sentence):
        one(job_of(), GIVEN)
    assert not is_running(first)
    assert pid_of(one) != first
    assert is_running(pid_of(one))


@pytest.mark.parametrize("name", RUBBISH)
def test_a_worker_that_answers_rubbish_ends_and_its_job_has_failed(
    name: str, workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers(RUBBISH[name])
    first = one.start().process.pid
    with pytest.raises(MachineError, match="answered what cannot be read"):
        one(job_of(), GIVEN)
    assert not is_running(first)


@pytest.mark.parametrize("step", ["judge", "prepare", "evaluate", "alone"])
def test_an_update_where_none_belongs_is_not_read(
    step: str, workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers("""raw(b'{"outcome": {}}', bytes(20))""")
    with pytest.raises(MachineError, match="answered what cannot be read"):
        one(job_of(step), GIVEN)


@pytest.mark.parametrize(
    "behaviour",
    [
        "time.sleep(60)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
        "while True:\n    pass",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "channel.sendall(HEAD.pack(MAGIC, 100, 0))\nwhile True:\n"
        "    channel.sendall(b' ') or time.sleep(0.05)",
    ],
    ids=["asleep", "deaf", "busy", "stopped", "dripping"],
)
def test_a_worker_that_hangs_ends_when_its_time_is_over(
    behaviour: str, workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers(behaviour)
    one.confinement()  # it is there
    first, start = pid_of(one), time.monotonic()
    with pytest.raises(MachineError, match="longer than its limit"):
        one(job_of(limit_s=0.5), GIVEN)
    assert time.monotonic() - start < 5
    assert not is_running(first)


def test_a_worker_that_does_not_listen_ends_when_its_time_is_over(
    workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers("time.sleep(60)")
    one.confinement()
    with pytest.raises(MachineError, match="longer than its limit"):
        one(job_of(limit_s=0.5), flat_of(np.zeros(10_000_000, np.float32)))


def test_a_worker_that_takes_too_much_memory_ends(
    workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers("kept = np.ones(2**27)\ntime.sleep(60)", max_memory_gb=0.5)
    one.confinement()
    first = pid_of(one)
    with pytest.raises(MachineError, match=r"it held more than 0\.5 GB of memory"):
        one(job_of(), GIVEN)
    assert not is_running(first)


def test_what_a_worker_started_ends_with_it(
    workers: Workers, job_of: Callable[..., Job], tmp_path: Path
) -> None:
    one = workers(
        "child = os.fork()\nif not child:\n    time.sleep(60)\n"
        "(scratch / 'child').write_text(str(child))\nos._exit(0)"
    )
    with pytest.raises(MachineError):
        one(job_of(), GIVEN)
    child = int((one.scratch / "child").read_text())
    wait_until(lambda: not is_running(child))


def test_a_job_that_nobody_waits_for_is_ended_at_once(
    workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers("(scratch / 'begun').touch()\ntime.sleep(60)")

    def cancel() -> None:
        wait_until((one.scratch / "begun").exists)
        one.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    start = time.monotonic()
    with pytest.raises(MachineError, match="nobody waits"):
        one(job_of(), GIVEN)
    thread.join()
    assert time.monotonic() - start < 10


def test_a_cancellation_that_came_too_late_ends_no_other_job(
    workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers(HONEST)
    one.cancel()
    _, update = one(job_of(), GIVEN)
    assert np.array_equal(update, WEIGHTS)


@pytest.mark.parametrize("behaviour", ["os._exit(1)", "channel.sendall(b'rubbish' * 9)"])
def test_after_a_job_that_failed_the_next_one_finds_a_new_worker(
    behaviour: str, workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers(f"if job['round_'] == 1:\n    {behaviour}\n{HONEST}")
    for round_, works in ((0, True), (1, False), (0, True), (1, False), (0, True)):
        if works:
            assert np.array_equal(one(job_of(round_=round_), GIVEN)[1], WEIGHTS)
        else:
            with pytest.raises(MachineError):
                one(job_of(round_=round_), GIVEN)


def test_a_worker_that_ended_between_two_jobs_is_replaced(
    workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers(HONEST)
    one(job_of(), GIVEN)
    first = pid_of(one)
    killed = one.start()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not killed.is_alive())  # its threads may outlive the first of them
    assert np.array_equal(one(job_of(), GIVEN)[1], WEIGHTS)
    assert pid_of(one) != first


def test_a_worker_that_cannot_be_started_is_told(config: SiteConfig) -> None:
    one = Supervisor(config, command=["/nowhere/python"])
    with pytest.raises(MachineError, match="no worker could be started"):
        one.start()
    one.close()


def test_what_is_wrong_with_the_data_is_told_in_words_and_the_worker_stays(
    workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers("say(failure='data', sentences=('line 3: \\x1b[2J no image', 'more'))")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            one(job_of("prepare"), None)
        assert caught.value.objections == ("line 3: ?[2J no image", "more")
    assert one.worker is not None
    assert one.worker.has_read


def test_a_net_is_described_only_by_a_worker_that_has_read_no_image(
    workers: Workers, job_of: Callable[..., Job]
) -> None:
    one = workers(HONEST)
    one(job_of("judge"), None)
    first = pid_of(one)
    one(job_of("judge"), None)
    one(job_of("prepare"), None)
    assert pid_of(one) == first
    one(job_of("judge"), None)
    assert pid_of(one) != first


# --- what a worker is given


def test_a_worker_is_given_no_key_no_ledger_no_journal_and_no_path_to_them(
    workers: Workers,
    job_of: Callable[..., Job],
    config: SiteConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.socket() as mine:
        mine.set_inheritable(True)
        one = workers(
            "fds = {n: os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')"
            " if os.path.exists(f'/proc/self/fd/{n}')}\n"
            "words = [told.decode(), document.decode(), dict(os.environ), sys.argv[1:], fds]\n"
            "(scratch / 'words').write_text(json.dumps(words))\n" + HONEST
        )
        one(job_of(), GIVEN)
    text = (one.scratch / "words").read_text()
    *_, environment, arguments, descriptors = json.loads(text)
    assert str(config.data.root) in text
    for secret in (config.signing_key, config.link.node_key, config.state_dir):
        assert str(secret) not in text
    assert "secret" not in text
    assert {"HOME", "TMPDIR"} <= set(environment)
    assert environment["HOME"] == str(one.scratch)
    assert len(arguments) == 1
    sockets = [place for place in descriptors.values() if place.startswith("socket:")]
    assert len(sockets) == 1


def test_secrets_within_the_images_folder_are_told(config: SiteConfig, tmp_path: Path) -> None:
    (tmp_path / "k").mkdir()
    inside = config.data.model_copy(update={"root": tmp_path})
    beside = config.data.model_copy(update={"root": tmp_path / "data"})
    key = config.signing_key
    assert key in exposed(config.model_copy(update={"data": inside}))
    assert key not in exposed(config.model_copy(update={"data": beside}))
    assert str(beside.manifest) in readable_of(config.model_copy(update={"data": beside}))


@pytest.mark.parametrize(("given_", "most"), [(2.0, 2 * 2**30), (0.5, 2**29)])
def test_the_most_memory_is_what_the_site_says(given_: float, most: float) -> None:
    assert most_memory_bytes(given_) == most


def test_without_a_limit_a_worker_holds_three_quarters_of_the_machine_at_most() -> None:
    there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < most_memory_bytes(0.0) <= 0.75 * there_is


# --- what a worker gives up

PROBE = """
import json, os, socket, subprocess, sys
from client.confinement import Confines, confine, readable_by_default
told = json.loads(sys.argv[1])
readable = (*readable_by_default(), told["data"])
found = confine(Confines(readable, told["scratch"]))
import ctypes
def tried(act):
    try:
        act()
    except OSError as error:
        return type(error).__name__
    return "done"
def connect():
    with socket.create_connection(("127.0.0.1", told["port"]), timeout=5):
        pass
def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.sendto(b"x", ("127.0.0.1", told["port"]))
def local():
    with socket.socket(socket.AF_UNIX) as out:
        out.connect("\\0" + told["abstract"])
acts = {
    "read the data": lambda: open(told["data"] + "/image").read(),
    "write to scratch": lambda: open(told["scratch"] + "/a", "w").write("x"),
    "read the key": lambda: open(told["key"]).read(),
    "list the keys": lambda: os.listdir(os.path.dirname(told["key"])),
    "read the key by another way": lambda: open("/proc/self/root" + told["key"]).read(),
    "read the parent's memory": lambda: open(f"/proc/{told['parent']}/mem", "rb").read(0),
    "read the parent's environment": lambda: open(f"/proc/{told['parent']}/environ").read(),
    "open the parent's files": lambda: os.readlink(f"/proc/{told['parent']}/fd/0"),
    "write to the data": lambda: open(told["data"] + "/image", "a").write("x"),
    "write elsewhere": lambda: open(told["elsewhere"], "w").write("x"),
    "remove the data": lambda: os.unlink(told["data"] + "/image"),
    "start a program": lambda: subprocess.run(["/bin/true"], check=True),
    "signal the parent": lambda: os.kill(told["parent"], 0),
    "connect": connect,
    "send a datagram": datagram,
    "reach an abstract socket": local,
}
print(json.dumps([found, {name: tried(act) for name, act in acts.items()}]))
"""


class Probed(NamedTuple):
    found: Confinement
    acts: dict[str, str]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """Return what a confined process could still do."""
    folder = tmp_path_factory.mktemp("confined")
    for name in ("data", "scratch", "keys"):
        (folder / name).mkdir()
    (folder / "data" / "image").write_text("an image")
    (folder / "keys" / "key").write_text("a key")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + str(folder))
        local.listen()
        told = {
            "data": str(folder / "data"),
            "scratch": str(folder / "scratch"),
            "key": str(folder / "keys" / "key"),
            "elsewhere": str(folder / "file"),
            "port": server.getsockname()[1],
            "abstract": str(folder),
            "parent": os.getpid(),
        }
        done = subprocess.run(
            [sys.executable, "-B", "-c", PROBE, json.dumps(told)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    assert done.returncode == 0, done.stderr
    found, acts = json.loads(done.stdout)
    return Probed(Confinement(*found), acts)


def test_a_worker_reads_its_data_and_writes_to_its_scratch_folder(probed: Probed) -> None:
    assert probed.acts["read the data"] == probed.acts["write to scratch"] == "done"


@pytest.mark.parametrize("act", ["connect", "send a datagram", "reach an abstract socket"])
def test_a_worker_reaches_no_network_not_even_this_machines_own(act: str, probed: Probed) -> None:
    if probed.found.network is not None:
        pytest.skip(f"this system does not let a process leave its network: {probed.found.network}")
    assert probed.acts[act] != "done"


@pytest.mark.parametrize(
    "act",
    [
        "read the key",
        "list the keys",
        "read the key by another way",
        "read the parent's memory",
        "read the parent's environment",
        "open the parent's files",
        "write to the data",
        "write elsewhere",
        "remove the data",
        "start a program",
    ],
)
def test_a_worker_opens_no_file_but_its_own_and_starts_no_program(act: str, probed: Probed) -> None:
    if probed.found.files is not None:
        pytest.skip(f"this system has no Landlock: {probed.found.files}")
    assert probed.acts[act] == "PermissionError"


def test_what_a_system_lacks_is_told() -> None:
    everything = Confinement(None, None, None, None, None)
    assert everything.sentence() == "the worker is confined: no network, no files but its own"
    less = everything._replace(network="EPERM", files="ENOSYS").sentence()
    assert less.endswith("this system lacks: network (EPERM), files (ENOSYS)")


def test_nothing_but_the_standard_library_is_imported_before_everything_is_given_up() -> None:
    line = (
        "import sys; before = set(sys.modules); import client.worker;"
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {*sys.stdlib_module_names, "client"}


PARENT = """
import sys, time
from pathlib import Path
from client import config
from client.supervisor import Supervisor
one = Supervisor(config.read(Path(sys.argv[1])))
one.confinement()
print(one.worker.process.pid, one.scratch, flush=True)
time.sleep(60)
"""


def test_a_worker_ends_with_its_parent(hospital) -> None:
    command = [sys.executable, "-c", PARENT, str(hospital.config_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker, scratch = parent.stdout.readline().split()
        assert is_running(int(worker))
        parent.kill()
    wait_until(lambda: not is_running(int(worker)))
    Path(scratch).rmdir()


# --- the real one


class Real(NamedTuple):
    config: SiteConfig
    workers: Supervisor


@pytest.fixture
def real(hospital) -> Iterator[Real]:
    config = configs.read(hospital.config_file)
    one = Supervisor(config)
    yield Real(config, one)
    one.close()
    assert not one.scratch.exists()


def start_of(job: Job) -> Flat:
    net = nets.make(job.plan.net.name, job.plan.net.params, seed=1, num_outputs=2)
    return packed(weights_of(net))


def test_a_job_gives_the_same_bits_in_whichever_process_it_is_done(
    real: Real, job_of: Callable[..., Job], mark: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bench = Bench()
    for step in ("judge", "prepare", "train", "evaluate", "alone"):
        job = job_of(step, {"privacy": None}, data=real.config.data)
        here, there = bench(job, start_of(job)), real.workers(job, start_of(job))
        assert there[0] == here[0] != Outcome()
        assert (there[1] is None) == (here[1] is None) == (step != "train")
        assert there[1] is None or np.array_equal(there[1], here[1])
    assert bench.studies[job.study].cohort == Cohort(
        num_patients=12, num_test_patients=6, num_test_images=12, is_mixed=False
    )
    private = job_of(data=real.config.data, noise_multiplier=2.0)
    outcome, update = real.workers(private, start_of(private))
    assert outcome.loss is None
    assert update is not None
    with pytest.raises(MachineError, match="could not do it"):
        real.workers(private, start_of(private).part(0, 40))
    (real.config.data.root / f"{mark}-3-0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match="line"):
        real.workers(private, start_of(private))
    said = capfd.readouterr()
    assert "training failed: ValueError" in said.err
    assert mark not in said.err + said.out


def test_images_outside_the_data_folder_are_not_read_unless_the_site_says_so(
    hospital, job_of: Callable[..., Job], mark: str, tmp_path: Path
) -> None:
    config, elsewhere = configs.read(hospital.config_file), tmp_path / "elsewhere"
    if confinement_of(config).files is not None:
        pytest.skip("this system has no Landlock")
    elsewhere.mkdir()
    image = hospital.images / f"{mark}-3-0.png"
    image.rename(elsewhere / "image.png")
    image.symlink_to(elsewhere / "image.png")
    with closing(Supervisor(config)) as one, pytest.raises(DataError) as caught:
        one(job_of("prepare", data=config.data), None)
    assert "limits.readable" in caught.value.objections[-1]
    allowed = config.limits.model_copy(update={"readable": (elsewhere,)})
    with closing(Supervisor(config.model_copy(update={"limits": allowed}))) as one:
        assert one(job_of("prepare", data=config.data), None)[0].cohort is not None

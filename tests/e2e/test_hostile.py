"""A hostile coordinator before a real site: SuperLink, agent, worker, journal and ledger.

One session of orders over the wire, then the site's journal and ledger are read. What can be tried
without a network is in ``tests/client/test_answer.py`` and ``test_worker.py``.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.cli.build import build_fab_from_disk
from PIL import Image

from client import agent, ledger, setup, studies
from client import config as configs
from client.agent import FleetLink
from client.answer import Desk, open_site
from server.consortium import certificates
from server.link import SuperLink, free_port, superlink, thin_app
from shared_models import journal, nets
from shared_models.contracts import JournalEntry, RoundOrder
from shared_models.envelope import BUNDLE_DIGEST
from shared_models.nets.base import weights_of
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, load_key, public_key, sign
from shared_models.weights import Array, flatten
from shared_models.weights import digest as digest_of
from shared_models.wire import Letter, seal

COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
NUM_TRAIN, NUM_TEST = 12, 6

SERVER_APP = '''\
"""Sends the site the letters of ``letters.json``, one after the other, and keeps what it says."""
import base64, json
from pathlib import Path
from flwr.serverapp import ServerApp
from server.app import connect
from shared_models.wire import Letter

app = ServerApp()

@app.main()
def main(grid, context):
    folder = Path(context.run_config["run-dir"])
    told = json.loads((folder / "letters.json").read_text())
    ask = connect(grid, told["keys"], wait_s=30)
    heard = []
    for *texts, buckets in told["letters"]:
        letter = Letter(*texts, tuple(map(base64.b64decode, buckets)))
        ((_, reply),) = ask({"north": letter}, told["deadline_s"])
        heard.append(reply and [*reply[:4], [base64.b64encode(b).decode() for b in reply.buckets]])
        (folder / "heard.tmp").write_text(json.dumps(heard))
        (folder / "heard.tmp").replace(folder / "heard.json")
'''
#: What a bundle would do if anybody imported it.
PAYLOAD = "from pathlib import Path\nPath({file!r}).write_text('it ran')\n"

PLAN: dict[str, Any] = {
    "name": "hostile",
    "purpose": "research",
    "coordinator": public_key(COORDINATOR),
    "sites": ["north"],
    "expires": date(2099, 1, 1),
    "task": {"name": "classification", "params": {"classes": ["clear", "opaque"]}},
    "net": {
        "name": "densenet",
        "params": {"init_features": 4, "growth_rate": 4, "block_config": [1], "num_groups": 2},
    },
    "imaging": [{"name": "resize", "params": {"size": [16, 16]}}],
    "strategy": {"name": "fedavg"},
    "training": {
        "num_rounds": 3,
        "steps_per_round": 2,
        "sample_rate": 0.5,
        "learning_rate": 0.01,
    },
    "rounds": {"quorum": 1},
    "privacy": {"epsilon": 3.0, "delta": 0.005, "noise_multiplier": 6.0, "max_grad_norm": 1.0},
}
SHORT = StudyPlan.model_validate(PLAN)
LONG = StudyPlan.model_validate(
    PLAN
    | {
        "name": "long",
        "training": PLAN["training"] | {"num_rounds": 1, "steps_per_round": 20_000},
        "privacy": PLAN["privacy"] | {"noise_multiplier": 500.0},
    }
)
UNKNOWN = SHORT.model_copy(update={"name": "never-approved"})
NET = nets.make(SHORT.net.name, SHORT.net.params, seed=1, num_outputs=2)
WEIGHTS = flatten(weights_of(NET))


def letter(
    round_: int = 0,
    kind: str = "train",
    *,
    plan: StudyPlan = SHORT,
    key: Ed25519PrivateKey = COORDINATOR,
    weights: Array = WEIGHTS,
    **changed: Any,
) -> Letter:
    now = datetime.now(UTC)
    order = RoundOrder(
        study=digest(plan),
        round_=round_,
        kind=kind,
        site="north",
        weights_digest=digest_of(weights),
        issued_at=now,
        expires_at=now + timedelta(hours=1),
    )
    return seal(order.model_copy(update=changed), key=key, vector=weights)


class Office(NamedTuple):
    """Everything of one consortium of one hospital, in ``folder``."""

    folder: Path
    link: SuperLink
    node_key: str
    config_file: Path

    def run(
        self, name: str, letters: list[Letter], *, payload: bool = False, deadline_s: float = 30.0
    ) -> int:
        """Submit a run that sends ``letters``; with ``payload`` its bundle holds code."""
        folder = self.folder / name
        folder.mkdir()
        packed = [
            [*one[:4], [base64.b64encode(bucket).decode() for bucket in one.buckets]]
            for one in letters
        ]
        told = {"keys": {"north": self.node_key}, "letters": packed, "deadline_s": deadline_s}
        (folder / "letters.json").write_text(json.dumps(told))
        app_dir = asking_app(folder / "bundle")
        if payload:
            text = PAYLOAD.format(file=str(self.folder / "it-ran"))
            for module in ("client/__init__.py", "client/app.py", "torch.py", "sitecustomize.py"):
                (app_dir / module).parent.mkdir(exist_ok=True)
                (app_dir / module).write_text(text)
        return self.link.submit(app_dir, {"run-dir": str(folder)})

    def heard(self, name: str, run_id: int) -> list[dict[str, Any] | None]:
        """Return what the site said in a run that has ended, without the weights."""
        wait_until(lambda: self.link.status(run_id).is_finished)
        assert self.link.status(run_id).is_completed, self.link.status(run_id).details
        found = json.loads((self.folder / name / "heard.json").read_text())
        return [one and json.loads(one[1]) | {"is": one[0], "raw": one} for one in found]

    def entries(self) -> list[JournalEntry]:
        content = (self.config_file.parent / "state" / "journal.jsonl").read_bytes()
        assert journal.faults(content) == []
        return [line.entry for line in journal.parse(content)]

    def charges(self) -> list[tuple[str, int]]:
        found = ledger.read(self.config_file.parent / "state").reservations
        return [(entry.study, entry.round_) for entry in found]


def asking_app(folder: Path) -> Path:
    app_dir = thin_app(folder)
    project = app_dir / "pyproject.toml"
    project.write_text(project.read_text().replace("server.app:app", "sending:app"))
    return app_dir


def wait_until(condition: Callable[[], Any], *, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def workers() -> list[int]:
    """Return the processes that train for this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rsplit(")")[-1].split()[1]
            if int(parent) == os.getpid() and b"client.worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def hospital(folder: Path, *, address: str, authority: Path) -> tuple[Path, str]:
    """Make a hospital of drawn pictures that approved two plans; return site.toml and node key."""
    images, draw = folder / "images", np.random.Generator(np.random.PCG64(0))
    images.mkdir(parents=True)
    with (folder / "manifest.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "patient", "label", "split"])
        for number in range(NUM_TRAIN + NUM_TEST):
            pixels = draw.integers(0, 120 + 100 * (number % 2), (16, 16)).astype(np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.png")
            split = "train" if number < NUM_TRAIN else "test"
            writer.writerow([f"{number}.png", number, ("clear", "opaque")[number % 2], split])
    identity = setup.create_unenrolled(
        folder / "site",
        name="north",
        coordinator=public_key(COORDINATOR),
        address=address,
        root_certificates=authority,
        manifest=folder / "manifest.csv",
        root=images,
    )
    config = configs.read(folder / "site" / "site.toml")
    for plan in (SHORT, LONG):
        signed = SignedPlan(plan, sign(plan, key=COORDINATOR))
        assert studies.objections(signed, config, today=datetime.now(UTC).date()) == []
        studies.approve(signed, config, key=load_key(config.signing_key), who="Dr. Reed")
    return folder / "site" / "site.toml", identity.node


@contextmanager
def serving(config_file: Path, bundle: str) -> Iterator[None]:
    """Run the site's agent, with its worker, as ``consilia-site start`` does."""
    site, stop = configs.read(config_file), threading.Event()
    link = FleetLink(site.link.address, site.link.root_certificates, site.link.node_key, bundle)
    with open_site(config_file) as desk:

        def run(desk: Desk = desk) -> None:
            agent.run(link, desk.answer, stop=stop, refuse=desk.refuse, cancel=desk.cancel)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            desk.cancel()
            thread.join(30)
            assert not thread.is_alive()
    assert workers() == []


class Session(NamedTuple):
    """What was said in each run, what journal and ledger hold then, and how long it took."""

    said: dict[str, list[Any]]
    entries: list[JournalEntry]
    charges: list[tuple[str, int]]
    seconds: dict[str, float]
    it_ran: bool


OTHER = letter(weights=-WEIGHTS)
FORGED = {
    "signed by a stranger": (letter(key=STRANGER), "bad-signature"),
    "signed by nobody": (letter()._replace(key="", signature=""), "bad-signature"),
    "changed on its way": (letter()._replace(document=letter(1).document), "bad-signature"),
    "of a plan nobody approved": (letter(plan=UNKNOWN), "not-approved"),
    "for another site": (letter(site="south"), "bad-order"),
    "with other weights": (
        letter()._replace(buckets=letter(weights=-WEIGHTS).buckets),
        "bad-order",
    ),
    "with weights of another net": (letter(weights=WEIGHTS[1:]), "bad-order"),
    "with weights a hundred times as large": (letter(weights=np.tile(WEIGHTS, 100)), "bad-order"),
    "late": (letter(expires_at=datetime.now(UTC) - timedelta(seconds=1)), "expired"),
    "of tomorrow": (letter(issued_at=datetime.now(UTC) + timedelta(days=1)), "bad-order"),
    "past the last round": (letter(3), "out-of-order"),
}
REPLAYED = [letter(0), letter(1), letter(1), letter(0), letter(3, "evaluate")]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Let a hostile coordinator try everything, once."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "modules").mkdir()
    (folder / "modules" / "sending.py").write_text(SERVER_APP)
    bundle = hashlib.sha256(build_fab_from_disk(asking_app(folder / "known"))).hexdigest()
    tls, port = certificates(folder / "tls", hosts=["127.0.0.1"]), free_port()
    config_file, node_key = hospital(
        folder / "north", address=f"127.0.0.1:{port}", authority=tls.authority
    )
    said, seconds = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parents[2]
        patch.setenv("PYTHONPATH", f"{folder / 'modules'}{os.pathsep}{here}")
        with superlink(folder, tls=tls, port=port, log_file=folder / "superlink.log") as link:
            link.register(node_key, "north")
            office = Office(folder, link, node_key, config_file)
            with serving(config_file, bundle):
                forged = office.run("forged", [one for one, _ in FORGED.values()] + REPLAYED)
                said["forged"] = office.heard("forged", forged)
                said["payload"] = office.heard(
                    "payload", office.run("payload", [letter(2)], payload=True)
                )
                said["killed"], seconds["killed"] = _killed(office)
                seconds["stopped"] = _stopped(office)
                said["after"] = office.heard("after", office.run("after", [letter(3, "evaluate")]))
            with serving(config_file, bundle):
                restarted = office.run("restarted", [letter(0), letter(2)])
                said["restarted"] = office.heard("restarted", restarted)
    yield Session(said, office.entries(), office.charges(), seconds, (folder / "it-ran").exists())


def _begin(office: Office, name: str, letters: list[Letter]) -> tuple[int, int]:
    """Submit a run of a long training; return its id, and that of the process, when it trains."""
    known = len(office.charges())
    run_id = office.run(name, letters, deadline_s=120.0)
    wait_until(lambda: len(office.charges()) > known)
    wait_until(lambda: office.entries()[-1].kind == "reservation")
    (worker,) = workers()
    before = cpu_ticks(worker)
    wait_until(lambda: cpu_ticks(worker) > before + 20)
    return run_id, worker


def cpu_ticks(pid: int) -> int:
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()
    return int(words[11])


def _killed(office: Office) -> tuple[list[Any], float]:
    """Kill the worker in the middle of a training, as the kernel does when memory is short."""
    run_id, worker = _begin(office, "killed", [letter(plan=LONG), letter(3, "evaluate")])
    start = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    wait_until((office.folder / "killed" / "heard.json").exists)
    seconds = time.monotonic() - start
    return office.heard("killed", run_id), seconds


def _stopped(office: Office) -> float:
    """Stop a run in the middle of a training and return how long the site trains on."""
    run_id, worker = _begin(office, "stopped", [letter(plan=LONG, weights=-WEIGHTS)])
    start = time.monotonic()
    assert office.link.stop(run_id)
    wait_until(lambda: worker not in workers())
    return time.monotonic() - start


def codes(said: list[Any]) -> list[str | None]:
    return [one["code"] if one["is"] == "refusal" else None for one in said]


pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_order_is_answered_with_a_refusal_that_is_journalled(
    name: str, session: Session
) -> None:
    number, (_, code) = list(FORGED).index(name), FORGED[name]
    assert codes(session.said["forged"])[number] == code
    refused = [entry.code for entry in session.entries if entry.kind == "refusal"]
    assert refused[number] == code


def test_an_order_replayed_is_answered_with_the_same_bytes_and_an_earlier_round_refused(
    session: Session,
) -> None:
    first, second, again, earlier, evaluated = session.said["forged"][len(FORGED) :]
    assert codes([first, second, again, evaluated]) == [None] * 4
    assert again["raw"] == second["raw"] != first["raw"]
    assert earlier["code"] == "out-of-order"


def test_an_order_of_a_run_whose_bundle_holds_code_is_refused_and_the_code_never_runs(
    session: Session,
) -> None:
    (refused,) = session.said["payload"]
    assert refused["code"] == "bad-order"
    assert (refused["study"], refused["round_"]) == ("0" * 64, 0)  # nothing of it was read
    assert not session.it_ran


def test_a_worker_killed_in_training_is_a_refusal_and_the_site_goes_on(session: Session) -> None:
    assert codes(session.said["killed"]) == ["failed", None]
    assert session.seconds["killed"] < 10


def test_the_work_for_a_run_that_was_stopped_is_ended_and_the_site_goes_on(
    session: Session,
) -> None:
    assert session.seconds["stopped"] < 10
    assert codes(session.said["after"]) == [None]


def test_an_earlier_round_is_refused_by_an_agent_started_anew(session: Session) -> None:
    assert codes(session.said["restarted"]) == ["out-of-order", None]


def test_what_was_trained_was_charged_and_nothing_else(session: Session) -> None:
    short, long = digest(SHORT), digest(LONG)
    assert session.charges == [(short, 0), (short, 1), (long, 0), (long, 0), (short, 2)]
    committed = [(e.study, e.round_) for e in session.entries if e.kind == "commit"]
    assert committed == [(short, 0), (short, 1), (short, 2)]


def test_the_known_bundle_is_what_the_coordinator_submits(tmp_path: Path) -> None:
    bundle = build_fab_from_disk(thin_app(tmp_path))
    assert hashlib.sha256(bundle).hexdigest() == BUNDLE_DIGEST

"""What a study comes to, whatever is killed while it runs: real processes throughout.

Two hospitals' agents stay up from test to test, as they do in life; each test runs a study of its
own. Without noise it differs from the undisturbed one in its name only, so its weights should not
differ. With noise, every charge has to stand in the ledgers. Run as a script, this file is a
conductor to be killed.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from client import config as configs
from client import ledger, setup, studies
from server import link, report, store
from server.conduct import News, Place, conduct
from server.consortium import TlsFiles, certificates
from server.hospitals import DataSet, adopt, write_manifests
from shared_models import plan as plans
from shared_models.audit import audit_run, audit_site
from shared_models.contracts import Reservation, RoundRecord
from shared_models.plan import PrivacyTerms, SignedPlan, StudyPlan
from shared_models.privacy import statement
from shared_models.signing import create_key, digest, load_key, public_key, sign

SITES = ("east", "north")
NUM_ROUNDS = 4
TRAINING = {
    "num_rounds": NUM_ROUNDS,
    "steps_per_round": 60,  # what is private is slow enough to be disturbed
    "sample_rate": 0.5,
    "learning_rate": 0.01,
}


class Hospital:
    """One hospital's folder and its agent, which is killed and started here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = configs.read(folder / "site.toml")
        self.agent = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "client.cli", "start"]
        with (self.folder / "agent.log").open("ab") as log_file:
            return subprocess.Popen(
                [*command, "--config", str(self.folder / "site.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
            )

    def kill_and_restart(self) -> None:
        self.agent.kill()
        self.agent.wait(10)
        self.agent = self._started()

    def stop_and_restart(self) -> None:
        self.agent.send_signal(signal.SIGTERM)
        assert self.agent.wait(20) == 0, "it was not stopped, it ended"
        self.agent = self._started()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The journal's entries, oldest first."""
        lines = (self.config.state_dir / "journal.jsonl").read_bytes().splitlines()
        return [json.loads(line)["entry"] for line in lines]

    def end(self) -> None:
        self.agent.send_signal(signal.SIGCONT)
        self.agent.kill()
        self.agent.wait(10)

    def approve(self, signed: SignedPlan) -> str:
        key = load_key(self.config.signing_key)
        return studies.approve(signed, self.config, key=key, who="test").model_dump_json()

    def has_in_hand(self, study: str, *, round_: int, is_charged: bool) -> bool:
        """Whether the agent is at this very moment training for that round."""
        entry = self.entries[-1]
        told = (entry["kind"], entry["study"], entry["round_"], entry["order_kind"])
        return told == ("reservation" if is_charged else "order", study, round_, "train")


class Consortium(NamedTuple):
    """Two hospitals whose agents run, and the coordinator's keys, data and place."""

    folder: Path
    data: DataSet
    place: Place
    key: Ed25519PrivateKey
    hospitals: dict[str, Hospital]
    settings: store.RunSettings


def drawn(folder: Path) -> Path:
    """Draw 12 patients to train on, 4 to test on and 3 of the coordinator's own for each site."""
    folder.mkdir()
    splits = ["train"] * 12 + ["test"] * 4 + ["val"] * 3
    with (folder / "manifest.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "patient", "site", "finding", "split"])
        for number, (site, (n, split)) in enumerate(
            (site, each) for site in SITES for each in enumerate(splits)
        ):
            pixels = np.random.default_rng(number).integers(0, 99, (12, 12)) + 99 * (n % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", f"{site}-{n}", site, n % 2, split])
    return folder


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    folder = tmp_path_factory.mktemp("consortium")
    data = adopt(drawn(folder / "pictures"), labels="class")
    tls = certificates(folder / "tls", hosts=["127.0.0.1"])
    place = Place(folder / "office", tls, "127.0.0.1", link.free_port())
    key = create_key(folder / "signing.pem")
    dirs = {site: folder / site for site in SITES}
    identities = {
        site: setup.create_unenrolled(
            site_dir,
            name=site,
            coordinator=public_key(key),
            address=f"127.0.0.1:{place.port}",
            root_certificates=tls.authority,
            manifest=site_dir / "manifest.csv",
            root=data.root,
            allow_without_privacy=True,
        )
        for site, site_dir in dirs.items()
    }
    write_manifests(data, site_dirs=dirs, validation=folder / "validation.csv", start=None)
    settings = store.RunSettings(
        signing_key=folder / "signing.pem",
        sites={
            site: store.SiteKeys(signing=found.signing, node=found.node)
            for site, found in identities.items()
        },
        validation_manifest=folder / "validation.csv",
        validation_root=data.root,
    )
    hospitals = {site: Hospital(site_dir) for site, site_dir in dirs.items()}
    yield Consortium(folder, data, place, key, hospitals, settings)
    for hospital in hospitals.values():
        hospital.end()
    assert link._marked(link._mark_of(place.folder / "superlink")) == []


def laid_out(
    consortium: Consortium, name: str, *, privacy: PrivacyTerms | None = None, **rounds: Any
) -> Path:
    """Make the run directory of a study of that name, approved by both hospitals."""
    plan = StudyPlan(
        name=name,
        purpose="research",
        coordinator=public_key(consortium.key),
        sites=SITES,
        expires=date(2099, 1, 1),
        task={"name": "classification", "params": {"classes": consortium.data.classes}},
        net={
            "name": "densenet",
            "params": {"init_features": 4, "growth_rate": 4, "block_config": [1]},
        },
        imaging=[{"name": "resize", "params": {"size": [8, 8]}}],
        strategy={"name": "fedavgm", "params": {"momentum": 0.5}},
        training=TRAINING | ({} if privacy else {"steps_per_round": 300}),
        privacy=privacy,
        rounds={"quorum": 2} | rounds,
    )
    signed = SignedPlan(plan, sign(plan, key=consortium.key))
    run_dir = consortium.folder / "studies" / name
    (run_dir / "approvals").mkdir(parents=True)
    (run_dir / "plan.toml").write_text(plans.render(*signed))
    for site, hospital in consortium.hospitals.items():
        (run_dir / "approvals" / f"{site}.json").write_text(hospital.approve(signed))
    store.write_settings(run_dir, consortium.settings)
    return run_dir


@contextmanager
def conducted(place: Place, run_dir: Path) -> Iterator[Iterator[News]]:
    keys = {site: key.node or "" for site, key in store.read_settings(run_dir).sites.items()}
    with closing(
        conduct(place, studies=lambda: [run_dir], enrolled=lambda: keys, stop=Event())
    ) as news:
        yield news


def run(consortium: Consortium, run_dir: Path, *deeds: Callable[[], bool]) -> list[str]:
    """Run a study to its end; each deed is tried, in turn, until it says that it is done.

    Returns:
        What happened, in the conductor's words.
    """
    left, seen = list(deeds), list[str]()
    until = time.monotonic() + 240
    with conducted(consortium.place, run_dir) as news:
        for each in news:
            assert time.monotonic() < until, seen
            assert each.kind != "failed", each.text
            seen += [each.kind] * (each.kind != "idle")
            if left and left[0]():
                left.pop(0)
            if each.kind == "done":
                assert not left, "the study ended before it was disturbed"
                return seen
    raise AssertionError(f"it ended: {seen}")


def in_hand(consortium: Consortium, run_dir: Path, site: str, *, round_: int) -> bool:
    plan = store.read_plan(run_dir).plan
    is_charged = plan.privacy is not None
    return consortium.hospitals[site].has_in_hand(
        digest(plan), round_=round_, is_charged=is_charged
    )


def once_in_hand(
    consortium: Consortium, run_dir: Path, deed: Callable[[], Any], *, site: str, round_: int
) -> Callable[[], bool]:
    """Return what does ``deed`` as soon as ``site`` trains for that round."""

    def attempt() -> bool:
        if not in_hand(consortium, run_dir, site, round_=round_):
            return False
        deed()
        return True

    return attempt


def kill(place: Place, program: str) -> None:
    """Kill -9 the one process of the SuperLink's that runs ``program``."""
    found = [
        pid
        for pid in link._marked(link._mark_of(place.folder / "superlink"))
        if program in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    ]
    assert len(found) == 1, (program, found)
    os.kill(found[0], signal.SIGKILL)


def trained(run_dir: Path) -> list[RoundRecord]:
    return [record for record in store.read_rounds(run_dir) if record.kind == "train"]


def check(run_dir: Path, undisturbed: Path) -> None:
    """Insist on the undisturbed run's weights, on every round once, and on every site in each."""
    weights = [d / "model" / "weights.safetensors" for d in (run_dir, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    digests = [[record.weights_digest for record in trained(d)] for d in (run_dir, undisturbed)]
    assert digests[0] == digests[1]
    for record in store.read_rounds(run_dir):
        assert [reply.site for reply in record.replies] == list(SITES)
        assert record.refusals == ()
    assert audit_run(run_dir).failed == ()
    assert not (run_dir / "failed.txt").exists()


@pytest.fixture(scope="module")
def undisturbed(consortium: Consortium) -> Path:
    run_dir = laid_out(consortium, "undisturbed")
    seen = run(consortium, run_dir)
    assert seen == ["up", "begun", *["round"] * (NUM_ROUNDS + 1), "done"]
    return run_dir


def test_a_site_a_server_app_and_a_superlink_killed_amid_their_rounds_change_nothing(
    consortium: Consortium, undisturbed: Path
) -> None:
    """And a site that is stopped, whose order can be given to it again."""
    run_dir = laid_out(consortium, "killed")
    place, north = consortium.place, consortium.hospitals["north"]
    deeds: list[tuple[str, Callable[[], Any]]] = [
        ("north", north.kill_and_restart),
        ("east", lambda: kill(place, "flwr-serverapp")),
        ("north", lambda: kill(place, "server.fleet")),
        ("north", north.stop_and_restart),
    ]
    seen = run(
        consortium,
        run_dir,
        *[
            once_in_hand(consortium, run_dir, deed, site=site, round_=round_)
            for round_, (site, deed) in enumerate(deeds)
        ],
    )
    assert [each for each in seen if each != "round"] == [
        *("up", "begun", "again", "begun"),
        *("down", "up", "begun", "done"),
    ]
    check(run_dir, undisturbed)
    kinds = [entry["kind"] for entry in north.entries]
    broken_off = kinds.index("stopped")
    assert kinds[broken_off - 2 : broken_off + 2] == ["order", "refusal", "stopped", "started"]


def test_a_coordinator_and_a_site_killed_amid_a_private_round_are_charged_and_none_goes_free(
    consortium: Consortium,
) -> None:
    privacy = PrivacyTerms(epsilon=8.0, delta=0.001, noise_multiplier=12.0, max_grad_norm=1.0)
    run_dir = laid_out(consortium, "private", privacy=privacy)
    place, north = consortium.place, consortium.hospitals["north"]
    with conducted_elsewhere(place, run_dir) as conductor:
        until = time.monotonic() + 180
        while not in_hand(consortium, run_dir, "north", round_=1):
            assert conductor.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        conductor.kill()
        assert conductor.wait(10) == -signal.SIGKILL
    assert link._marked(link._mark_of(place.folder / "superlink")), "it left nothing behind"
    killed = once_in_hand(consortium, run_dir, north.kill_and_restart, site="north", round_=2)
    assert "done" in run(consortium, run_dir, killed)
    assert [len(record.replies) for record in trained(run_dir)] == [len(SITES)] * NUM_ROUNDS
    assert audit_run(run_dir).failed == ()
    told = {site.name: site.epsilon for site in report.read(run_dir / report.JSON_NAME).sites}
    for site, hospital in consortium.hospitals.items():
        assert audit_site(hospital.folder).failed == ()
        charged = charged_rounds(hospital, run_dir)
        assert set(charged) == set(range(NUM_ROUNDS))
        assert site == "east" or charged.count(2) == 2, "what was killed was charged and stays so"
        events = [one.event for one in charges(hospital, run_dir)]
        assert told[site] == statement(events, delta=privacy.delta).epsilon
        assert left(hospital, run_dir) <= committed(hospital)
        assert len(left(hospital, run_dir)) == NUM_ROUNDS


@contextmanager
def conducted_elsewhere(place: Place, run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the study by a conductor in a process of its own."""
    told = {"place": [str(place.folder), *map(str, place.tls), place.host, place.port]}
    command = [sys.executable, __file__, json.dumps(told), str(run_dir)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as conductor:
        try:
            yield conductor
        finally:
            conductor.kill()


def charges(hospital: Hospital, run_dir: Path) -> list[Reservation]:
    study = digest(store.read_plan(run_dir).plan)
    found = ledger.read(hospital.config.state_dir).reservations
    return [one for one in found if one.study == study]


def charged_rounds(hospital: Hospital, run_dir: Path) -> list[int]:
    return [one.round_ for one in charges(hospital, run_dir)]


def left(hospital: Hospital, run_dir: Path) -> set[str]:
    """Return the digests of the updates that left the hospital for the study, by its journal."""
    study = digest(store.read_plan(run_dir).plan)
    about = {"kind": "reply", "study": study, "order_kind": "train"}
    return {entry["digest"] for entry in hospital.entries if about.items() <= entry.items()}


def committed(hospital: Hospital) -> set[str]:
    return {one.reply for one in ledger.read(hospital.config.state_dir).commits}


def test_a_site_that_misses_a_deadline_is_named_and_takes_part_again(
    consortium: Consortium,
) -> None:
    """In the next round, or in the one after if its worker takes that long to start anew."""
    run_dir = laid_out(consortium, "late", quorum=1, deadline_s=20.0)
    agent = consortium.hospitals["north"].agent

    def goes_on() -> bool:
        if len(trained(run_dir)) < 2:
            return False
        agent.send_signal(signal.SIGCONT)
        return True

    stops = once_in_hand(
        consortium, run_dir, lambda: agent.send_signal(signal.SIGSTOP), site="north", round_=1
    )
    run(consortium, run_dir, stops, goes_on)
    took_part = [sorted(reply.site for reply in record.replies) for record in trained(run_dir)]
    assert took_part[:2] == [[*SITES], ["east"]]
    assert [*SITES] in took_part[2:]
    (refusal,) = trained(run_dir)[1].refusals
    assert (refusal.site, refusal.code) == ("north", "no-answer")


def main(told: Mapping[str, Any], run_dir: Path) -> None:
    folder, *tls, host, port = told["place"]
    place = Place(Path(folder), TlsFiles(*map(Path, tls)), host, port)
    with conducted(place, run_dir) as news:
        for _ in news:
            pass


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))

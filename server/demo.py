"""One command, a whole consortium on one machine: real processes, real TLS, real approvals.

Everything is done as people will do it: each hospital makes its own keys and approves the plan with
``consilia-site``, the coordinator starts a SuperLink, enrols the hospitals' nodes and submits the
study through Flower. Every process is stopped at the end, on Ctrl-C and on an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from server import link, recipes, report, start, store
from server.conduct import Place, conduct
from server.consortium import TlsFiles, certificates
from server.follow import Progress, show
from server.hospitals import DataSet, adopt, join, write_manifests
from shared_models import phantoms
from shared_models import plan as plans
from shared_models.contracts import StudyReport
from shared_models.errors import MachineError, RunError
from shared_models.plan import StudyPlan
from shared_models.signing import create_key, public_key, sign

NEEDED_BYTES = 300 * 2**20
STOP_S = 8.0
PHANTOM_NOTE = "The images are phantoms made for this demonstration; no patient is behind them."
ONE_MACHINE_NOTE = (
    "Demonstration: all hospitals ran as processes on one machine, and the coordinator saw the "
    "manifests it handed out to them."
)
START_NOTE = (
    "The model began from weights trained without privacy on {number} patients of the "
    "coordinator's own, as if it might use their images; no epsilon covers them, and none of them "
    "validated it."
)


class Options(NamedTuple):
    """What the person asked for; ``data`` None means phantoms, ``epsilon`` None no privacy."""

    out: Path
    task: str
    data: Path | None = None
    num_rounds: int | None = None
    epsilon: float | None = 8.0
    seed: int = 0
    num_phantoms: int | None = None
    classes: tuple[str, ...] = ()


class Office(NamedTuple):
    """The coordinator's own folder and what it prepared there."""

    folder: Path
    plan: StudyPlan
    tls: TlsFiles
    port: int
    site_dirs: Mapping[str, Path]
    identities: Mapping[str, Mapping[str, str]]


def run(options: Options, progress: Progress) -> StudyReport:
    """Run the demonstration and return its report; results lie in ``options.out``.

    Raises:
        ConsiliaError: with the cure. If the study never started, nothing has been left behind; if
            it did, its folder is kept, for its logs.
    """
    check_room(options.out)
    recipes.check_task(options.task)
    data = None
    if options.data is not None:
        data = adopt(options.data, labels=recipes.labels_of(options.task), classes=options.classes)
    with _removed_on_failure(options.out):
        office = _prepared(options, data, progress)
    with ExitStack() as stack:
        _conduct(options.out, office, progress, stack)
    return report.read(options.out / "report.json")


@contextmanager
def _removed_on_failure(out: Path) -> Iterator[None]:
    """Take away what was written to ``out``, and ``out`` if it is new, should anything fail."""
    is_new = not out.exists()
    try:
        yield
    except BaseException as error:
        for entry in [out] if is_new else list(out.iterdir()):
            shutil.rmtree(entry, ignore_errors=True)
        if isinstance(error, OSError):
            raise MachineError(
                f"cannot write to {out}: {error.strerror}; free some space or choose another --out"
            ) from error
        raise


def check_room(out: Path) -> None:
    """Refuse an out folder that holds something, cannot be made, or has no space.

    Raises:
        MachineError: with the cure.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MachineError(f"{out} is not an empty folder; choose another --out or remove it")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise MachineError(f"cannot write to {parent}; choose another --out")
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        raise MachineError(
            f"{parent} has {free // 2**20} MB free, the demonstration needs "
            f"{NEEDED_BYTES // 2**20}; free some space or choose another --out"
        )


def _phantoms(options: Options, progress: Progress) -> DataSet:
    """Make three hospitals of phantom DICOM and join their manifests."""
    folder = options.out / "phantoms"
    folder.mkdir(parents=True)
    progress.stage("writing phantom hospitals (DICOM)")
    phantoms.write_hospitals(folder, seed=options.seed, num_patients=options.num_phantoms)
    classes = phantoms.LABELS if options.task == "segmentation" else ("no lesion", "lesion")
    return adopt(join(folder), labels=recipes.labels_of(options.task), classes=classes)


def _prepared(options: Options, data: DataSet | None, progress: Progress) -> Office:
    """Make everything the study needs before its first process: data, keys, plan, settings."""
    out, folder = options.out, options.out / "coordinator"
    data = data or _phantoms(options, progress)
    folder.mkdir(parents=True)
    progress.stage("making certificates and keys")
    key = create_key(folder / "signing.pem")
    tls = certificates(folder / "tls", hosts=["127.0.0.1", "localhost"])
    port = link.free_port()
    site_dirs = {site: out / "sites" / site for site in data.sites}
    terms = recipes.start_terms(data, task=options.task, epsilon=options.epsilon)
    write_manifests(
        data,
        site_dirs=site_dirs,
        validation=folder / "validation.csv",
        start=None if terms is None else folder / "start.csv",
    )
    plan = recipes.plan_for(
        data,
        name=f"demo-{options.task}",
        task=options.task,
        coordinator=public_key(key),
        seed=options.seed,
        epsilon=options.epsilon,
        num_rounds=options.num_rounds,
    )
    notes = [ONE_MACHINE_NOTE] + [PHANTOM_NOTE] * (options.data is None)
    if terms is not None:
        progress.stage("a warm start on the coordinator's own images")
        plan, number = start.warmed(
            plan, folder / "start.csv", root=data.root, run_dir=out, terms=terms
        )
        notes.append(START_NOTE.format(number=number))
    identities = _init_sites(options, data, site_dirs, tls, port, public_key(key))
    (out / "plan.toml").write_text(plans.render(plan, sign(plan, key=key)), encoding="utf-8")
    store.write_settings(out, _settings(options, data, folder, identities, notes))
    return Office(folder, plan, tls, port, site_dirs, identities)


def _conduct(out: Path, office: Office, progress: Progress, stack: ExitStack) -> None:
    """Start everything, run the study, and leave the stopping to ``stack``."""
    progress.stage("starting the SuperLink; hospitals judge and approve the plan")
    if office.plan.rounds.secure_aggregation:
        _introduce(office.site_dirs, office.identities)
    approvals = _start_approvals(out, office.site_dirs)
    place = Place(office.folder, office.tls, "127.0.0.1", office.port)
    keys = {site: identity["node"] for site, identity in office.identities.items()}
    wanted, agents = list[Path](), dict[str, subprocess.Popen[bytes]]()
    conducted = conduct(
        place, studies=lambda: wanted, enrolled=lambda: keys, stop=threading.Event()
    )
    for news in stack.enter_context(closing(conducted)):
        if news.kind == "up" and not wanted:
            _collect_approvals(out, approvals)
            agents = stack.enter_context(_agents(office.site_dirs))
            progress.stage("federated rounds", total=office.plan.training.num_rounds)
            wanted.append(out)
        elif news.kind == "round":
            show(store.read_rounds(out), office.plan, progress)
        elif news.kind == "done":
            return
        elif news.kind == "failed":
            raise RunError(news.text)
        _insist(agents, out)


def _init_sites(
    options: Options,
    data: DataSet,
    site_dirs: Mapping[str, Path],
    tls: TlsFiles,
    port: int,
    coordinator: str,
) -> dict[str, dict[str, str]]:
    """Let each hospital make its own keys and configuration; return their public halves."""
    started = {}
    for site, folder in site_dirs.items():
        arguments = ["init", str(folder), "--name", site, "--coordinator", coordinator]
        arguments += [
            "--address",
            f"127.0.0.1:{port}",
            "--root-certificates",
            str(tls.authority.resolve()),
        ]
        arguments += [
            "--manifest",
            str((folder / "manifest.csv").resolve()),
            "--root",
            str(data.root),
        ]
        arguments += ["--max-epsilon", str(options.epsilon or 8.0), "--json"]
        arguments += ["--allow-without-privacy"] if options.epsilon is None else []
        started[site] = _site(arguments)
    return {site: json.loads(_finished(process, site)) for site, process in started.items()}


def _settings(
    options: Options,
    data: DataSet,
    office: Path,
    identities: Mapping[str, Mapping[str, str]],
    notes: Sequence[str],
) -> store.RunSettings:
    is_phantom = options.data is None
    return store.RunSettings(
        signing_key=(office / "signing.pem").resolve(),
        sites={
            site: store.SiteKeys(signing=found["signing"], node=found["node"])
            for site, found in identities.items()
        },
        validation_manifest=(office / "validation.csv").resolve(),
        validation_root=data.root,
        data=f"phantoms, seed {options.seed}" if is_phantom else f"the data set {data.root.name}",
        notes=tuple(notes),
    )


def _introduce(site_dirs: Mapping[str, Path], identities: Mapping[str, Mapping[str, str]]) -> None:
    """Let each hospital trust the others, which people do after comparing keys by phone."""
    started = {}
    for site, folder in site_dirs.items():
        pairs = [f"{name}={found['signing']}" for name, found in identities.items() if name != site]
        started[site] = _site(["trust", *pairs, "--config", str(folder / "site.toml")])
    for site, process in started.items():
        _finished(process, site)


def _start_approvals(out: Path, site_dirs: Mapping[str, Path]) -> dict[str, subprocess.Popen[str]]:
    """Let each hospital judge and countersign the plan, all at once."""
    (out / "approvals").mkdir()
    plan = str(out / "plan.toml")
    return {
        site: _site(
            ["approve", plan, "--config", str(folder / "site.toml"), "--who", "demo", "--json"]
        )
        for site, folder in site_dirs.items()
    }


def _collect_approvals(out: Path, approvals: Mapping[str, subprocess.Popen[str]]) -> None:
    for site, process in approvals.items():
        (out / "approvals" / f"{site}.json").write_text(_finished(process, site), encoding="utf-8")


def _insist(agents: Mapping[str, subprocess.Popen[bytes]], out: Path) -> None:
    """Insist that every hospital's agent is running.

    Raises:
        RunError: if one has ended.
    """
    for site, process in agents.items():
        if process.poll() is not None:
            raise RunError(f"the agent of {site} ended; see {out / 'sites' / site / 'agent.log'}")


@contextmanager
def _agents(site_dirs: Mapping[str, Path]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run one ``consilia-site start`` for each hospital; stop them all at the end."""
    agents: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for site, folder in site_dirs.items():
            with (folder / "agent.log").open("wb") as log_file:
                agents[site] = subprocess.Popen(
                    [*_command(), "start", "--config", str(folder / "site.toml")],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        yield agents
    finally:
        _stop(list(agents.values()))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_S
    for process in processes:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _command() -> list[str]:
    return [sys.executable, "-m", "client.cli"]


def _site(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*_command(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finished(process: subprocess.Popen[str], site: str) -> str:
    """Return what a command of a hospital printed.

    Raises:
        RunError: with what it said if it did not exit 0.
    """
    printed, complaint = process.communicate()
    if process.returncode != 0:
        lines = [line for line in (complaint + printed).splitlines() if line.strip()]
        raise RunError([f"{site}: {line}" for line in lines[-10:]])
    return printed

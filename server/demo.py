"""One command, a whole consortium on one machine: real processes, real TLS, real decisions.

Everything is done as people will do it, by the commands they will use. The coordinator opens an
office and serves it; each hospital joins by an invite, with keys it makes itself, and is let in by
the words that both sides read; its agent is started and hears of the study; it approves, and the
study is run. What people would do, compare words and decide, the demonstration does and says so.
Every process is stopped at the end, on Ctrl-C and on an error.

The out folder: ``coordinator/`` is the office, ``sites/`` the hospitals' folders; what the study
left (``store.py``) is copied from the office beside them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from threading import Event
from typing import NamedTuple

from server import desk, link, recipes, report, settings, start
from server.crew import Crew, Process, crew, said
from server.follow import Progress, follow
from server.hospitals import DataSet, adopt, join, write_manifests
from shared_models import phantoms
from shared_models import plan as plans
from shared_models.contracts import StudyReport
from shared_models.errors import MachineError, RunError
from shared_models.plan import StudyPlan

NEEDED_BYTES = 300 * 2**20
VISIT_EVERY_S = 2.0  # hospitals ask the coordinator's news less often in earnest
PATIENCE_S = 120.0  # for what takes seconds, on a machine that has much else to do
WHO = "the demonstration"
PHANTOM_NOTE = "The images are phantoms made for this demonstration; no patient is behind them."
ONE_MACHINE_NOTE = (
    "Demonstration: all hospitals ran as processes on one machine, the coordinator saw the "
    "manifests it handed out to them, and no person compared words or decided."
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


class Stage(NamedTuple):
    """What it all happens on: the processes, the data, and the folders of either side."""

    crew: Crew
    progress: Progress
    data: DataSet
    office: Path
    site_dirs: Mapping[str, Path]

    def config(self, site: str) -> Path:
        """Return a hospital's ``site.toml``."""
        return self.site_dirs[site] / "site.toml"


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
        labels = recipes.labels_of(options.task, options.data)
        data = adopt(options.data, labels=labels, classes=options.classes)
    has_begun = Event()
    with _removed_on_failure(options.out, unless=has_begun), crew() as hired:
        data = data or _phantoms(options, progress)
        site_dirs = {site: options.out / "sites" / site for site in data.sites}
        stage = Stage(hired, progress, data, options.out / "coordinator", site_dirs)
        coordinator = _open_office(stage)
        plan, terms = _planned(options, data, coordinator)
        own = stage.office / "start.csv" if terms else None
        write_manifests(
            data, site_dirs=site_dirs, validation=stage.office / "validation.csv", start=own
        )
        _enrol(stage, plan, options)
        study, run_dir = _propose(stage, plan, terms, options)
        _decide(stage, study, run_dir)
        has_begun.set()
        _coordinator("run", study, "--office", stage.office, "--no-follow")
        follow(run_dir, progress, meanwhile=hired.insist)
    kept = shutil.ignore_patterns("*.lock", "wanted")
    shutil.copytree(run_dir, options.out, dirs_exist_ok=True, ignore=kept)
    return report.read(options.out / report.JSON_NAME)


@contextmanager
def _removed_on_failure(out: Path, *, unless: Event) -> Iterator[None]:
    """Take away what was written to ``out``, and ``out`` if it is new, should anything fail."""
    is_new = not out.exists()
    try:
        yield
    except BaseException as error:
        if unless.is_set():
            raise
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
    join(folder)
    labels = recipes.labels_of(options.task, folder)
    names = {"map": phantoms.LABELS, "class": ("no lesion", "lesion")}
    return adopt(folder, labels=labels, classes=names.get(labels, ()))


def _open_office(stage: Stage) -> str:
    """Open the coordinator's office; return its public key."""
    stage.progress.stage("the coordinator opens its office")
    office = stage.office
    office.parent.mkdir(parents=True, exist_ok=True)
    ports = set[int]()
    while len(ports) < 3:
        ports.add(link.free_port())
    fleet, control, enrolment = (f"127.0.0.1:{port}" for port in ports)
    made = _coordinator(
        *("init", office, "--name", "Demonstration", "--fleet", fleet),
        *("--control", control, "--enrolment", enrolment),
    )
    _edit(office / settings.FILE, "0.0.0.0", "127.0.0.1")
    return made.split()[-1]


def _planned(
    options: Options, data: DataSet, coordinator: str
) -> tuple[StudyPlan, start.StartTerms | None]:
    """Return the plan to propose, and how to train the warm start it is to state, if any."""
    plan = recipes.plan_for(
        data,
        name=f"demo-{options.task}",
        task=options.task,
        coordinator=coordinator,
        seed=options.seed,
        epsilon=options.epsilon,
        num_rounds=options.num_rounds,
    )
    return plan, recipes.start_terms(data, task=options.task, epsilon=options.epsilon)


def _enrol(stage: Stage, plan: StudyPlan, options: Options) -> None:
    """Serve the office, let every hospital join by an invite, and start its agent."""
    log_file = stage.office / "serve.log"
    stage.crew.start("the coordinator", "server.cli", "serve", stage.office, log_file=log_file)
    stage.progress.stage("hospitals join, by words read out", total=len(stage.site_dirs))
    joining = {site: _joining(stage, site, options) for site in stage.site_dirs}
    for site, process in joining.items():
        _let_in(stage, site, process)
    trusted = {}
    for number, (site, process) in enumerate(joining.items(), start=1):
        trusted[site] = _ended(stage, site, process).split()[-1]
        stage.progress.advance(number)
    if plan.rounds.secure_aggregation:
        _introduce(stage, trusted)
    for site, folder in stage.site_dirs.items():
        config = stage.config(site)
        _edit(config, "visit_every_s = 20.0", f"visit_every_s = {VISIT_EVERY_S}")
        log_file = folder / "agent.log"
        name, arguments = f"the agent of {site}", ("start", "--config", config)
        stage.crew.start(name, "client.cli", *arguments, log_file=log_file)


def _joining(stage: Stage, site: str, options: Options) -> Process:
    """Invite a hospital, and let it ask to join."""
    folder, invite = stage.site_dirs[site], stage.office / f"{site}.invite.json"
    _coordinator("invite", site, "--office", stage.office, "--out", invite)
    arguments: list[str | Path] = [
        "join",
        invite,
        "--folder",
        folder,
        "--wait",
        str(PATIENCE_S / 60),
    ]
    arguments += ["--manifest", folder / "manifest.csv", "--root", stage.data.root]
    arguments += ["--max-epsilon", str(options.epsilon or 8.0)]
    arguments += ["--allow-without-privacy"] if options.epsilon is None else []
    return stage.crew.command("client.cli", *arguments)


def _let_in(stage: Stage, site: str, process: Process) -> None:
    """Compare the words at the hospital with those at the office, and let it in by them."""
    asked = dict[str, str]()

    def has_asked() -> bool:
        rows = json.loads(_coordinator("sites", "--office", stage.office, "--json"))["sites"]
        asked.update({row["site"]: row["words"] for row in rows if row["words"]})
        return site in asked or process.poll() is not None

    heard = _words(process)
    stage.crew.until(has_asked, f"{site} asks to join", patience_s=PATIENCE_S)
    if not heard or process.poll() is not None:
        said(process, site)
    if heard != asked.get(site):
        raise RunError(f"{site} reads out other words than the office shows; nobody is let in")
    stage.progress.note(f"{site}: both sides read '{heard}'")
    _coordinator("accept", site, "--words", heard, "--office", stage.office)


def _words(process: Process) -> str:
    """Return the words that a hospital's ``join`` shows, indented, to its people."""
    for line in process.stdout or ():
        if line.startswith("    "):
            return line.strip()
    return ""


def _ended(stage: Stage, site: str, process: Process) -> str:
    """Wait for a hospital's command, while the coordinator serves; return what it printed."""
    stage.crew.until(lambda: process.poll() is not None, f"{site} is done", patience_s=PATIENCE_S)
    return said(process, site)


def _introduce(stage: Stage, trusted: Mapping[str, str]) -> None:
    """Let each hospital trust the others' NAME=KEY, which people do after comparing keys by phone.

    Raises:
        RunError: if one would not.
    """
    commands = {}
    for site in trusted:
        peers = [pair for other, pair in trusted.items() if other != site]
        commands[site] = stage.crew.command(
            "client.cli", "trust", *peers, "--config", stage.config(site)
        )
    for site, process in commands.items():
        _ended(stage, site, process)


def _propose(
    stage: Stage, plan: StudyPlan, terms: start.StartTerms | None, options: Options
) -> tuple[str, Path]:
    """Offer the plan, with its warm start, to the hospitals; return the study and where it runs."""
    notes = [ONE_MACHINE_NOTE] + [PHANTOM_NOTE] * (options.data is None)
    office, root, arguments = stage.office, stage.data.root, list[str | Path]()
    if terms is not None:
        stage.progress.stage("a warm start on the coordinator's images")
        plan, number = start.warmed(
            plan, office / "start.csv", root=root, run_dir=office, terms=terms
        )
        notes.append(START_NOTE.format(number=number))
        arguments += ["--start", office / start.FILE]
    stage.progress.stage("hospitals hear of the plan, and decide", total=len(stage.site_dirs))
    (office / "plan.toml").write_text(plans.render(plan), encoding="utf-8")
    is_phantom = options.data is None
    told = f"phantoms, seed {options.seed}" if is_phantom else f"the data set {root.name}"
    found = _coordinator(
        *("propose", office / "plan.toml", "--office", office, "--json", "--data", told),
        *("--validation", office / "validation.csv", "--validation-root", root),
        *(part for note in notes for part in ("--note", note)),
        *arguments,
    )
    offered = json.loads(found)
    return offered["study"], Path(offered["run_dir"])


def _decide(stage: Stage, study: str, run_dir: Path) -> None:
    """Let each hospital judge and countersign the plan, as soon as its agent has heard of it."""
    commands = {}
    for site, folder in stage.site_dirs.items():
        stage.crew.until(
            (folder / "state" / "studies" / study / "offer.json").exists,
            f"{site} hears of the study",
            patience_s=PATIENCE_S,
        )
        commands[site] = stage.crew.command(
            *("client.cli", "approve", study, "--who", WHO, "--config", stage.config(site))
        )
    for number, (site, process) in enumerate(commands.items(), start=1):
        _ended(stage, site, process)
        stage.crew.until(
            lambda site=site: desk.decision(run_dir, site) == "approved",  # type: ignore[misc]
            f"the decision of {site} arrives",
            patience_s=PATIENCE_S,
        )
        stage.progress.advance(number)
    stage.progress.note(f"no hospital's rules object; {WHO} plays the people who approve")


def _coordinator(*arguments: str | Path) -> str:
    """Run a command of the coordinator's in this process and return what it printed."""
    from typer.main import get_command

    from server.cli import app

    with redirect_stdout(StringIO()) as printed:
        get_command(app).main([str(part) for part in arguments], standalone_mode=False)
    return printed.getvalue()


def _edit(file: Path, old: str, new: str) -> None:
    """Change a setting in a file as people do, with its comments left alone."""
    text = file.read_text(encoding="utf-8")
    if old not in text:
        raise ValueError(f"expected '{old}' in {file}")
    file.write_text(text.replace(old, new), encoding="utf-8")

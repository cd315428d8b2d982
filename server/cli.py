"""``consilia-coordinator``: what the consortium's coordinator runs."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shared_models.errors import EXIT_CODES_HELP, ConsiliaError

app = typer.Typer(
    help="Propose studies, run them through the consortium, validate and release models.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PlanFile = Annotated[Path, typer.Argument(help="The study plan (TOML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
OfficeDir = Annotated[Path, typer.Option("--office", help="The coordinator's office.")]
Validation = Annotated[
    Path | None, typer.Option(help="The coordinator's held-out set: a manifest (CSV).")
]
ValidationRoot = Annotated[
    Path | None, typer.Option(help="What the manifest's paths are relative to.")
]
StartFile = Annotated[
    Path | None, typer.Option(help="The warm start the plan states (safetensors).")
]
Out = Annotated[Path | None, typer.Option(help="Results go here; must be new or empty.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The new office's folder.")],
    name: Annotated[str, typer.Option(help="What people call the consortium.")],
    fleet: Annotated[str, typer.Option(help="Where hospitals reach Flower, host:port.")],
    control: Annotated[str, typer.Option(help="Where they reach the control plane, host:port.")],
    enrolment: Annotated[str, typer.Option(help="Where newcomers ask, host:port.")],
) -> None:
    """Make the coordinator's office: its keys, its certificate authority, consortium.toml."""
    from server import office as offices
    from shared_models.signing import public_key

    try:
        made = offices.create(folder, name=name, fleet=fleet, control=control, enrolment=enrolment)
    except FileExistsError as error:
        raise ConsiliaError(f"{error}; choose another folder") from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print(f"wrote {folder / 'consortium.toml'}; keep a copy of the folder where no one else looks")
    print(f"coordinator {public_key(made.key)}")


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="The hospital's name in the consortium.")],
    office: OfficeDir = Path(),
    days: Annotated[int, typer.Option(min=1, max=365, help="How long it can be used.")] = 14,
    out: Annotated[Path | None, typer.Option(help="The invite; none: SITE.invite.json.")] = None,
) -> None:
    """Write an invite for one hospital. It holds no secret: send it by any mail."""
    from server import office as offices
    from shared_models.files import create
    from shared_models.signing import canonical

    file = out or Path(f"{site}.invite.json")
    if file.exists():
        raise ConsiliaError(f"{file} exists; choose another --out")
    signed = offices.invite(offices.read(office), site, days=days)
    create(file, canonical(signed), mode=0o644)
    print(f"wrote {file}; the hospital runs: consilia-site join {file.name}")


@app.command()
def sites(office: OfficeDir = Path(), as_json: AsJson = False) -> None:
    """Show every hospital: where it stands, words to compare, days left, when it was last here."""
    from server import office as offices

    home = offices.read(office)
    rows, head = offices.table(home), offices.head(home)
    if as_json:
        found = [row.model_dump(mode="json") for row in rows]
        print(json.dumps({"sites": found, "register": head}))
        return
    table = Table("site", "state", "words to compare", "days left", "last seen")
    for row in rows:
        seen = f"{row.last_seen:%Y-%m-%d %H:%M} UTC" if row.last_seen else ""
        days = "" if row.days_left is None else str(row.days_left)
        table.add_row(row.site, row.state, row.words or "", days, seen)
    Console().print(table)


@app.command()
def accept(
    site: Annotated[str, typer.Argument(help="The hospital that asks.")],
    words: Annotated[str, typer.Option(help="The words its people read out to you by phone.")],
    office: OfficeDir = Path(),
) -> None:
    """Let a hospital in whose people read out the words of what it asked."""
    from server import office as offices

    offices.accept(offices.read(office), site, words)
    print(f"{site} is let in; it fetches its certificate by itself")


@app.command()
def refuse(
    site: Annotated[str, typer.Argument(help="The hospital that asks.")], office: OfficeDir = Path()
) -> None:
    """Turn down what came in a hospital's name; it needs a new invite then."""
    from server import office as offices

    offices.refuse(offices.read(office), site)
    print(f"what came in the name of {site} is turned down")


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The hospital to let in no more.")],
    office: OfficeDir = Path(),
) -> None:
    """Let a hospital in no more, from its next call and before the next round; no other notices."""
    from server import office as offices

    offices.revoke(offices.read(office), site)
    print(f"{site} is revoked; to let it in again, invite it anew: it makes new keys then")


@app.command()
def studies(office: OfficeDir = Path(), as_json: AsJson = False) -> None:
    """Show every study: where it stands, how many rounds are done, what each hospital decided."""
    from server import desk
    from server import office as offices

    home = offices.read(office)
    known = desk.studies(home.folder, today=_today(), closed=offices.closed(home))
    said = [{site: desk.decision(o.run_dir, site) for site in o.signed.plan.sites} for o in known]
    if as_json:
        rows = [
            {"study": one.study, "state": one.state, "rounds": one.num_rounds_done, "sites": sites}
            for one, sites in zip(known, said, strict=True)
        ]
        print(json.dumps(rows))
        return
    table = Table("study", "name", "state", "rounds", "hospitals")
    for one, sites in zip(known, said, strict=True):
        plan = one.signed.plan
        rounds = f"{one.num_rounds_done} of {plan.training.num_rounds}"
        rounds = rounds if plan.fingerprint is None else "fingerprint"
        words = ", ".join(f"{site}: {word or 'no answer yet'}" for site, word in sites.items())
        table.add_row(one.study[:12], plan.name, one.state, rounds, words)
    Console().print(table)


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="The study's digest, or its beginning.")],
    office: OfficeDir = Path(),
    follow: Annotated[bool, typer.Option(help="Show the rounds until the study ends.")] = True,
    as_json: AsJson = False,
) -> None:
    """Run a study, or what is left of it; 'serve' does the work and must be running."""
    from server import follow as follows
    from server import office as offices
    from server import report as reports
    from server import serve as serving
    from server import store

    run_dir = _study(office, study)
    serving.want(offices.read(office), run_dir)
    if not follow:
        print(f"study {run_dir.name} is run as long as 'consilia-coordinator serve' is running")
        return
    with _interruptible("stopped looking; the study goes on"), _progress() as progress:
        follows.follow(run_dir, progress)
    if store.has_fingerprint(run_dir):
        _show_fingerprint(run_dir, as_json=as_json)
        return
    _finish(reports.read(run_dir / "report.json"), run_dir, as_json=as_json)


@app.command()
def stop(
    study: Annotated[str, typer.Argument(help="The study's digest, or its beginning.")],
    office: OfficeDir = Path(),
) -> None:
    """Stop a study. Run again, it goes on where it was."""
    from server import serve as serving

    run_dir = _study(office, study)
    serving.want_no_more(run_dir)
    print(f"study {run_dir.name} is stopped; its finished rounds are kept")


@app.command()
def close(
    study: Annotated[str, typer.Argument(help="The study's digest, or its beginning.")],
    office: OfficeDir = Path(),
) -> None:
    """Close a study that is over or abandoned, for good: it takes no more orders."""
    from server import office as offices
    from server import serve as serving

    run_dir = _study(office, study)
    serving.close(offices.read(office), run_dir)
    print(f"study {run_dir.name} is closed, which cannot be undone; its sites hear so next time")


@app.command()
def serve(
    office: Annotated[Path, typer.Argument(help="The coordinator's office.")] = Path(),
) -> None:
    """Answer hospitals, and run the studies that are wanted, until stopped (Ctrl-C or SIGTERM)."""
    from server import office as offices
    from server import serve as serving

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = offices.read(office)
    with _stopping() as asked:
        for news in serving.serve(home, stop=asked):
            if news.kind != "idle":
                about = "the SuperLink" if news.study is None else f"study {news.study.name}"
                print(": ".join([about, news.kind, *news.text]), flush=True)


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="A folder with manifest.csv; none: phantoms are made.")
    ] = None,
    task: Annotated[str, typer.Option(help="classification or segmentation.")] = "classification",
    out: Out = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds.")] = None,
    epsilon: Annotated[float, typer.Option(help="Patient-level epsilon of the study.")] = 8.0,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Train WITHOUT privacy.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides phantoms and first weights.")] = 0,
    phantoms: Annotated[
        int | None, typer.Option(min=20, help="Phantom patients per hospital, without --data.")
    ] = None,
    classes: Annotated[str, typer.Option(help="Names of the classes, comma-separated.")] = "",
    as_json: AsJson = False,
) -> None:
    """Train one model across hospitals on this machine: real processes, TLS, approvals."""
    from server import demo as demos

    if not 0 < epsilon < float("inf"):
        raise typer.BadParameter(f"expected a positive epsilon, got {epsilon}")
    options = demos.Options(
        out=out or Path("runs") / f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        task=task,
        data=data,
        num_rounds=rounds,
        epsilon=None if no_dp else epsilon,
        seed=seed,
        num_phantoms=phantoms,
        classes=tuple(name.strip() for name in classes.split(",") if name.strip()),
    )
    with _interruptible(), _progress() as progress:
        found = demos.run(options, progress)
    _finish(found, options.out, as_json=as_json)


@app.command()
def simulate(
    plan: PlanFile,
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="More sites.")
    ] = None,
    sites: Annotated[
        list[Path] | None, typer.Option(help="Folders with a site.toml each: --sites A B C.")
    ] = None,
    validation: Validation = None,
    validation_root: ValidationRoot = None,
    start: StartFile = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run a plan in this process: the same rounds, functions instead of a network."""
    from server import demo as demos
    from server.simulate import simulate as run
    from server.simulate import take_fingerprint
    from shared_models import plan as plans

    folders = [*(sites or []), *(more or [])]
    if not folders:
        raise typer.BadParameter("expected at least one folder with --sites")
    target = out or Path("runs") / f"simulation-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    signed = plans.read(plan)
    demos.check_room(target)
    if signed.plan.fingerprint is not None:
        take_fingerprint(signed.plan, folders, target)
        _show_fingerprint(target, as_json=as_json)
        return
    found = run(
        signed.plan,
        folders,
        target,
        validation_manifest=validation,
        validation_root=validation_root,
        start=start,
    )
    _finish(found, target, as_json=as_json)


@app.command()
def check(plan: PlanFile, as_json: AsJson = False) -> None:
    """Say everything that is wrong with a plan. Exit 0: nothing; 1: something."""
    from shared_models.allowlists import objections_to_file

    _, found = objections_to_file(plan, today=_today())
    if as_json:
        print(json.dumps({"valid": not found, "objections": found}))
    else:
        for objection in found:
            print(f"- {objection}")
        print(f"{len(found)} objections" if found else "no objection: the plan can be proposed")
    raise typer.Exit(1 if found else 0)


@app.command()
def start(
    plan: PlanFile,
    manifest: Annotated[Path, typer.Option(help="CSV of images you may use: no site's patients.")],
    root: Annotated[Path, typer.Option(help="What the manifest's paths are relative to.")],
    out: Annotated[Path, typer.Option(help="The folder to put start.safetensors into.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of AdamW.")] = 200,
    learning_rate: Annotated[float, typer.Option(help="Falls to 0 along a cosine.")] = 0.003,
    batch_size: Annotated[int, typer.Option(min=1, help="Patients in a step.")] = 48,
) -> None:
    """Train a warm start, without privacy, on images of your own; state it in an unsigned plan."""
    from server.start import FILE, StartTerms, warmed
    from shared_models import plan as plans
    from shared_models.files import replace

    if (out / FILE).exists():
        raise ConsiliaError(f"{out / FILE} exists; choose another --out")
    terms = StartTerms(steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    stated, number = warmed(plans.read(plan).plan, manifest, root=root, run_dir=out, terms=terms)
    replace(plan, plans.render(stated).encode())
    print(f"trained on {number} patients, whom no epsilon covers: {out / FILE}")
    print(f"the plan states it as start = {stated.start}; propose it with --start now")


@app.command()
def propose(
    plan: PlanFile,
    office: OfficeDir = Path(),
    validation: Validation = None,
    validation_root: ValidationRoot = None,
    start: StartFile = None,
    data: Annotated[str, typer.Option(help="What the images are, for the report.")] = "",
    note: Annotated[
        list[str] | None, typer.Option(help="What its readers must know; more than one may be.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign a plan and offer it to the hospitals it names; each decides for itself."""
    from server import desk, store
    from server import office as offices
    from shared_models import plan as plans

    home = offices.read(office)
    settings = store.RunSettings(
        signing_key=(office / "signing.pem").resolve(),
        sites={},
        validation_manifest=validation and validation.resolve(),
        validation_root=validation_root and validation_root.resolve(),
        data=data,
        notes=tuple(note or ()),
    )
    found = desk.propose(
        desk.Desk(home.folder, home.key, offices.enrolled(home), offices.closed(home)),
        plans.read(plan).plan,
        settings=settings,
        today=_today(),
        start=start,
    )
    if as_json:
        print(json.dumps({"study": found.study, "run_dir": str(found.run_dir)}))
    else:
        name, sites = found.signed.plan.name, ", ".join(found.signed.plan.sites)
        print(f"offered study {found.study[:12]} '{name}' to {sites}")
        print(f"when enough have approved: consilia-coordinator run {found.study[:12]}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    as_json: AsJson = False,
) -> None:
    """Render report.html anew from report.json and print the table."""
    from server import report as reports

    found = reports.read(run_dir / "report.json")
    reports.write(found, run_dir)
    _finish(found, run_dir, as_json=as_json)


@app.command()
def fingerprint(
    study: Annotated[str, typer.Argument(help="The study's folder, digest or its beginning.")],
    office: OfficeDir = Path(),
    percentile: Annotated[
        float, typer.Option(min=1, max=99, help="Of patients, whose images fit the size.")
    ] = 95.0,
    as_json: AsJson = False,
) -> None:
    """Show what hospitals told of their images, and the imaging steps that follow from it.

    A plan with a [fingerprint] table asks for it; propose, run or simulate it like any other.
    """
    from server import store

    folder = Path(study)
    run_dir = folder if store.has_fingerprint(folder) else _study(office, study)
    _show_fingerprint(run_dir, as_json=as_json, percentile=percentile)


def _show_fingerprint(run_dir: Path, *, as_json: bool, percentile: float = 95.0) -> None:
    from server import fingerprint as fingerprints
    from server import geometry
    from shared_models import plan as plans

    found = fingerprints.read(run_dir)
    draft = plans.parse(found.plan_toml).plan
    if not as_json:
        sites = ", ".join(f"{reply.site}: {reply.num_patients}" for reply in found.replies)
        Console().print(fingerprints.table(found))
        print(f"{found.num_patients} training patients ({sites})")
        print(fingerprints.protection(found))
    proposal = geometry.propose(
        found.total, draft, num_sites=len(found.replies), percentile=percentile
    )
    toml = geometry.to_toml(proposal)
    if as_json:
        print(json.dumps({**found.model_dump(mode="json"), "proposal": toml}))
    else:
        print(f"\n# to be pasted in the next plan, once people have read it\n{toml}", end="")


def _study(office: Path, beginning: str) -> Path:
    """Return the run directory of the study whose digest begins so.

    Raises:
        ConsiliaError: if there is none, or more than one.
    """
    from server import desk
    from server import office as offices

    known = desk.studies(offices.read(office).folder, today=_today())
    found = [one for one in known if beginning and one.study.startswith(beginning)]
    if len(found) != 1:
        number = "no study" if not found else f"{len(found)} studies"
        raise ConsiliaError(f"{number} whose digest begins so; see: consilia-coordinator studies")
    return found[0].run_dir


def _finish(found: Any, out: Path, *, as_json: bool) -> None:
    from server import report as reports

    if as_json:
        print(found.model_dump_json(by_alias=True))
        return
    console = Console()
    console.print(reports.table(found))
    console.print(f"report: {(out / 'report.html').resolve()}", soft_wrap=True, highlight=False)


class _Bars:
    """A line for each stage, on a terminal with a bar while it lasts; plain text elsewhere."""

    def __init__(self, bars: Any, console: Console) -> None:
        self.bars, self.console, self.task = bars, console, None
        self.notes: list[str] = []

    def stage(self, text: str, *, total: int | None = None) -> None:
        self.close()
        if self.console.is_terminal:
            self.task = self.bars.add_task(text, total=total, word="")
        else:
            self.console.print(text)

    def advance(self, done: int, text: str = "") -> None:
        if self.console.is_terminal:
            self.bars.update(self.task, completed=done, word=text)
        else:
            self.console.print(f"  {done}: {text}")

    def note(self, text: str) -> None:
        self.notes.append(text)
        if not self.console.is_terminal:
            self._tell_notes()

    def close(self) -> None:
        """Let the stage's last state, and what was noted of it, stand above what follows."""
        if self.task is None:
            return
        (task,) = self.bars.tasks
        total = task.total or 1
        self.bars.update(self.task, total=total, completed=total)
        line = self.bars.make_tasks_table([task])
        self.bars.remove_task(self.task)
        self.console.print(line)
        self.task = None
        self._tell_notes()

    def _tell_notes(self) -> None:
        for text in self.notes:
            self.console.print(f"  {text}", highlight=False, soft_wrap=True)
        self.notes.clear()


@contextmanager
def _progress() -> Iterator[_Bars]:
    """Show progress on standard error, so that standard output stays for results."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", table_column=Column(width=40)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(width=7, justify="right")),
        TimeElapsedColumn(table_column=Column(width=7)),
        TextColumn("{task.fields[word]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        shown = _Bars(bars, console)
        yield shown
        shown.close()


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Let Ctrl-C and SIGTERM set an event, instead of ending the process where it stands."""
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _interruptible(farewell: str = "stopped; every process was ended") -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that no process is left behind.

    A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{farewell}\n")
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _today() -> date:
    return datetime.now(UTC).date()


def main() -> None:
    """Run the command line; a known error is told in its own words, with its exit code."""
    from shared_models.terminal import run_app

    run_app(app)


if __name__ == "__main__":
    main()

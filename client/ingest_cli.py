"""The commands of ``consilia-site`` about images: taking them in, and what the site holds."""

from __future__ import annotations

import json
import logging
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.studies_cli import AsJson, ConfigFile, Who, console, opened
from shared_models.errors import ConsiliaError, DataError, DocumentError

if TYPE_CHECKING:
    from rich.console import Console

    from client.config import SiteConfig
    from client.ingest.acquire import Plan
    from client.ingest.intake import Progress, Report

app = typer.Typer()
data = typer.Typer()
app.add_typer(data, name="data")

Folder = Annotated[Path | None, typer.Argument(help="A folder of DICOM files, of any names.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the counts as JSON here.")]


@app.command()
def ingest(
    folder: Folder = None,
    config: ConfigFile = Path("site.toml"),
    pacs: Annotated[bool, typer.Option("--pacs", help="Ask the PACS over DIMSE.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Ask the PACS over DICOMweb.")] = False,
    receive: Annotated[
        bool, typer.Option("--receive", help="With --watch: take what a PACS sends of itself.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again and again, until Ctrl-C or SIGTERM.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done; keep nothing.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Take images in: de-identify, judge, and keep them for training. The same twice is once."""
    from client import config as configs

    if sum((folder is not None, pacs, web, receive)) != 1:
        raise typer.BadParameter("expected one of FOLDER, --pacs, --web and --receive")
    if (receive and not watch) or (dry_run and (watch or pacs)):
        raise typer.BadParameter(
            "--receive goes with --watch; --dry-run with FOLDER or --web, and without --watch"
        )
    site = configs.read(config)
    if dry_run:
        _dry_run(site, folder, json_file)
        return
    stop = threading.Event()
    with _stopping(stop), _progress() as progress:
        if watch:
            report = _watched(site, config, folder, web=web, pacs=pacs, stop=stop, say=progress)
        else:
            report = _once(site, config, folder, web=web, pacs=pacs, stop=stop, say=progress)
    if report is not None:
        _told(report, site, json_file)
    if stop.is_set() and not watch:
        raise typer.Exit(130)
    if report is not None and report.objections:
        raise ConsiliaError(report.objections)


@data.callback(invoke_without_command=True)
def _data(
    context: typer.Context, config: ConfigFile = Path("site.toml"), as_json: AsJson = False
) -> None:
    """Show counts, spacings, intensities and labels of what the site holds."""
    if context.invoked_subcommand is not None:
        context.obj = config
        return
    from client import config as configs
    from client.ingest import tables

    site = configs.read(config)
    with _catalogue(site) as connection:
        found = tables.summary(connection, modalities=site.ingest.modalities)
    if as_json:
        print(json.dumps(found))
    else:
        tables.show(console(), found)


@data.command("label")
def label(
    file: Annotated[
        Path, typer.Argument(help="CSV: patient, study or series; label, map or split.")
    ],
    config: ConfigFile = Path("site.toml"),
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out lines that no image belongs to.")
    ] = False,
) -> None:
    """Take labels from a table that uses the hospital's own numbers; all of it, or nothing."""
    from client import config as configs
    from client.ingest import intake, labels, manifest

    site = configs.read(config)
    with intake.opened(site.ingest) as (connection, key):
        with intake.quiet():
            found = labels.take(file, site.ingest, connection, key, skip_unknown=skip_unknown)
        num_listed = manifest.write_manifest(site.ingest, connection)
    print(
        f"{found.labels} labels, {found.maps} label maps and {found.splits} splits taken; "
        f"{found.skipped} lines left out; the manifest lists {num_listed} images"
    )


@data.command("check")
def check(
    plan: Annotated[Path, typer.Argument(help="The plan to check against (TOML).")],
    config: ConfigFile = Path("site.toml"),
    as_json: AsJson = False,
) -> None:
    """Compare labels and geometry with what a plan takes them for. Exit 0: nothing is wrong."""
    from client import mapping
    from client.ingest import checks
    from client.preflight import show
    from shared_models import plan as plans

    site, key = opened(config)
    agreed = plans.read(plan).plan
    with _catalogue(site) as connection:
        found = list(checks.findings(connection, site, agreed, mapping.read(site, key=key)))
    if as_json:
        print(show.as_json({"data": found}))
    else:
        show.print_table({"data": found})
    raise typer.Exit(1 if any(one.ok is False for one in found) else 0)


@data.command("map")
def map_(
    pairs: Annotated[
        list[str],
        typer.Argument(help="OLD=NEW: a label here, or a map's number, and the plan's class."),
    ],
    who: Who,
    config: ConfigFile = Path("site.toml"),
) -> None:
    """Say what labels here are called in plans; signed by the site's key, applied in training."""
    from client import journal, mapping
    from shared_models.signing import digest

    site, key = opened(config)
    try:
        found = mapping.make(site, pairs, key=key, who=who)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    book = journal.Book(site.state_dir, site.name, key)
    journal.append(book, journal.Event("mapped", who=who, digest=digest(found)))
    mapping.write(site, found)
    print(f"{len(found.mapping.pairs)} labels mapped, for every plan of this site from now on")


@data.command("manifest")
def manifest_(config: ConfigFile = Path("site.toml")) -> None:
    """Write the manifest anew from the catalogue, such as after a change of site.toml."""
    from client import config as configs
    from client.ingest import intake, manifest

    site = configs.read(config)
    with intake.opened(site.ingest) as (connection, _):
        print(f"the manifest lists {manifest.write_manifest(site.ingest, connection)} images")


@data.command("forget")
def forget(
    uid: Annotated[
        str, typer.Argument(help="A PatientID or a Series Instance UID, as in the hospital.")
    ],
    config: ConfigFile = Path("site.toml"),
) -> None:
    """Remove a patient's or a series' images. Take them out of the source too, or they return."""
    from client import config as configs
    from client.ingest import intake, labels, manifest

    site = configs.read(config)
    with intake.opened(site.ingest) as (connection, key):
        removed = labels.forget(uid, site.ingest, connection, key)
        manifest.write_manifest(site.ingest, connection)
    if not removed:
        raise DataError("no image here is of that patient or series")
    print(f"{removed} series removed; clear the cache's folder too, it may hold copies")


@contextmanager
def _catalogue(site: SiteConfig) -> Iterator[sqlite3.Connection]:
    """Open the catalogue to look at it, which any number of processes may."""
    from client.ingest import catalogue, shelves

    file = site.ingest.private / shelves.CATALOGUE
    if not file.exists():
        raise DocumentError("this site has taken no images in yet: consilia-site ingest FOLDER")
    with catalogue.opened(file) as connection:
        yield connection


def _once(
    site: SiteConfig,
    config: Path,
    folder: Path | None,
    *,
    web: bool,
    pacs: bool,
    stop: threading.Event,
    say: Progress,
) -> Report:
    """Take a source in once."""
    return _taken(
        site, config, folder, web=web, pacs=pacs, stop=stop, say=say, quiet_s=0.0, settle_s=0.0
    )


def _taken(
    site: SiteConfig,
    config: Path,
    folder: Path | None,
    *,
    web: bool,
    pacs: bool,
    stop: threading.Event,
    say: Progress,
    quiet_s: float,
    settle_s: float,
) -> Report:
    from client.ingest import acquire, intake

    with intake.opened(site.ingest) as (connection, key):
        if folder is not None:
            source = acquire.from_folder(folder, quiet_s=quiet_s)
        elif web:
            source = acquire.from_web(site, connection, key)
        elif pacs:
            source = acquire.from_dimse(site, connection, key, progress=say)
        else:
            source = acquire.from_inbox(site)
        report = intake.take_in(
            site.ingest,
            connection,
            key,
            source,
            settle_s=settle_s,
            is_stopped=stop.is_set,
            progress=say,
        )
    _write_down(site, config, report)
    return report


def _watched(
    site: SiteConfig,
    config: Path,
    folder: Path | None,
    *,
    web: bool,
    pacs: bool,
    stop: threading.Event,
    say: Progress,
) -> Report | None:
    """Take a source in again and again; a source that cannot be reached is tried again."""
    from client.ingest import dimse, shelves
    from client.ingest.sources import QUIET_S

    log = logging.getLogger(__name__)
    is_asked = folder is not None or web or pacs
    inbox = shelves.inbox(site.ingest)
    shelves.make_folders(site.ingest)
    receiving = nullcontext() if is_asked else dimse.receiving(site.pacs.station, inbox)
    report = None
    with receiving:
        while not stop.is_set():
            report = _taken(
                site,
                config,
                folder,
                web=web,
                pacs=pacs,
                stop=stop,
                say=say,
                quiet_s=QUIET_S,
                settle_s=site.ingest.settle_s,
            )
            for objection in report.objections:
                log.warning("%s", objection)
            if report.new or report.changed or report.withdrawn:
                print(_changes(report), flush=True)
            stop.wait(site.ingest.poll_s)
    return report


def _write_down(site: SiteConfig, config: Path, report: Report) -> None:
    """Have the journal say that images were taken in, if the run changed anything."""
    from client import journal
    from shared_models.signing import digest, load_key

    if not (report.new or report.changed or report.withdrawn):
        return
    book = journal.Book(site.state_dir, site.name, load_key(site.signing_key))
    journal.append(book, journal.Event("ingested", digest=digest(report)))
    journal.note_config(book, config)


def _dry_run(site: SiteConfig, folder: Path | None, json_file: Path | None) -> None:
    from client.ingest import acquire

    with _progress() as progress:
        source = acquire.web_as_it_is(site) if folder is None else acquire.from_folder(folder)
        found = acquire.dry_run(site, source, progress=progress)
    if json_file is not None:
        json_file.write_text(found.model_dump_json() + "\n", encoding="utf-8")
    _show_plan(console(), found)


def _told(report: Report, site: SiteConfig, json_file: Path | None) -> None:
    """Print what was taken in: counts, reasons, and what to do next."""
    from rich.table import Table

    from client.ingest.refusals import FINAL, sentence

    if json_file is not None:
        json_file.write_text(report.model_dump_json() + "\n", encoding="utf-8")
    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    table.add_row("read", str(report.files), f"files, {report.known} of them known")
    table.add_row("accepted", str(report.accepted), f"series of {report.patients} patients")
    table.add_row("", "", _changes(report))
    if report.waiting:
        table.add_row("waiting", str(report.waiting), "series that may not be here whole yet")
    for reason, number in sorted(report.refused.items(), key=lambda pair: -pair[1]):
        ever = "" if reason in FINAL else " (judged again when more of it comes)"
        table.add_row("refused", str(number), f"{reason}: {sentence(reason)}{ever}")
    console().print(table)
    if site.data.manifest.resolve() != site.ingest.manifest.resolve():
        print(
            "data.manifest in site.toml is another list: to train on this store, write "
            f"{site.ingest.manifest} and, as data.root, {site.ingest.store}"
        )


def _changes(report: Report) -> str:
    return f"{report.new} new, {report.changed} changed, {report.withdrawn} withdrawn"


def _show_plan(console: Console, found: Plan) -> None:
    from rich.table import Table

    from client.ingest.refusals import sentence

    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    table.add_row("read", str(found.files), "files; nothing was kept")
    table.add_row("accepted", str(found.volumes), "series, by their headers")
    for reason, number in sorted(found.refused.items(), key=lambda pair: -pair[1]):
        table.add_row("refused", str(number), f"{reason}: {sentence(reason)}")
    console.print(table)
    changes = Table("attribute", "what would be done", "files", box=None, pad_edge=False)
    for change, number in found.changes.items():
        keyword, _, action = change.partition(": ")
        changes.add_row(keyword, action, str(number))
    console.print(changes)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total or None
        )


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM set ``stop`` rather than end what is being written."""
    caught = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stop.set()) for number in caught]
    try:
        yield
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)

"""``consilia-site``: what hospital IT runs. Nothing here is decided by anybody outside."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from client import ingest_cli, predict_cli, studies_cli
from client.studies_cli import AsJson, ConfigFile, console, opened
from shared_models.errors import EXIT_CODES_HELP

app = typer.Typer(
    help="Connect this hospital, judge and approve studies, run the site agent.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(studies_cli.app)
app.add_typer(ingest_cli.app)
app.add_typer(predict_cli.app)


@app.command()
def join(
    invite: Annotated[Path, typer.Argument(help="The invite that the coordinator sent.")],
    folder: Annotated[Path, typer.Option(help="The site's folder.")] = Path(),
    manifest: Annotated[
        Path | None, typer.Option(help="CSV: image, patient, label, split; for a new site.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="What the manifest's paths are relative to.")
    ] = None,
    max_epsilon: Annotated[float, typer.Option(help="Most epsilon one study may cost.")] = 8.0,
    allow_without_privacy: Annotated[
        bool, typer.Option(help="Allow studies without differential privacy.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, help="Minutes to wait until the coordinator lets the site in.")
    ] = 15.0,
) -> None:
    """Join a consortium: make keys here, ask, compare words by phone. Exit 1: not let in yet."""
    from client import certificate
    from client import join as joins
    from shared_models.signing import load_key, public_key

    found = joins.read_invite(invite)
    data = None
    if manifest is not None and root is not None:
        data = joins.Data(manifest.resolve(), root.resolve(), max_epsilon, allow_without_privacy)
    try:
        joining = joins.prepare(found, folder, data)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if joining.asked is not None:
        print(f"{folder / 'site.toml'} joins '{found.consortium}' as {found.site}")
        print(f"Call the coordinator and read out these words:\n\n    {joining.words}\n")
        print("Whoever cannot let you in by exactly these is not who you think.", flush=True)
        with _waiting("waiting for the coordinator; Ctrl-C, and the same command goes on later"):
            is_in = joins.wait(joining, minutes=wait)
        if not is_in:
            print("not let in yet; run the same command again once the coordinator has decided")
            raise typer.Exit(1)
    print(f"{found.site} is in: its certificate holds {certificate.days_left(joining.config)} days")
    key = public_key(load_key(joining.config.signing_key))
    print(f"peers that have heard this key by phone run: consilia-site trust {found.site}={key}")


@app.command()
def check(
    plan: Annotated[Path | None, typer.Argument(help="The plan to check against (TOML).")] = None,
    config: ConfigFile = Path("site.toml"),
    quick: Annotated[bool, typer.Option("--quick", help="No dry batch, no bandwidth.")] = False,
    all_images: Annotated[bool, typer.Option("--all", help="Open every image.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try everything a study needs: keys, data, machine, network. Exit 0: nothing is wrong."""
    from client import preflight
    from client.preflight import show

    depth: Literal["quick", "sample", "all"]
    depth = "all" if all_images else "quick" if quick else "sample"
    with show.progress() as progress:
        areas = preflight.examine(config, plan, depth=depth, progress=progress)
    if as_json:
        print(show.as_json(areas))
    else:
        show.print_table(areas)
    found = [finding for findings in areas.values() for finding in findings]
    raise typer.Exit(1 if any(finding.ok is False for finding in found) else 0)


@app.command()
def trust(
    peers: Annotated[
        list[str], typer.Argument(help="NAME=KEY: another hospital and its public signing key.")
    ],
    config: ConfigFile = Path("site.toml"),
) -> None:
    """Trust other hospitals to hide this one's updates among. Compare their keys by phone first."""
    from client import config as configs
    from client import journal
    from client import peers as trusted
    from shared_models.signing import load_key

    site = configs.read(config)
    book = journal.Book(site.state_dir, site.name, load_key(site.signing_key))
    for pair in peers:
        name, _, key = pair.partition("=")
        trusted.check(name=name, key=key)
        trusted.read(site.policy.peers)
        journal.append(book, journal.Event("trusted", who=name, key=key))
        trusted.trust(site.policy.peers, name=name, key=key)
        print(f"trusted: {name}")


@app.command()
def budget(config: ConfigFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """Show what each study, and all together, have cost this hospital's patients."""
    from client import config as configs
    from client import ledger
    from shared_models.terminal import balance

    site = configs.read(config)
    limits = site.policy
    print(
        balance(
            ledger.read(site.state_dir).reservations,
            as_json=as_json,
            per_study=limits.max_epsilon_per_study,
            lifetime=limits.max_epsilon_lifetime,
        )
    )


@app.command()
def status(config: ConfigFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """Show studies, budget, what left the building, and the journal's state. Exit 1: broken."""
    from client import show
    from client import status as statuses

    site, key = opened(config)
    found = statuses.watcher(site, key=key)()
    if as_json:
        print(found.model_dump_json())
    else:
        console().print(show.status_in_words(found))
    is_broken = found.journal.fault is not None or found.lifetime is None
    raise typer.Exit(1 if is_broken else 0)


@app.command()
def page(
    config: ConfigFile = Path("site.toml"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8470,
) -> None:
    """Show the same as a page for a browser on this machine, until stopped (Ctrl-C or SIGTERM)."""
    from client import page as pages
    from client import status as statuses

    site, key = opened(config)
    with pages.open_page(statuses.watcher(site, key=key), port=port) as served:
        print(f"http://127.0.0.1:{served.port}/ shows this site; it is read-only", flush=True)
        _wait_for_stop()


@app.command()
def rehearse(
    folder: Annotated[Path, typer.Argument(help="Where made-up archives are, or will be written.")],
    check: Annotated[
        Path | None, typer.Option(help='Compare these counts by verdict, JSON: {"accepted": 12}.')
    ] = None,
    patients: Annotated[int, typer.Option(min=1, help="In each of four hospitals.")] = 4,
    slices: Annotated[int, typer.Option(min=1, help="Of each series.")] = 24,
    size: Annotated[int, typer.Option(min=16, help="Rows and columns of a slice.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same bytes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write made-up archives to rehearse the take-in on, or check its verdicts. Exit 1: others."""
    import json

    from client import rehearse as rehearsals

    if check is not None:
        differences = rehearsals.compare(
            rehearsals.expected(folder), rehearsals.read_verdicts(check)
        )
        if as_json:
            print(json.dumps([one._asdict() for one in differences]))
        for one in () if as_json else differences:
            print(f"{one.verdict}: expected {one.expected} series, got {one.found}")
        if not differences and not as_json:
            print("every verdict was given as often as the answer key says")
        raise typer.Exit(1 if differences else 0)
    with _waiting("writing made-up archives"):
        rehearsals.write(folder, seed=seed, num_patients=patients, num_slices=slices, size=size)
    counts = rehearsals.expected(folder)
    if as_json:
        print(json.dumps(dict(sorted(counts.items()))))
        return
    print(f"wrote archives of four made-up hospitals into {folder}; their dicom/ folders hold")
    for verdict, count in sorted(counts.items()):
        print(f"{count:6} series that must be {_as_verdict(verdict)}")


@app.command()
def start(config: ConfigFile = Path("site.toml")) -> None:
    """Run the site agent until it is stopped (Ctrl-C or SIGTERM)."""
    from client import agent, answer, journal, running, visits

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # the second accountant's search is noisy
    site, key = opened(config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    link = agent.FleetLink(site.link.address, site.link.root_certificates, site.link.node_key)
    book = journal.Book(site.state_dir, site.name, key)
    with running.running(site.state_dir), answer.open_site(config) as desk:
        journal.append(book, journal.Event("started"))
        try:
            with visits.in_background(site, key, stop=stop):
                agent.run(
                    link,
                    desk.answer,
                    stop=stop,
                    refuse=desk.refuse,
                    cancel=desk.cancel,
                    folder=site.state_dir,
                )
        finally:
            journal.append(book, journal.Event("stopped"))


def _as_verdict(verdict: str) -> str:
    return verdict if verdict == "accepted" else f"refused: {verdict}"


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    """Show on a terminal that something goes on; Ctrl-C ends it without a trace."""
    from rich.console import Console

    console = Console(stderr=True)
    try:
        if console.is_terminal:
            with console.status(text):
                yield
        else:
            yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _wait_for_stop() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def main() -> None:
    """Run the command line; a known error is told in its own words, with its exit code."""
    from shared_models.terminal import run_app

    run_app(app)


if __name__ == "__main__":
    main()

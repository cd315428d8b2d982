"""``consilia-site``: what hospital IT runs. Nothing here is decided by anybody outside."""

from __future__ import annotations

import json
import logging
import signal
import threading
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared_models.errors import EXIT_CODES_HELP, ConsiliaError

app = typer.Typer(
    help="Connect this hospital, judge and approve studies, run the site agent.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Option("--config", help="This hospital's site.toml.")]
PlanFile = Annotated[Path, typer.Argument(help="The study plan (TOML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The new site's folder.")],
    name: Annotated[str, typer.Option(help="The hospital's name in the consortium.")],
    coordinator: Annotated[str, typer.Option(help="The coordinator's public key, hexadecimal.")],
    address: Annotated[str, typer.Option(help="The coordinator's SuperLink, host:port.")],
    root_certificates: Annotated[Path, typer.Option(help="The certificate authority (PEM).")],
    manifest: Annotated[Path, typer.Option(help="CSV: image, patient, label, split.")],
    root: Annotated[Path, typer.Option(help="What the manifest's paths are relative to.")],
    max_epsilon: Annotated[float, typer.Option(help="Most epsilon one study may cost.")] = 8.0,
    allow_without_privacy: Annotated[
        bool, typer.Option(help="Allow studies without differential privacy.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make this hospital's keys and its commented site.toml; print the public keys."""
    from client import setup

    try:
        identity = setup.create(
            folder,
            name=name,
            coordinator=coordinator,
            address=address,
            root_certificates=root_certificates.resolve(),
            manifest=manifest.resolve(),
            root=root.resolve(),
            max_epsilon=max_epsilon,
            allow_without_privacy=allow_without_privacy,
        )
    except FileExistsError as error:
        raise ConsiliaError(f"{error}; choose another folder") from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        print(identity.model_dump_json())
    else:
        print(f"wrote {folder / 'site.toml'}; send these public keys to the coordinator:")
        print(f"signing {identity.signing}\nnode    {identity.node}")


@app.command()
def judge(plan: PlanFile, config: ConfigFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """Say everything this hospital objects to in a plan. Exit 0: may be approved; 1: may not."""
    from client import config as configs
    from client import policy
    from shared_models.catalogue import objections_to_file

    site = configs.read(config)
    signed, found = objections_to_file(plan, today=_today())
    if signed is not None:
        found = policy.judge(signed.plan, site, today=_today())
    _verdict(found, as_json=as_json)


@app.command()
def approve(
    plan: PlanFile,
    who: Annotated[str, typer.Option(help="Who approves, for the record.")],
    config: ConfigFile = Path("site.toml"),
    as_json: AsJson = False,
) -> None:
    """Countersign a plan, if this hospital's rules allow it. Only the hospital can do this."""
    from pydantic import ValidationError

    from client import config as configs
    from client import journal, studies
    from shared_models import plan as plans
    from shared_models.signing import digest, load_key

    signed, site = plans.read(plan), configs.read(config)
    objections = studies.objections(signed, site, today=_today())
    key = load_key(site.signing_key)
    book = journal.Book(site.state_dir, site.name, key)
    try:
        if objections:
            event = journal.Event("refused-plan", study=digest(signed.plan), who=who)
            journal.append(book, event)
            _verdict(objections, as_json=as_json)
        found = studies.approve(signed, site, key=key, who=who)
        journal.note_config(book, config)
    except ValidationError as error:
        raise typer.BadParameter("expected who approves in 1 to 120 characters") from error
    if as_json:
        print(found.model_dump_json())
    else:
        print(f"approved study {found.approval.study[:12]} of '{signed.plan.name}'")


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
def start(config: ConfigFile = Path("site.toml")) -> None:
    """Run the site agent until it is stopped (Ctrl-C or SIGTERM)."""
    from client import agent, answer, journal
    from client import config as configs
    from shared_models.signing import load_key

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # the second accountant's search is noisy
    site = configs.read(config)
    answer_letter = answer.open_site(config)
    answer.warm_up(site)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    link = agent.FleetLink(site.link.address, site.link.root_certificates, site.link.node_key)
    book = journal.Book(site.state_dir, site.name, load_key(site.signing_key))
    journal.append(book, journal.Event("started"))
    try:
        agent.run(link, answer_letter, stop=stop)
    finally:
        journal.append(book, journal.Event("stopped"))


def _verdict(objections: list[str], *, as_json: bool) -> None:
    """Print the verdict and leave with 0 or 1."""
    if as_json:
        print(json.dumps({"admitted": not objections, "objections": objections}))
    elif objections:
        for objection in objections:
            print(f"- {objection}")
        print(f"{len(objections)} objection{'s' if len(objections) > 1 else ''}: not admitted")
    else:
        print("no objection: this hospital may approve the plan")
    raise typer.Exit(1 if objections else 0)


def _today() -> date:
    return datetime.now(UTC).date()


def main() -> None:
    """Run the command line; a known error is told in its own words, with its exit code."""
    from shared_models.terminal import run_app

    run_app(app)


if __name__ == "__main__":
    main()

"""``consilia-site``: what hospital IT runs. Nothing here is decided by anybody outside."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared_models.contracts import DecisionReason
from shared_models.errors import EXIT_CODES_HELP, ConsiliaError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from rich.console import Console

    from client.config import SiteConfig
    from client.studies import Known
    from shared_models.contracts import Countersignature

app = typer.Typer(
    help="Connect this hospital, judge and approve studies, run the site agent.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Option("--config", help="This hospital's site.toml.")]
Study = Annotated[
    str, typer.Argument(help="A plan's file (TOML), or the beginning of a known study's digest.")
]
Who = Annotated[str, typer.Option(help="Who decides, for the record.")]
NoteText = Annotated[
    str | None, typer.Option("--note", help="Your own words; they never leave the hospital.")
]
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


@app.command("studies")
def studies_(config: ConfigFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """List the studies this hospital was offered, and what it decided."""
    from client import show
    from client import studies as known

    site, key = _opened(config)
    found = known.known(site, key=key, today=_today())
    if as_json:
        print(json.dumps([_as_json(one) for one in found]))
    elif found:
        _console().print(show.studies_table(found))
    else:
        print("no study was offered yet; the agent asks the coordinator while it runs")


@app.command("show")
def show_(
    study: Study,
    config: ConfigFile = Path("site.toml"),
    as_toml: Annotated[bool, typer.Option("--toml", help="The plan itself, as signed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say in plain words what a study asks, what leaves the hospital, and what it costs."""
    from client import show
    from client import studies as known
    from shared_models import plan as plans

    site, key = _opened(config)
    found = known.look_up(study, site, key=key, today=_today())
    if as_json:
        print(json.dumps(_as_json(found) | {"plan": found.plan.model_dump(mode="json")}))
    elif as_toml:
        print(plans.render(*found.signed), end="")
    else:
        floor = site.policy.min_test_patients
        _console().print(show.plan_in_words(found, test_floor=floor))


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


@app.command()
def judge(study: Study, config: ConfigFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """Say everything this hospital objects to in a plan. Exit 0: may be approved; 1: may not."""
    from client import config as configs
    from client import policy
    from client import studies as known
    from shared_models.catalogue import objections_to_file

    site = configs.read(config)
    if Path(study).is_file() or "/" in study or study.endswith(".toml"):
        signed, found = objections_to_file(Path(study), today=_today())
        if signed is not None:
            found = policy.judge(signed.plan, site, today=_today())
    else:
        site, key = _opened(config)
        signed = known.look_up(study, site, key=key, today=_today()).signed
        found = known.objections(signed, site, today=_today())
    _verdict(found, as_json=as_json)


@app.command()
def approve(
    study: Study,
    who: Who,
    config: ConfigFile = Path("site.toml"),
    as_json: AsJson = False,
) -> None:
    """Countersign a plan, if this hospital's rules allow it. Only the hospital can do this."""
    from client import journal
    from client import studies as known
    from shared_models.signing import digest

    site, key = _opened(config)
    signed = known.look_up(study, site, key=key, today=_today()).signed
    objections = known.objections(signed, site, today=_today())
    book = journal.Book(site.state_dir, site.name, key)
    with _judged_input():
        if objections:
            event = journal.Event("refused-plan", study=digest(signed.plan), who=who)
            journal.append(book, event)
            _verdict(objections, as_json=as_json)
        found = known.approve(signed, site, key=key, who=who)
        journal.note_config(book, config)
    _told(found, signed.plan.name, as_json=as_json)


@app.command()
def refuse(
    study: Study,
    who: Who,
    reason: Annotated[DecisionReason, typer.Option(help="What the coordinator is told.")],
    note: NoteText = None,
    config: ConfigFile = Path("site.toml"),
    as_json: AsJson = False,
) -> None:
    """Refuse a study. The coordinator learns the reason, from a closed list, and nothing else."""
    from client import studies as known

    site, key = _opened(config)
    signed = known.look_up(study, site, key=key, today=_today()).signed
    with _judged_input():
        found = known.refuse(signed, site, key=key, who=who, reason=reason, note=note)
    _told(found, signed.plan.name, as_json=as_json)


@app.command()
def withdraw(
    study: Study,
    who: Who,
    reason: Annotated[
        DecisionReason | None, typer.Option(help="What the coordinator is told.")
    ] = None,
    note: NoteText = None,
    config: ConfigFile = Path("site.toml"),
    as_json: AsJson = False,
) -> None:
    """Take an approval back at once: the very next order is refused, the agent may run on."""
    from client import studies as known

    site, key = _opened(config)
    signed = known.look_up(study, site, key=key, today=_today()).signed
    with _judged_input():
        found = known.withdraw(signed, site, key=key, who=who, reason=reason, note=note)
    _told(found, signed.plan.name, as_json=as_json)


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

    site, key = _opened(config)
    found = statuses.watcher(site, key=key, certificate_days=_certificate_days(site))()
    if as_json:
        print(found.model_dump_json())
    else:
        _console().print(show.status_in_words(found))
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

    site, key = _opened(config)
    watcher = statuses.watcher(site, key=key, certificate_days=_certificate_days(site))
    with pages.open_page(watcher, port=port) as opened:
        print(f"http://127.0.0.1:{opened.port}/ shows this site; it is read-only", flush=True)
        _wait_for_stop()


@app.command()
def start(config: ConfigFile = Path("site.toml")) -> None:
    """Run the site agent until it is stopped (Ctrl-C or SIGTERM)."""
    from client import agent, answer, journal, running
    from client import config as configs
    from shared_models.signing import load_key

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # the second accountant's search is noisy
    site = configs.read(config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    link = agent.FleetLink(site.link.address, site.link.root_certificates, site.link.node_key)
    book = journal.Book(site.state_dir, site.name, load_key(site.signing_key))
    with running.running(site.state_dir), answer.open_site(config) as desk:
        journal.append(book, journal.Event("started"))
        if site.link.control is not None:
            _begin_visits(site, book.key, stop)
        try:
            agent.run(link, desk.answer, stop=stop, refuse=desk.refuse, cancel=desk.cancel)
        finally:
            journal.append(book, journal.Event("stopped"))


def _certificate_days(site: SiteConfig) -> Callable[[], int | None]:
    """Return what tells the days left of the site's certificate; none where it cannot be read."""
    from client import certificate

    def look() -> int | None:
        try:
            return certificate.days_left(site)
        except ConsiliaError:
            return None

    return look


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


def _begin_visits(site: SiteConfig, key: Ed25519PrivateKey, stop: threading.Event) -> None:
    """Tell the coordinator of decisions and bring home its offers, beside the orders."""
    from client import visits

    threading.Thread(
        target=visits.keep_visiting,
        args=(site, key, visits.over_control_plane(site)),
        kwargs={"agent": visits.agent_here(site), "stop": stop},
        daemon=True,
        name="visits",
    ).start()


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


def _opened(config: Path) -> tuple[SiteConfig, Ed25519PrivateKey]:
    """Return this hospital's settings and its signing key."""
    from client import config as configs
    from shared_models.signing import load_key

    site = configs.read(config)
    return site, load_key(site.signing_key)


@contextmanager
def _judged_input() -> Iterator[None]:
    """Turn what a contract objects to in a person's input into wrong usage."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise typer.BadParameter(
            "expected who decides in 1 to 120 characters, and a note in 1 to 2000 if any"
        ) from error


def _told(found: Countersignature, name: str, *, as_json: bool) -> None:
    """Print what was decided."""
    if as_json:
        print(found.model_dump_json())
    else:
        print(f"{found.approval.decision} study {found.approval.study[:12]} of '{name}'")


def _as_json(one: Known) -> dict[str, Any]:
    """Return a study as machines read it."""
    decided = None if one.decision is None else one.decision.model_dump(mode="json")
    word = None if one.word is None else one.word.model_dump(mode="json")
    head = {"study": one.study, "name": one.plan.name, "status": one.status}
    return head | {"decision": decided, "coordinator_says": word}


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _wait_for_stop() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def _today() -> date:
    return datetime.now(UTC).date()


def main() -> None:
    """Run the command line; a known error is told in its own words, with its exit code."""
    from shared_models.terminal import run_app

    run_app(app)


if __name__ == "__main__":
    main()

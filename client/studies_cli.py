"""The commands of ``consilia-site`` about studies: what was offered, and what people decide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared_models.contracts import DecisionReason

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from rich.console import Console

    from client.config import SiteConfig
    from client.studies import Known
    from shared_models.contracts import Countersignature

app = typer.Typer()

ConfigFile = Annotated[Path, typer.Option("--config", help="This hospital's site.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Study = Annotated[
    str, typer.Argument(help="A plan's file (TOML), or the beginning of a known study's digest.")
]
Who = Annotated[str, typer.Option(help="Who decides, for the record.")]
NoteText = Annotated[
    str | None, typer.Option("--note", help="Your own words; they never leave the hospital.")
]


@app.command("studies")
def studies_(config: ConfigFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """List the studies this hospital was offered, and what it decided."""
    from client import show
    from client import studies as known

    site, key = opened(config)
    found = known.known(site, key=key, today=_today())
    if as_json:
        print(json.dumps([_as_json(one) for one in found]))
    elif found:
        console().print(show.studies_table(found))
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

    site, key = opened(config)
    found = known.look_up(study, site, key=key, today=_today())
    if as_json:
        print(json.dumps(_as_json(found) | {"plan": found.plan.model_dump(mode="json")}))
    elif as_toml:
        print(plans.render(*found.signed), end="")
    else:
        floor = site.policy.min_test_patients
        console().print(show.plan_in_words(found, test_floor=floor))


@app.command()
def judge(study: Study, config: ConfigFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """Say everything this hospital objects to in a plan. Exit 0: may be approved; 1: may not."""
    from client import config as configs
    from client import policy
    from client import studies as known
    from shared_models.allowlists import objections_to_file

    site = configs.read(config)
    if Path(study).is_file() or "/" in study or study.endswith(".toml"):
        signed, found = objections_to_file(Path(study), today=_today())
        if signed is not None:
            found = policy.judge(signed.plan, site, today=_today())
    else:
        site, key = opened(config)
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

    site, key = opened(config)
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

    site, key = opened(config)
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

    site, key = opened(config)
    signed = known.look_up(study, site, key=key, today=_today()).signed
    with _judged_input():
        found = known.withdraw(signed, site, key=key, who=who, reason=reason, note=note)
    _told(found, signed.plan.name, as_json=as_json)


def opened(config: Path) -> tuple[SiteConfig, Ed25519PrivateKey]:
    """Return this hospital's settings and its signing key."""
    from client import config as configs
    from shared_models.signing import load_key

    site = configs.read(config)
    return site, load_key(site.signing_key)


def console() -> Console:
    """Return where tables go."""
    from rich.console import Console

    return Console(highlight=False)


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


def _today() -> date:
    return datetime.now(UTC).date()

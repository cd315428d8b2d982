"""``consortium.toml``: the consortium's name, and where its coordinator is reached and listens."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from string import Template
from typing import Literal

from pydantic import ValidationError

from shared_models.contracts import Address, Contract, Title
from shared_models.errors import DocumentError
from shared_models.plan import sentences

FILE = "consortium.toml"
LISTEN_PORTS = (9443, 9444, 9445)  # where several public addresses share one port


class Listen(Contract):
    """Where this machine listens."""

    fleet: Address
    control: Address
    enrolment: Address


class Settings(Contract):
    """The consortium's name, where hospitals reach its coordinator, and where that listens."""

    schema_version: Literal[1] = 1
    name: Title
    fleet: Address
    control: Address
    enrolment: Address
    listen: Listen


def text(*, name: str, fleet: str, control: str, enrolment: str) -> str:
    """Return a commented ``consortium.toml`` with these values.

    It listens on all of this machine's addresses, or, where two of the public addresses share a
    port and so need a router in front, on the loopback interface.

    Raises:
        ValueError: if a value is not printable text.
    """
    ports = [address.rpartition(":")[2] for address in (fleet, control, enrolment)]
    listen = [f"0.0.0.0:{port}" for port in ports]
    if len(set(ports)) < len(ports):
        listen = [f"127.0.0.1:{port}" for port in LISTEN_PORTS]
    values = dict(zip(("listen_fleet", "listen_control", "listen_enrolment"), listen, strict=True))
    values |= {"name": name, "fleet": fleet, "control": control, "enrolment": enrolment}
    template = Template((files("server") / "templates" / FILE).read_text(encoding="utf-8"))
    return template.substitute({key: _quoted(value) for key, value in values.items()})


def parse(content: str) -> Settings:
    """Read the text of a ``consortium.toml``.

    Raises:
        DocumentError: with every objection at once.
    """
    try:
        return Settings.model_validate(tomllib.loads(content))
    except tomllib.TOMLDecodeError as error:
        raise DocumentError(f"{FILE} is not TOML: {error}") from error
    except ValidationError as error:
        raise DocumentError(sentences(error, model=Settings)) from error


def _quoted(value: str) -> str:
    """Return ``value`` as a TOML basic string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    if not escaped.isprintable():
        raise ValueError("expected printable text without line breaks")
    return f'"{escaped}"'

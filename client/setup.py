"""A new site's commented ``site.toml``, and whole sites that no coordinator has let in.

Private keys are made here and never leave.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template

from client import agent, config
from shared_models.contracts import Contract, PublicKey, SiteName
from shared_models.files import replace
from shared_models.signing import create_key, public_key


class Identity(Contract):
    """A site's name and its public keys."""

    name: SiteName
    signing: PublicKey
    node: str


def create_unenrolled(
    folder: Path,
    *,
    name: str,
    coordinator: str,
    address: str,
    root_certificates: Path,
    manifest: Path,
    root: Path,
    allow_without_privacy: bool = False,
    max_epsilon: float = 8.0,
) -> Identity:
    """Make ``folder`` a site that has joined nobody: two private keys and a ``site.toml``.

    For simulations, benches and tests. A hospital joins by an invite (``join.py``).

    Raises:
        FileExistsError: if the folder has keys or a configuration; nothing is overwritten.
        ValueError: if a value is not printable text.
        DocumentError: if a value does not belong in a ``site.toml``; nothing is made then.
    """
    config_file = folder / "site.toml"
    if config_file.exists():
        raise FileExistsError(
            f"{config_file} exists; it is the hospital's and is never overwritten"
        )
    text = config_text(
        name=name,
        coordinator=coordinator,
        address=address,
        root_certificates=str(root_certificates),
        manifest=str(manifest),
        root=str(root),
        allow_without_privacy=allow_without_privacy,
        max_epsilon=max_epsilon,
    )
    config.parse(text)  # what was given is judged before anything is made
    (folder / "keys").mkdir(parents=True, exist_ok=True)
    node = agent.create_node_key(folder / "keys" / "node")
    key = create_key(folder / "keys" / "signing.pem")
    replace(config_file, text.encode())
    return Identity(name=name, signing=public_key(key), node=node)


def config_text(
    *,
    name: str,
    coordinator: str,
    address: str,
    root_certificates: str,
    manifest: str,
    root: str,
    control: str | None = None,
    allow_without_privacy: bool = False,
    max_epsilon: float = 8.0,
) -> str:
    """Return a commented ``site.toml`` with these values and cautious defaults.

    Without ``control`` the settings of the control plane stand there as comments.
    """
    template = Template((files("client") / "templates" / "site.toml").read_text(encoding="utf-8"))
    return template.substitute(
        name=_quoted(name),
        coordinator=_quoted(coordinator),
        address=_quoted(address),
        root_certificates=_quoted(root_certificates),
        manifest=_quoted(manifest),
        root=_quoted(root),
        mark="# " if control is None else "",
        control=_quoted(control or "coordinator.example.org:8443"),
        allow_without_privacy=str(allow_without_privacy).lower(),
        max_epsilon=max_epsilon,
        max_epsilon_lifetime=2 * max_epsilon,
    )


def _quoted(text: str) -> str:
    """Return ``text`` as a TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    if not escaped.isprintable():
        raise ValueError("expected printable text without line breaks")
    return f'"{escaped}"'

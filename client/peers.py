"""The other hospitals this one trusts to hide its updates among, by name and public signing key.

``peers.toml`` stands beside ``site.toml`` and is the hospital's own, like it: a line for each peer,
written by ``consilia-site trust`` after people have compared the key. Nobody outside can add one.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import tomli_w
from pydantic import TypeAdapter, ValidationError

from shared_models.contracts import PublicKey, SiteName
from shared_models.errors import DocumentError
from shared_models.files import replace

Peers = dict[SiteName, PublicKey]
_PEERS = TypeAdapter(Peers)


def read(file: Path) -> Peers:
    """Return the trusted peers; none if there is no such file.

    Raises:
        DocumentError: if the file is no list of peers.
    """
    try:
        return _PEERS.validate_python(tomllib.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, ValidationError):
        raise DocumentError(
            f'cannot read {file} as peers; expected lines of the form name = "public key"'
        ) from None


def trust(file: Path, *, name: str, key: str) -> None:
    """Add a peer, or change its key.

    Raises:
        DocumentError: if the file is no list of peers, or this is no name or no key.
    """
    check(name=name, key=key)
    peers = {**read(file), name: key}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, tomli_w.dumps(dict(sorted(peers.items()))).encode())


def check(*, name: str, key: str) -> None:
    """Check that these are a site's name and a public key.

    Raises:
        DocumentError: if they are not.
    """
    try:
        _PEERS.validate_python({name: key})
    except ValidationError:
        raise DocumentError(
            "expected a site's name (letters, digits, - and _) and its public signing key "
            "(64 hexadecimal digits)"
        ) from None

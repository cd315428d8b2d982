"""Whether what runs here is what was installed: every file against the wheel's own list of hashes.

Design: the list (RECORD) lies beside the files, and who can change them can change it too. It finds
what is broken, patched or half upgraded. Against an attacker on this machine there is the digest of
the wheel itself, compared before it is installed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from client.preflight.base import Case, Finding, several

NAME = "consilia"
PACKAGES = ("client", "server", "shared_models", "strategies")
REINSTALL = "install the wheel again, in an environment of its own: pip install --force-reinstall"


def installed_files(case: Case) -> Iterator[Finding]:
    """Yield whether the platform's files are those of its wheel, and nobody else's."""
    yield files_finding(running=Path(__file__).parents[2])


def versions(case: Case) -> Iterator[Finding]:
    """Yield whether what the platform needs is installed, in versions it knows."""
    yield versions_finding()


def files_finding(path: Sequence[str] | None = None, *, running: Path) -> Finding:
    """Compare the files of the distribution found on ``path`` (sys.path); they run in ``running``.

    Never a file's content is told, only its name in the wheel.
    """
    what = "installed files"
    found = list(distributions() if path is None else distributions(path=list(path)))
    ours = next((one for one in found if one.name == NAME), None)
    if ours is None:
        said = "they run from a folder, not from an installed wheel; nothing to compare with"
        return Finding(what, None, said, "this machine", REINSTALL)
    others = sorted({one.name for one in found if one.name != NAME and _tops(one) & {*PACKAGES}})
    if others:
        said = f"{', '.join(others)} installs packages of the same names as the platform"
        cure = f"remove it (pip uninstall {' '.join(others)}), then {REINSTALL}"
        return Finding(what, False, said, "this machine", cure)
    if _is_editable(ours):
        said = f"{ours.version}, an editable install, which cannot be compared"
        return Finding(what, None, said, "this machine", REINSTALL)
    root = Path(str(ours.locate_file("")))
    if root.resolve() != running.resolve():
        said = "other files run than those that are installed"
        cure = "take PYTHONPATH out of the agent's environment, and start it outside a checkout"
        return Finding(what, False, said, "this machine", cure)
    return _compared(ours, root)


def versions_finding(path: Sequence[str] | None = None) -> Finding:
    """Compare the distributions found on ``path`` (sys.path) with what ours says it needs."""
    from packaging.requirements import Requirement

    what = "versions"
    found = list(distributions() if path is None else distributions(path=list(path)))
    held = {_plain(one.name): one.version for one in reversed(found)}
    ours = next((one for one in found if one.name == NAME), None)
    if ours is None:
        return Finding(what, None, "no installed wheel says what it needs", "this machine")
    needed = [Requirement(text) for text in ours.requires or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in needed:
        version = held.get(_plain(one.name))
        if version is None or not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name}{one.specifier} (here: {version or 'none'})")
    if wrong:
        said, cure = f"expected {', '.join(wrong)}", f"{REINSTALL} with its constraints.txt"
        return Finding(what, False, said, "this machine", cure)
    shown = ", ".join(f"{name} {held[name]}" for name in ("flwr", "torch") if name in held)
    said = f"{ours.name} {ours.version} with {shown or several(len(needed), 'requirement')}"
    return Finding(what, True, said, "this machine", figures={"requirements": len(needed)})


def _compared(ours: Distribution, root: Path) -> Finding:
    what = "installed files"
    listed = [file for file in ours.files or () if file.parts[0] in PACKAGES]
    changed = [str(file) for file in listed if not _is_as_listed(root / file, file.hash)]
    known = {root / file for file in listed}
    there = (file for package in PACKAGES for file in (root / package).rglob("*.py"))
    added = sorted(str(file.relative_to(root)) for file in there if file not in known)
    if not listed:
        return Finding(what, False, "the wheel's list of files is empty", "this machine", REINSTALL)
    if changed or added:
        parts = (("changed since they were installed", changed), ("not of the wheel", added))
        said = "; ".join(f"{text}: {_some(names)}" for text, names in parts if names)
        return Finding(what, False, said, "this machine", REINSTALL)
    said = f"{several(len(listed), 'file')} of {ours.version} are those of the wheel"
    return Finding(what, True, said, "this machine", figures={"files": len(listed)})


def _is_as_listed(file: Path, listed: object) -> bool:
    value, mode = getattr(listed, "value", None), getattr(listed, "mode", "")
    if mode != "sha256" or not file.is_file():
        return False
    found = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest())
    return bool(found.rstrip(b"=").decode() == value)


def _is_editable(one: Distribution) -> bool:
    try:
        return bool(json.loads(one.read_text("direct_url.json") or "{}")["dir_info"]["editable"])
    except (ValueError, KeyError, TypeError):
        return False


def _tops(one: Distribution) -> set[str]:
    listed = {file.parts[0] for file in one.files or () if file.suffix == ".py"}
    return listed | {*(one.read_text("top_level.txt") or "").split()}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")

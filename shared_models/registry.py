"""Find a net, task, step, strategy or rule by name.

Ours come from a dictionary literal of ``name: "module:function"``, imported on first use, so that a
name can be checked without importing torch. Others come from installed distributions by entry point
(``consilia.nets``, ``.tasks``, ``.steps``, ``.strategies``, ``.rules``) and are looked at only if
the caller lists their distribution: what runs inside a hospital is the hospital's choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

Builtin = Mapping[str, str]


def known(kind: str, *, builtin: Builtin, plugins: Collection[str] = ()) -> list[str]:
    """Return the names one can ask for, sorted."""
    return sorted({*builtin, *_plugins(kind, plugins)})


def find(
    kind: str, name: str, *, builtin: Builtin, plugins: Collection[str] = ()
) -> Callable[..., Any]:
    """Return the function called ``name``.

    Args:
        kind: what is looked for, in the plural: ``nets``, ``tasks``, ...
        name: as written in the plan.
        builtin: ours, as ``name: "module:function"``.
        plugins: distributions whose entry points may be used, as ``name==version``.

    Raises:
        ValueError: if there is none; the message names those there are.
    """
    if name in builtin:
        module, _, attribute = builtin[name].partition(":")
        return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
    found = _plugins(kind, plugins)
    if name in found:
        return found[name].load()  # type: ignore[no-any-return]
    names = ", ".join(known(kind, builtin=builtin, plugins=plugins))
    raise ValueError(f"no {kind} called '{name}'; known: {names}")


def objections_to_params(function: Callable[..., Any], params: Mapping[str, Any]) -> list[str]:
    """Say which of ``params`` the keyword-only parameters of ``function`` do not take, or lack."""
    takes = {
        p.name: p
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    unknown = [
        f"unknown parameter '{name}'; known: {', '.join(sorted(takes)) or 'none'}"
        for name in params
        if name not in takes
    ]
    missing = [
        f"missing parameter '{name}'"
        for name, p in takes.items()
        if p.default is inspect.Parameter.empty and name not in params
    ]
    return unknown + missing


def _plugins(kind: str, allowed: Collection[str]) -> dict[str, Any]:
    return {
        point.name: point
        for point in entry_points(group=f"consilia.{kind}")
        if point.dist is not None and f"{point.dist.name}=={point.dist.version}" in allowed
    }

"""Everything a plan can name, and what is wrong with a plan that names something else."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping
from datetime import date
from pathlib import Path

from shared_models import imaging, nets, tasks
from shared_models import plan as plans
from shared_models.errors import DocumentError
from shared_models.plan import Choice, SignedPlan, StudyPlan, own_objections
from shared_models.registry import Builtin, find, objections_to_params

#: Strategies live with the coordinator; a site only needs to know their names.
STRATEGIES: Builtin = {
    "fedavg": "strategies.averaging:fedavg",
    "fedprox": "strategies.averaging:fedprox",
}
#: Parameters the platform gives, which a plan may not.
GIVEN = {"num_outputs"}


def objections(plan: StudyPlan, *, today: date, plugins: Collection[str] = ()) -> list[str]:
    """Return everything that is wrong with ``plan`` as a plan, each with its cure.

    Whether a particular hospital wants it is ``client.policy``'s question.
    """
    found = list(own_objections(plan, today=today))
    found += _of(plan.task, "tasks", "task", tasks.BUILTIN, plugins)
    found += _of(plan.net, "nets", "net", nets.BUILTIN, plugins)
    for number, step in enumerate(plan.imaging):
        found += _of(step, "steps", f"imaging.{number}", imaging.BUILTIN, plugins)
    if plan.strategy.name not in STRATEGIES:
        found.append(_unknown("strategy", plan.strategy.name, STRATEGIES))
    found += _strategy_objections(plan)
    return found or list(_made_objections(plan, plugins))


def objections_to_file(file: Path, *, today: date) -> tuple[SignedPlan | None, list[str]]:
    """Read a plan file and return it, if it is a plan, with everything that is wrong with it.

    A file that is no plan is still searched for unknown names, so that all is told at once.

    Raises:
        DocumentError: if there is no such file.
    """
    text = plans.read_text(file)
    try:
        signed = plans.parse(text)
    except DocumentError as error:
        return None, [*error.objections, *_unknown_names(text)]
    return signed, objections(signed.plan, today=today)


def _unknown_names(text: str) -> Iterator[str]:
    """Yield the unknown names of a plan whose other contents are in doubt."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError):
        return
    steps = data.get("imaging")
    asked = [
        ("tasks", "task", data.get("task"), tasks.BUILTIN),
        ("nets", "net", data.get("net"), nets.BUILTIN),
        ("strategies", "strategy", data.get("strategy"), STRATEGIES),
        *(
            ("steps", f"imaging.{number}", step, imaging.BUILTIN)
            for number, step in enumerate(steps if isinstance(steps, list) else [])
        ),
    ]
    for kind, where, table, builtin in asked:
        name = table.get("name") if isinstance(table, dict) else None
        if isinstance(name, str) and name.isascii() and name not in builtin:
            known = ", ".join(sorted(builtin))
            yield f"{where}.name: no {kind} called '{name[:64]}'; known: {known}"


def _of(
    choice: Choice, kind: str, where: str, builtin: Builtin, plugins: Collection[str]
) -> Iterator[str]:
    try:
        function = find(kind, choice.name, builtin=builtin, plugins=plugins)
    except ValueError as error:
        yield f"{where}.name: {error}"
        return
    given = GIVEN & set(choice.params)
    if given:
        yield f"{where}.params: {', '.join(given)} is decided by the task; remove it"
    params = {**choice.params, **dict.fromkeys(GIVEN & _names(function), 1)}
    yield from (f"{where}.params: {text}" for text in objections_to_params(function, params))


def _strategy_objections(plan: StudyPlan) -> Iterator[str]:
    if plan.strategy.params:
        yield f"strategy.params: '{plan.strategy.name}' takes none"
    if plan.strategy.name == "fedprox" and plan.training.proximal_mu == 0:
        yield "training.proximal_mu: expected a number over 0 with the strategy fedprox"
    if plan.strategy.name == "fedavg" and plan.training.proximal_mu > 0:
        yield "training.proximal_mu: belongs to the strategy fedprox; choose it or set 0"


def _made_objections(plan: StudyPlan, plugins: Collection[str]) -> Iterator[str]:
    """Make everything once: values that only their makers can judge, and they raise anything."""
    try:
        imaging.pipeline([(s.name, dict(s.params)) for s in plan.imaging], plugins=plugins)
    except Exception as error:
        yield f"imaging: {type(error).__name__}: {error}"
    try:
        task = find("tasks", plan.task.name, builtin=tasks.BUILTIN, plugins=plugins)(
            **plan.task.params
        )
        nets.make(
            plan.net.name, plan.net.params, seed=0, num_outputs=task.num_outputs, plugins=plugins
        )
    except Exception as error:
        yield f"task or net: {type(error).__name__}: {error}"


def _names(function: object) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


def _unknown(where: str, name: str, builtin: Mapping[str, str]) -> str:
    return f"{where}.name: no strategies called '{name}'; known: {', '.join(sorted(builtin))}"

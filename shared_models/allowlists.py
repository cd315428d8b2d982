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
    "fedavgm": "strategies.averaging:fedavgm",
    "lloyd": "strategies.lloyd:lloyd",
}
#: Their parameters; a momentum is a number in [0, 1).
STRATEGY_PARAMS: dict[str, set[str]] = {"fedavgm": {"momentum"}, "lloyd": {"smallest_share"}}
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
    known = STRATEGY_PARAMS.get(plan.strategy.name, set())
    unknown = sorted(set(plan.strategy.params) - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        yield f"strategy.params: '{plan.strategy.name}' takes {takes}; remove {', '.join(unknown)}"
    momentum = plan.strategy.params.get("momentum", 0.0)
    if "momentum" in known and not (isinstance(momentum, int | float) and 0 <= momentum < 1):
        yield "strategy.params.momentum: expected a number in [0, 1)"
    if plan.strategy.name == "fedprox" and plan.training.proximal_mu == 0:
        yield "training.proximal_mu: expected a number over 0 with the strategy fedprox"
    if plan.strategy.name != "fedprox" and plan.training.proximal_mu > 0:
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
        net = nets.make(
            plan.net.name, plan.net.params, seed=0, num_outputs=task.num_outputs, plugins=plugins
        )
        spatial_dims = int(str(plan.net.params.get("spatial_dims", 2)))
        objection = tasks.objection_to_loss(task, spatial_dims=spatial_dims)
        if plan.training.patch and task.label_kind in ("class", "boxes"):
            yield (
                "training.patch: a patch does not show what an image's class or boxes say of the "
                "whole; train on whole images, or choose a task whose answer is an image"
            )
        if task.not_private and plan.privacy is not None:
            yield f"task: '{plan.task.name}' cannot be private: {task.not_private}"
        if task.label_kind == "boxes" and task.moved is tasks.moved_map:
            yield from _unmoved_objections(plan)
    except Exception as error:
        yield f"task or net: {type(error).__name__}: {error}"
        return
    if objection is not None:
        yield f"task: {objection}"
    yield from _label_objections(plan, task.label_kind)
    names = [name for name, _ in net.named_parameters()]
    terms = plan.training
    for field, prefixes in (("frozen", terms.frozen), ("personal", terms.personal)):
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in names):
                yield f"training.{field}: no parameter of the net begins with '{prefix}'"
    if all(name.startswith(terms.frozen) for name in names):
        yield "training.frozen: nothing is left to train; freeze less"
    elif all(name.startswith(terms.frozen + terms.personal) for name in names):
        yield "training.personal: nothing is left to train together; keep less at the sites"


def _label_objections(plan: StudyPlan, label_kind: str) -> Iterator[str]:
    terms = plan.fingerprint
    if terms is None:
        return
    expected = {"class": "label", "map": "present"}.get(label_kind, "none")
    if terms.classes not in ("none", expected):
        yield f"fingerprint.classes: this task's labels are counted as '{expected}', or left out"
    is_within = terms.intensity is not None and terms.intensity.within == "foreground"
    if is_within and label_kind != "map":
        yield "fingerprint.intensity.within: this task has no label maps; ask for 'image'"


def _unmoved_objections(plan: StudyPlan) -> Iterator[str]:
    """Yield what would move images whose boxes the task leaves where they are."""
    for name in ("flips", "shift"):
        if getattr(plan.training, name):
            yield (
                f"training.{name}: the boxes of task '{plan.task.name}' do not move with their "
                f"images; take {name} out"
            )


def _names(function: object) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


def _unknown(where: str, name: str, builtin: Mapping[str, str]) -> str:
    return f"{where}.name: no strategies called '{name}'; known: {', '.join(sorted(builtin))}"

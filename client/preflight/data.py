"""Whether the hospital's images and labels are what the plan takes them for.

Only counts and sizes are told: never a label's text, a patient, a name or a path. What the readers
say of an image is theirs by design free of those; of anything else only the kind of error is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from client.preflight.base import Case, Depth, Finding, several
from shared_models.errors import DataError
from shared_models.plan import StudyPlan

if TYPE_CHECKING:
    from shared_models.cohort import Row
    from shared_models.tasks import Task

#: How many images are opened; 0 is all.
SAMPLES: dict[Depth, int] = {"quick": 5, "sample": 50, "all": 0}
LINE = re.compile(r"^line \d+: ")
FAR = 4.0  # resampling by more than that makes images up, or throws most of them away


class Seen(NamedTuple):
    """One image after the plan's steps: (n, [z,] y, x), spacing before, and its label's values."""

    num_images: int
    size: tuple[int, ...]
    spacing_before_mm: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    classes: frozenset[int]


def manifest(case: Case) -> Iterator[Finding]:
    """Yield whether the manifest can be read, and every file it names is there."""
    from shared_models import cohort

    what, data = "manifest", case.config.data
    if not data.manifest.is_file():
        said, cure = "data.manifest names no file", "correct data.manifest in site.toml"
        yield Finding(what, False, said, "data", cure)
        return
    if not data.root.is_dir():
        said, cure = "data.root names no folder", "correct data.root in site.toml, or mount it"
        yield Finding(what, False, said, "data", cure)
        return
    key = "" if case.plan is None else cohort.plan_key(case.plan)
    has_labels = case.plan is None or _task(case, case.plan).label_kind != "none"
    try:
        case.rows = cohort.read_rows(data.manifest, root=data.root, key=key, has_labels=has_labels)
    except DataError as error:
        named = f"{data.manifest.name}: "
        found = [
            text.removeprefix(named).replace(data.manifest.name, "the manifest")
            for text in error.objections
        ]
        yield Finding(what, False, *_tally(found, "line"), figures={"objections": len(found)})
        return
    patients = len({row.patient for row in case.rows})
    said = f"{several(len(case.rows), 'line')}, {several(patients, 'patient')}; every file is there"
    figures = {"lines": len(case.rows), "patients": patients}
    yield Finding(what, True, said, "data", figures=figures)


def patients(case: Case) -> Iterator[Finding]:
    """Yield whether there are enough patients, and delta is small enough for so many."""
    if not case.rows or case.plan is None:
        return
    plan, policy = case.plan, case.config.policy
    train, test = (len({r.patient for r in case.rows if r.split == s}) for s in ("train", "test"))
    figures = {"train": train, "test": test}
    said = f"{train} to train on, {test} to test on"
    fewest = max(plan.min_patients, policy.min_patients)
    if train < fewest:
        said += f"; at least {fewest} are needed to train"
        cure = "list more patients in the manifest, or stay out of this study"
        yield Finding("patients", False, said, "data", cure, figures)
    elif test < policy.min_test_patients:
        said += f"; metrics over fewer than {policy.min_test_patients} stay in the hospital"
        cure = "list more patients for the test, if the study is to see this site's metrics"
        yield Finding("patients", None, said, "data", cure, figures)
    else:
        yield Finding("patients", True, said, "data", figures=figures)
    if plan.privacy is not None and train:
        is_small = plan.privacy.delta < 1 / train
        said = f"delta {plan.privacy.delta:g}, one over the patients is {1 / train:.2g}"
        cure = "ask for a plan with a delta under one over the patients"
        yield Finding("delta", is_small, said, "data", cure)


def labels(case: Case) -> Iterator[Finding]:
    """Yield whether the labels are the plan's classes, in the plan's order, in every split."""
    if not case.rows or case.plan is None:
        return
    task, classes = _task(case, case.plan), _classes(case.plan)
    order = _order(case, case.plan, task)
    if order is not None:
        yield order
    if task.label_kind in ("map", "none"):
        return  # what maps hold is seen when they are opened
    held = [(row.split, _held(row.label, task, classes)) for row in case.rows]
    unknown = sum(found is None for _, found in held)
    if unknown:
        kinds = "no boxes of" if task.label_kind == "boxes" else "none of"
        said = f"{unknown} of {several(len(case.rows), 'label')} are {kinds} the plan's classes"
        cure = f"correct them to {', '.join(classes)}, or ask for a plan that names them"
        yield Finding("labels", False, said, "data", cure, {"unknown": unknown})
        return
    counts = {
        split: Counter(number for of, found in held if of == split for number in found or ())
        for split in ("train", "test")
    }
    absent = [
        f"no {name} to {split} on"
        for split, found in counts.items()
        for number, name in enumerate(classes)
        if not found[number]
    ]
    if absent:
        cure = "check the manifest's splits; a class that is not there is not learned here"
        yield Finding("labels", None, ", ".join(absent), "data", cure)
        return
    told = ", ".join(f"{name} {counts['train'][i]}" for i, name in enumerate(classes))
    yield Finding("labels", True, f"the plan's classes; to train on: {told}", "data")


def images(case: Case) -> Iterator[Finding]:
    """Yield whether images can be read, and what the plan's steps make of them."""
    if not case.rows:
        return
    sample = _sample(case.rows, SAMPLES[case.depth])
    seen, broken = [], list[str]()
    for done, row in enumerate(sample):
        case.progress("reading images", done, len(sample))
        try:
            seen.append(_seen(row, case))
        except DataError as error:
            broken += error.objections[:1]
        except Exception as error:  # a step of a plug-in may say anything
            broken.append(f"it cannot be prepared as the plan says: {type(error).__name__}")
    figures = {"read": len(seen), "broken": len(broken), "images": len(case.rows)}
    if broken:
        said, owner, cure = _tally(broken, "image")
        said = f"of {len(sample)} opened, {said}"
        yield Finding("images", False, said, owner, cure, figures)
    else:
        said = f"{len(seen)} of {len(case.rows)} opened, all readable"
        yield Finding("images", True, said, "data", figures=figures)
    if seen:
        yield _geometry(case, seen)
        yield from _maps(case, seen)


def _geometry(case: Case, seen: Sequence[Seen]) -> Finding:
    what, before = "geometry", [min(s.spacing_before_mm) for s in seen]
    sizes = {one.size for one in seen}
    text = " × ".join(map(str, seen[0].size))
    spacing = " × ".join(f"{mm:.3g}" for mm in seen[0].spacing_mm)
    if case.plan is None:
        said = f"{several(len(sizes), 'size')}, such as {text}; spacing {spacing} mm"
        return Finding(what, True, said, "data", figures={"sizes": len(sizes)})
    if len(sizes) > 1:
        said = f"{len(sizes)} different sizes after the plan's imaging steps"
        cure = "ask for a plan whose steps end with 'resize' or 'crop-or-pad'"
        return Finding(what, False, said, "data", cure, {"sizes": len(sizes)})
    case.image_size = seen[0].size
    case.images_per_row = max(one.num_images for one in seen)
    if len(seen[0].size) == 3 and seen[0].size[0] == 1:
        said = f"{text}: single slices, where the plan's net takes volumes"
        cure = "list volumes in the manifest, or stay out of this study"
        return Finding(what, False, said, "data", cure)
    ratios = [b / a for s in seen for a, b in zip(s.spacing_mm, s.spacing_before_mm, strict=True)]
    said = f"{text} of {spacing} mm after the plan's steps; {min(before):.3g} mm and up before"
    if max(ratios) > FAR or min(ratios) < 1 / FAR:
        cure = "look at some of them as the plan makes them; the spacing changes by over four times"
        return Finding(what, None, said, "data", cure)
    return Finding(what, True, said, "data")


def _maps(case: Case, seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield which classes occur in the label maps that were opened."""
    if case.plan is None or _task(case, case.plan).label_kind != "map":
        return
    found = Counter(number for one in seen for number in one.classes)
    absent = [n for i, n in enumerate(_classes(case.plan), start=1) if not found[i]]
    if absent:
        said = f"no {', no '.join(absent)} in {several(len(seen), 'label map')}"
        cure = "compare what the maps' numbers mean with the order of the plan's classes"
        yield Finding("labels", None, said, "data", cure)
        return
    said = f"every class of the plan occurs in {several(len(seen), 'label map')}"
    yield Finding("labels", True, said, "data")


def _order(case: Case, plan: StudyPlan, task: Task) -> Finding | None:
    """Say that numbers mean other classes here, or that nobody said what they mean."""
    from client.policy import agrees_on_classes

    classes = _classes(plan)
    objection = agrees_on_classes(plan, case.config)
    if objection is not None:
        said, _, cure = objection.partition("; ")
        return Finding("labels", False, said, "data", cure)
    is_numbers = task.label_kind == "map" or any(
        row.label not in classes and _held(row.label, task, classes) is not None
        for row in case.rows
        if task.label_kind == "class"
    )
    if not is_numbers or case.config.data.classes:
        return None
    first = 1 if task.label_kind == "map" else 0
    read = ", ".join(f"{number} as {name}" for number, name in enumerate(classes, start=first))
    cure = (
        "compare with who made the labels, then write what they mean into data.classes in "
        "site.toml: no plan can then number them otherwise"
    )
    return Finding("labels", None, f"numbers, which the plan reads: {read}", "data", cure)


def _seen(row: Row, case: Case) -> Seen:
    """Open one image as training does, and return what can be told of it."""
    from shared_models import boxes, cohort
    from shared_models.imaging import pipeline
    from shared_models.volume import read_volume

    root, plan = case.config.data.root, case.plan
    if plan is None:
        original = read_volume(root / row.image)
        spacing = original.spacing_mm
        return Seen(1, original.data.shape, spacing, spacing, frozenset())
    prepare = pipeline(cohort.steps_of(plan), plugins=case.config.policy.plugins)
    task, classes = _task(case, plan), frozenset[int]()
    label_file = root / row.label if task.label_kind == "map" else None
    original, label = cohort.read_pair(root / row.image, label_file)
    made, label = prepare(original, label)
    try:
        if label is not None:
            encoded = task.encode_map(label.data)
            classes = frozenset(int(number) for number in set(encoded.ravel().tolist()))
        if task.label_kind == "boxes":
            found = boxes.prepared(boxes.read(row.label), before=original, after=made)
            task.encode_boxes(found, made.data.shape[1:])
    except ValueError as error:  # the task's own words: what it expected
        raise DataError(f"{error}; correct the labels, or ask for another plan") from None
    if plan.net.params.get("spatial_dims", 2) == 3:
        return Seen(1, made.data.shape, original.spacing_mm, made.spacing_mm, classes)
    return Seen(
        made.data.shape[0],
        made.data.shape[1:],
        original.spacing_mm[1:],
        made.spacing_mm[1:],
        classes,
    )


def _task(case: Case, plan: StudyPlan) -> Any:
    from client import mapping
    from shared_models import tasks
    from shared_models.registry import find
    from shared_models.signing import load_key

    make = find("tasks", plan.task.name, builtin=tasks.BUILTIN, plugins=case.config.policy.plugins)
    task = make(**plan.task.params)
    if not case.config.data.mapping.exists():
        return task
    key = load_key(case.config.signing_key)
    return mapping.applied(task, plan, mapping.read(case.config, key=key))


def _classes(plan: StudyPlan) -> list[str]:
    given = plan.task.params.get("classes", ())
    return [str(name) for name in given] if isinstance(given, tuple) else []


def _held(label: str, task: Task, classes: Sequence[str]) -> list[int] | None:
    """Return the class numbers that a label holds; None if the task does not know it."""
    from shared_models import boxes

    try:
        if task.label_kind != "boxes":
            return [task.encode_class(label)]
        listed = boxes.read(label)
        task.encode_boxes(listed, (1, 1))
        return [classes.index(box.name) for box in listed]
    except (DataError, ValueError):
        return None


def _sample(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """Return ``most`` rows, evenly spread; all of them if there are no more, or ``most`` is 0."""
    if not most or len(rows) <= most:
        return rows
    return [rows[number * len(rows) // most] for number in range(most)]


def _tally(objections: Sequence[str], word: str) -> tuple[str, Any, str]:
    """Return what is most often wrong, with how often, who can change it, and the cure."""
    texts = [LINE.sub("", text) for text in objections if not text.startswith("and ")]
    counted = Counter(texts).most_common()
    text, count = counted[0]
    said, _, cure = text.partition("; ")
    more = sum(number for _, number in counted[1:])
    where = f"{several(count, word)}: " if any(LINE.match(o) for o in objections) else ""
    where = f"{several(count, word)}: " if word == "image" else where
    said = f"{where}{said}" + (f"; and {more} with something else" if more else "")
    return said, "data", cure or "correct the manifest, or the files it names"

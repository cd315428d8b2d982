"""Whether what the site holds is what a plan takes it for: labels first, then geometry."""

from __future__ import annotations

import difflib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from client.config import SiteConfig
from client.ingest import catalogue
from client.ingest.catalogue import Listed
from client.mapping import Pairs, applied, values_of
from client.policy import agrees_on_classes
from client.preflight.base import Finding
from shared_models.errors import DataError
from shared_models.plan import StudyPlan
from shared_models.volume import read_volume

#: Resampling by more than that makes images up, or throws most of them away.
FAR = 4.0


def findings(
    connection: sqlite3.Connection, site: SiteConfig, plan: StudyPlan, pairs: Pairs
) -> Iterator[Finding]:
    """Yield what fits the plan and what does not, each with its cure."""
    from shared_models import tasks
    from shared_models.registry import find

    found = catalogue.listed(connection, modalities=site.ingest.modalities)
    if not found:
        cure = "take images in, or correct ingest.modalities in site.toml"
        yield Finding("images", False, "no series that may be trained on", "data", cure)
        return
    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN, plugins=site.policy.plugins)(
        **plan.task.params
    )
    classes = [str(name) for name in _given(plan)]
    wanted = "maps" if task.label_kind == "map" else "words"
    if site.ingest.labels != wanted:
        said = f"the manifest lists {site.ingest.labels}, the plan's task wants {wanted}"
        cure = f'write labels = "{wanted}" under [ingest] in site.toml, then: consilia-site data '
        yield Finding("labels", False, said, "settings", cure + "manifest")
    try:
        values_of(plan, pairs)
    except DataError as error:
        yield Finding("mapping", False, str(error), "data", "consilia-site data map")
        return
    if wanted == "maps":
        yield from _maps(found, site, plan, pairs, classes)
    else:
        yield from _words(found, applied(task, plan, pairs), classes)
    objection = agrees_on_classes(plan, site)
    if objection is not None:
        cure = "or leave data.classes empty, and say what is what: consilia-site data map OLD=NEW"
        yield Finding("order", False, objection, "data", cure)
    yield from _geometry(found, plan)


def _words(found: Sequence[Listed], task: object, classes: list[str]) -> Iterator[Finding]:
    """Yield whether every label is one of the plan's classes, letter by letter."""
    labels = Counter(one.series.label for one in found if one.series.label)
    missing = sum(one.series.label is None for one in found)
    if missing:
        said = f"{missing} series without a label, which are left out"
        yield Finding("unlabelled", None, said, "data", "consilia-site data label FILE.csv")
    unknown = [label for label in sorted(labels) if not _is_known(label, task)]
    for label in unknown:
        near = difflib.get_close_matches(label.lower(), [c.lower() for c in classes], 1, 0.6)
        meant = [c for c in classes if near and c.lower() == near[0]]
        said = f"'{label}', of {labels[label]} series, is no class of the plan"
        new = meant[0] if meant else "CLASS"
        cure = f"correct it, or say what it is: consilia-site data map '{label}={new}'"
        yield Finding("labels", False, said, "data", cure)
    if labels and not unknown:
        told = ", ".join(f"{label} {number}" for label, number in sorted(labels.items()))
        yield Finding("labels", True, told, "data")
    if not labels:
        cure = "consilia-site data label FILE.csv"
        yield Finding("labels", False, "no series has a label", "data", cure)


def _maps(
    found: Sequence[Listed],
    site: SiteConfig,
    plan: StudyPlan,
    pairs: Pairs,
    classes: list[str],
) -> Iterator[Finding]:
    """Yield whether the maps' numbers are the plan's, and mean what they mean there."""
    mapped = [one for one in found if one.map is not None]
    if not mapped:
        cure = "consilia-site data label FILE.csv, with a column map"
        yield Finding("labels", False, "no series has a label map", "data", cure)
        return
    told, named = values_of(plan, pairs), Counter[tuple[int, str]]()
    present: Counter[int] = Counter()
    for one in mapped:
        assert one.map is not None
        data = read_volume(site.ingest.store / one.map.file).data
        values = [int(v) for v in np.unique(np.rint(data)) if v]
        present.update(values)
        named.update((v, one.map.names[v]) for v in values if v in one.map.names)
    unknown = sorted(v for v in present if told.get(v, v) > len(classes))
    if unknown:
        said = f"the maps hold {', '.join(map(str, unknown))}; the plan has {len(classes)} classes"
        cure = "say which class each is: consilia-site data map NUMBER=CLASS"
        yield Finding("values", False, said, "data", cure)
    swapped = {
        (value, name)
        for value, name in named
        if name in classes and told.get(value, value) != classes.index(name) + 1
    }
    if swapped:
        what = ", ".join(f"{value} is {name}" for value, name in sorted(swapped))
        cure = "consilia-site data map " + " ".join(f"{v}={n}" for v, n in sorted(swapped))
        yield Finding("order", False, f"in the segmentations {what}", "data", cure)
    elif not unknown:
        said = ", ".join(
            f"{value} as {classes[told.get(value, value) - 1]} in {number}"
            for value, number in sorted(present.items())
            if told.get(value, value)
        )
        is_told = bool(pairs) or bool(site.data.classes) or bool(named)
        cure = "compare with who made them, then write data.classes in site.toml"
        yield Finding("values", True if is_told else None, said, "data", cure)


def _geometry(found: Sequence[Listed], plan: StudyPlan) -> Iterator[Finding]:
    steps = {step.name: dict(step.params) for step in plan.imaging}
    turns = Counter(one.volume.orientation for one in found)
    told = ", ".join(f"{turn} {number}" for turn, number in turns.most_common())
    if len(turns) > 1 and "orient" not in steps:
        cure = "ask for a plan with the step 'orient', or leave series out"
        yield Finding("orientation", False, told, "data", cure)
    else:
        yield Finding("orientation", True, told, "data")
    kinds = Counter(one.series.modality for one in found)
    told = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
    cure = "name those the plan is for in ingest.modalities of site.toml"
    yield Finding("modality", True if len(kinds) == 1 else None, told, "data", cure)
    spacings = np.array([(o.volume.z_mm, o.volume.y_mm, o.volume.x_mm) for o in found])
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    said = " x ".join(f"{a:.3g}-{b:.3g}" for a, b in zip(low, high, strict=True)) + " mm"
    target = np.atleast_1d(np.asarray(steps.get("resample", {}).get("spacing_mm", ()), float))
    if target.size in (2, 3):
        have = spacings[:, -target.size :]
        far = int((np.maximum(have / target, target / have) > FAR).any(axis=1).sum())
        if far:
            said += f"; {far} series are more than {FAR:g} times off the plan's spacing"
            cure = "leave them out, or ask for another spacing"
            yield Finding("spacing", False, said, "data", cure, {"far": far})
            return
    elif (high / low).max() > FAR and "resize" not in steps:
        cure = "ask for a plan that resamples"
        yield Finding("spacing", None, said, "data", cure)
        return
    yield Finding("spacing", True, said, "data")


def _given(plan: StudyPlan) -> tuple[object, ...]:
    given = plan.task.params.get("classes", ())
    return given if isinstance(given, tuple) else ()


def _is_known(label: str, task: object) -> bool:
    try:
        task.encode_class(label)  # type: ignore[attr-defined]
    except ValueError:
        return False
    return True

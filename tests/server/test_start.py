"""A warm start: the same for the same seed, better than none, and never another than stated."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from typer.testing import CliRunner

from server import start
from server.cli import app
from server.start import FILE, StartTerms, drawn, initial_weights, trained, warmed
from shared_models import nets
from shared_models import plan as plans
from shared_models.cohort import Patient
from shared_models.errors import ConsiliaError, DataError, DocumentError
from shared_models.nets.base import load_weights
from shared_models.plan import StudyPlan
from shared_models.tasks import classification
from shared_models.weights import Weights, digest, flatten, load, save, schema_of

TASK = classification.make(classes=("clear", "opaque"))
TERMS = StartTerms(steps=15, learning_rate=0.02, batch_size=4)
NewPlan = Callable[..., StudyPlan]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def patients_of(count: int = 8) -> list[Patient]:
    """Return patients of two images, whose class is how bright they are."""
    generator = torch.Generator().manual_seed(0)
    return [
        Patient(
            torch.randn((2, 1, 8, 8), generator=generator) + 2 * (n % 2),
            torch.full((2,), n % 2),
            ((1.0, 1.0),) * 2,
        )
        for n in range(count)
    ]


def loss_of(plan: StudyPlan, weights: Weights) -> float:
    net = nets.make(plan.net.name, plan.net.params, seed=0, num_outputs=2)
    load_weights(net, weights)
    with torch.no_grad():
        losses = [TASK.loss(net.eval()(p.images), p.targets).mean() for p in patients_of()]
    return float(torch.stack(losses).mean())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Make the coordinator's own images: a manifest of 8 patients, one picture each."""
    folder = tmp_path / "own"
    folder.mkdir()
    with (folder / "start.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "patient", "label", "split"])
        for number in range(8):
            name = f"MARKED-{number}.png"
            pixels = np.random.default_rng(number).integers(0, 99, (10, 10)) + 99 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            writer.writerow([name, f"p{number}", ("clear", "opaque")[number % 2], "val"])
    return folder


# --- training it


def test_the_same_seed_gives_the_same_start_bit_for_bit(plan: StudyPlan) -> None:
    found = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        found.append(flatten(trained(plan, TASK, patients_of(), terms=TERMS)))
    assert np.array_equal(*found)


def test_another_seed_gives_another_start(new_plan: NewPlan) -> None:
    found = [
        flatten(trained(new_plan(seed=seed), TASK, patients_of(), terms=TERMS)) for seed in (1, 2)
    ]
    assert not np.array_equal(*found)


def test_a_start_is_better_than_the_weights_the_seed_alone_gives(plan: StudyPlan) -> None:
    longer = TERMS.model_copy(update={"steps": 80})
    before, after = drawn(plan, TASK), trained(plan, TASK, patients_of(), terms=longer)
    assert schema_of(before) == schema_of(after)
    assert loss_of(plan, after) < 0.5 * loss_of(plan, before)


def test_more_patients_in_a_step_than_there_are_take_them_all(plan: StudyPlan) -> None:
    many = StartTerms(steps=2, learning_rate=0.02, batch_size=100)
    all_ = many.model_copy(update={"batch_size": 3})
    found = [flatten(trained(plan, TASK, patients_of(3), terms=terms)) for terms in (many, all_)]
    assert np.array_equal(*found)


def test_nobody_is_nothing_to_train_on(plan: StudyPlan) -> None:
    with pytest.raises(ValueError, match="expected patients to train the start on"):
        trained(plan, TASK, [], terms=TERMS)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"learning_rate": 0.0}, {"batch_size": 0}, {"epochs": 3}]
)
def test_terms_of_a_start_are_in_bounds(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StartTerms.model_validate(change)


# --- stating it


def test_a_warmed_plan_states_the_digest_of_what_was_kept(
    plan: StudyPlan, images: Path, tmp_path: Path
) -> None:
    stated, number = warmed(
        plan, images / "start.csv", root=images, run_dir=tmp_path / "run", terms=TERMS
    )
    kept = load(tmp_path / "run" / FILE)
    assert number == 8
    assert stated == plan.model_copy(update={"start": digest(flatten(kept))})
    assert not np.array_equal(flatten(kept), flatten(drawn(plan, TASK)))
    begun = initial_weights(stated, TASK, tmp_path / "run")
    assert np.array_equal(flatten(begun), flatten(kept))


def test_images_that_cannot_be_used_make_no_start(
    plan: StudyPlan, images: Path, tmp_path: Path
) -> None:
    (images / "MARKED-3.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        warmed(plan, images / "start.csv", root=images, run_dir=tmp_path / "run", terms=TERMS)
    assert "line 5" in str(caught.value)
    assert "MARKED" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# --- beginning with it


def test_without_a_start_a_study_begins_with_what_the_seed_gives(
    new_plan: NewPlan, tmp_path: Path
) -> None:
    save(tmp_path / FILE, {"x": np.ones(3, np.float32)})  # and looks at no file
    one, again, other = (
        flatten(initial_weights(new_plan(seed=seed), TASK, tmp_path)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_a_start_that_is_missing_or_cannot_be_read_is_asked_for(
    content: bytes | None, new_plan: NewPlan, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DocumentError, match=r"start\.safetensors should hold; put them there"):
        initial_weights(new_plan(start="ab" * 32), TASK, tmp_path)


def test_another_start_than_the_plan_states_is_refused(new_plan: NewPlan, tmp_path: Path) -> None:
    weights = drawn(new_plan(), TASK)
    save(tmp_path / FILE, weights)
    stated = new_plan(start=digest(flatten(weights)))
    assert initial_weights(stated, TASK, tmp_path).keys() == weights.keys()
    name = next(iter(weights))
    changed = weights[name].copy()
    changed.flat[0] = np.nextafter(changed.flat[0], np.float32(9))
    save(tmp_path / FILE, weights | {name: changed})
    with pytest.raises(DocumentError, match="not the start that the plan states by its digest"):
        initial_weights(stated, TASK, tmp_path)


# --- the command


def test_start_trains_a_start_and_states_it_in_a_plan_to_be_signed(
    plan: StudyPlan, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(plans.render(plan))
    out = tmp_path / "run"
    arguments = ["start", str(file), "--manifest", str(images / "start.csv"), "--root", str(images)]
    arguments += ["--out", str(out), "--steps", "3", "--batch-size", "4"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    stated = plans.read(file)
    assert stated.signature is None
    assert stated.plan.start == digest(flatten(load(out / FILE)))
    assert stated.plan == plan.model_copy(update={"start": stated.plan.start})
    assert "trained on 8 patients, whom no epsilon covers" in done.output
    assert f"start = {stated.plan.start}; propose it with --start now" in done.output
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, ConsiliaError)
    assert "choose another --out" in str(again.exception)
    assert plans.read(file) == stated


def test_the_start_is_called_as_studies_look_for_it() -> None:
    assert start.FILE == "start.safetensors"

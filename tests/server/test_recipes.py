"""Every recipe is a plan that keeps its word."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import recipes
from server.hospitals import DataSet
from server.recipes import MOST_DELTA, check_task, delta_for, kind_of, plan_for
from shared_models.allowlists import objections
from shared_models.errors import ConsiliaError
from shared_models.plan import StudyPlan, parse, planned_events, render
from shared_models.privacy import epsilon

KEY = "0" * 64
IMAGES = {"picture": "film.PNG", "series": "series/p1", "volume": "brain.nii.gz"}
RECIPES = [
    file.stem.rsplit("-", 1)
    for file in sorted((Path(recipes.__file__).parent / recipes.FOLDER).glob("*.toml"))
]
TASKS = sorted({task for task, _ in RECIPES})


def data_set(kind: str = "picture", *, patients: int = 30) -> DataSet:
    rows = tuple(
        {"image": IMAGES[kind], "patient": f"{site}{n}", "label": "0", "split": split, "site": site}
        for site in ("east", "west")
        for split, count in (("train", patients), ("test", 5), ("val", 5))
        for n in range(count)
    )
    return DataSet(Path(), rows, ("clear", "opaque"))


def made(
    task: str, kind: str, *, target: float | None = None, rounds: int | None = None
) -> StudyPlan:
    return plan_for(
        data_set(kind),
        name="demo",
        task=task,
        coordinator=KEY,
        seed=7,
        epsilon=target,
        num_rounds=rounds,
    )


@pytest.mark.parametrize(("task", "kind"), RECIPES)
@pytest.mark.parametrize("target", [None, 8.0])
def test_every_recipe_is_a_plan_without_objections(
    task: str, kind: str, target: float | None
) -> None:
    plan = made(task, kind, target=target)
    assert objections(plan, today=datetime.now(UTC).date()) == []
    assert parse(render(plan)).plan == plan


@pytest.mark.parametrize(("task", "kind"), RECIPES)
def test_a_private_plan_costs_what_was_asked_and_hardly_less(task: str, kind: str) -> None:
    plan = made(task, kind, target=8.0)
    assert plan.privacy is not None
    cost = epsilon(planned_events(plan), delta=plan.privacy.delta)
    assert 7.9 < cost <= plan.privacy.epsilon == 8.0
    assert [event.purpose for event in planned_events(plan)] == ["train", "alone"]


def test_a_plan_is_of_its_data_set() -> None:
    plan = made("classification", "picture")
    assert plan.sites == ("east", "west")
    assert plan.rounds.quorum == 2
    assert plan.task.params["classes"] == ("clear", "opaque")
    assert (plan.name, plan.seed, plan.coordinator) == ("demo", 7, KEY)
    assert plan.purpose == "demonstration"
    assert plan.privacy is None


def test_a_plan_is_valid_for_a_month() -> None:
    days = made("classification", "picture").expires - datetime.now(UTC).date()
    assert timedelta(days=29) <= days <= timedelta(days=30)
    assert isinstance(made("classification", "picture").expires, date)


def test_fewer_rounds_need_less_noise_for_the_same_epsilon() -> None:
    short = made("classification", "picture", target=8.0, rounds=2)
    long = made("classification", "picture", target=8.0, rounds=40)
    assert (short.training.num_rounds, long.training.num_rounds) == (2, 40)
    assert short.privacy is not None
    assert long.privacy is not None
    assert short.privacy.noise_multiplier < long.privacy.noise_multiplier


def test_a_small_epsilon_is_met_with_smaller_steps() -> None:
    """The noise of a step, its rate times its deviation, hardly grows; a large epsilon is as 8."""
    plans = {value: made("classification", "picture", target=value) for value in (2.0, 8.0, 16.0)}
    assert plans[16.0].training.learning_rate == plans[8.0].training.learning_rate
    assert plans[2.0].training.learning_rate == plans[8.0].training.learning_rate / 4
    noise = {
        value: plan.training.learning_rate * plan.privacy.noise_multiplier
        for value, plan in plans.items()
        if plan.privacy is not None
    }
    assert noise[2.0] < 1.2 * noise[8.0]


@pytest.mark.parametrize("target", [0.0, -1.0, 1e-9, float("nan"), float("inf")])
def test_an_epsilon_that_cannot_be_met_is_told_with_the_cure(target: float) -> None:
    with pytest.raises(ConsiliaError, match="ask for more, or plan fewer --rounds"):
        made("classification", "picture", target=target)


def test_images_without_a_recipe_are_told_with_those_there_are() -> None:
    with pytest.raises(ConsiliaError) as caught:
        made("divination", "picture")
    assert str(caught.value) == (
        "no recipe called 'divination-picture' (task-images); known: "
        + ", ".join(f"{task}-{kind}" for task, kind in RECIPES)
    )


def test_a_task_no_recipe_is_for_is_told_with_those_there_are() -> None:
    check_task("classification")
    check_task("segmentation")
    with pytest.raises(ConsiliaError, match=f"'divination'; known: {', '.join(TASKS)}$"):
        check_task("divination")


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        ("a.png", "picture"),
        ("a.JPEG", "picture"),
        ("a.nii", "volume"),
        ("a.NII.GZ", "volume"),
        ("series/a", "series"),
        ("a.dcm", "series"),
    ],
)
def test_images_are_known_by_their_names(image: str, kind: str) -> None:
    data = data_set()
    rows = tuple(row | {"image": image} for row in data.rows)
    assert kind_of(data._replace(rows=rows)) == kind


class Trains(DataSet):
    """A data set that knows its largest training set only."""

    def training_patients(self) -> dict[str, int]:
        return {"small": 1, "large": len(self.classes)}


@given(patients=st.integers(1, 20_000))
def test_delta_is_well_under_one_over_the_patients_and_has_one_digit(patients: int) -> None:
    delta = delta_for(Trains(Path(), (), ("",) * patients))
    assert 0 < delta <= min(1 / (10 * patients), MOST_DELTA) * (1 + 1e-12)
    assert delta > min(1 / (10 * patients), MOST_DELTA) / 2.0000001
    assert float(f"{delta:.0e}") == delta

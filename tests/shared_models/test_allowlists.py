"""What a plan may name, and what is wrong with one that names something else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from shared_models import tasks
from shared_models.allowlists import STRATEGIES, STRATEGY_PARAMS, objections, objections_to_file
from shared_models.errors import DocumentError
from shared_models.plan import StudyPlan, render
from shared_models.registry import find
from shared_models.tasks import classification, detection, moved_map

TODAY = date(2026, 3, 1)
NewPlan = Callable[..., StudyPlan]


def test_a_good_plan_meets_no_objection(new_plan: NewPlan) -> None:
    assert objections(new_plan(), today=TODAY) == []


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        (
            {"net": {"name": "resnet"}},
            "net.name: no nets called 'resnet'; known: ",
        ),
        (
            {"task": {"name": "divination"}},
            f"task.name: no tasks called 'divination'; known: {', '.join(sorted(tasks.BUILTIN))}",
        ),
        (
            {"strategy": {"name": "medain"}},
            "strategy.name: no strategies called 'medain'; known: fedavg, fedavgm, fedprox, lloyd",
        ),
        ({"imaging": [{"name": "blur"}]}, "imaging.0.name: no steps called 'blur'; known: "),
        (
            {"net": {"name": "densenet", "params": {"depth": 3}}},
            "net.params: unknown parameter 'depth'; known: ",
        ),
        (
            {"net": {"name": "densenet", "params": {"num_outputs": 3}}},
            "net.params: num_outputs is decided by the task; remove it",
        ),
        ({"task": {"name": "classification"}}, "task.params: missing parameter 'classes'"),
        ({"imaging": [{"name": "window"}]}, "imaging.0.params: missing parameter 'low'"),
        (
            {"strategy": {"name": "fedavg", "params": {"x": 1}}},
            "strategy.params: 'fedavg' takes none",
        ),
        (
            {"strategy": {"name": "fedavg", "params": {"momentum": 0.5}}},
            "strategy.params: 'fedavg' takes none; remove momentum",
        ),
        (
            {"strategy": {"name": "fedavgm", "params": {"momentun": 0.5}}},
            "strategy.params: 'fedavgm' takes momentum; remove momentun",
        ),
        (
            {"strategy": {"name": "fedavgm", "params": {"momentum": 1.0}}},
            "strategy.params.momentum: expected a number in [0, 1)",
        ),
        (
            {"strategy": {"name": "fedavgm", "params": {"momentum": "much"}}},
            "strategy.params.momentum: expected a number in [0, 1)",
        ),
        (
            {"strategy": {"name": "fedavgm", "params": {"momentum": [0.5]}}},
            "strategy.params.momentum: expected a number in [0, 1)",
        ),
        (
            {"strategy": {"name": "fedprox"}},
            "training.proximal_mu: expected a number over 0 with the strategy fedprox",
        ),
        (
            {"imaging": [{"name": "window", "params": {"low": 1, "high": 0}}]},
            "imaging: ValueError: expected low < high",
        ),
        (
            {"task": {"name": "classification", "params": {"classes": ["one"]}}},
            "task or net: ValueError: expected two or more different classes",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_cure(
    new_plan: NewPlan, change: dict[str, Any], objection: str
) -> None:
    assert any(o.startswith(objection) for o in objections(new_plan(**change), today=TODAY))


def test_a_task_whose_loss_mixes_patients_is_told_with_its_cure(
    new_plan: NewPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "_loss", lambda outputs, _: outputs.diff(dim=0).sum())
    found = objections(new_plan(), today=TODAY)
    assert any(o.startswith("task: expected a loss of one number per image") for o in found)
    monkeypatch.setattr(
        classification, "_loss", lambda outputs, _: (outputs - outputs.mean())[:, 0]
    )
    (objection,) = objections(new_plan(), today=TODAY)
    assert objection.startswith("task: expected a loss in which no image changes another's")


@pytest.mark.parametrize("is_moved", [True, False])
def test_a_task_that_leaves_boxes_where_they_are_may_not_have_its_images_moved(
    is_moved: bool, new_plan: NewPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_moved:
        whole = detection.make
        monkeypatch.setattr(
            detection, "make", lambda *, classes: whole(classes=classes)._replace(moved=moved_map)
        )
    plan = new_plan(
        task={"name": "detection", "params": {"classes": ["cell"]}},
        net={"name": "centernet"},
        training={
            "num_rounds": 1,
            "steps_per_round": 1,
            "sample_rate": 0.1,
            "learning_rate": 0.1,
            "flips": True,
            "shift": 2,
        },
        privacy=None,
    )
    expected = [
        f"training.{name}: the boxes of task 'detection' do not move with their images; take "
        f"{name} out"
        for name in ("flips", "shift")
    ]
    assert objections(plan, today=TODAY) == ([] if is_moved else expected)


@pytest.mark.parametrize("params", [{}, {"momentum": 0}, {"momentum": 0.9}])
def test_fedavgm_takes_a_momentum(params: dict[str, Any], new_plan: NewPlan) -> None:
    assert objections(new_plan(strategy={"name": "fedavgm", "params": params}), today=TODAY) == []


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ([], []),
        (["features.conv0", "features.norm0.weight"], []),
        (
            ["feature", "head."],
            ["training.frozen: no parameter of the net begins with 'head.'"],
        ),
        (
            ["features.", "class_layers."],
            ["training.frozen: nothing is left to train; freeze less"],
        ),
        (
            ["f", "c", "x"],
            [
                "training.frozen: no parameter of the net begins with 'x'",
                "training.frozen: nothing is left to train; freeze less",
            ],
        ),
    ],
)
def test_what_is_frozen_is_some_of_the_nets_parameters_and_not_all(
    frozen: list[str], expected: list[str], new_plan: NewPlan
) -> None:
    training = new_plan().training.model_dump() | {"frozen": frozen}
    assert objections(new_plan(training=training), today=TODAY) == expected


@pytest.mark.parametrize(
    ("personal", "frozen", "expected"),
    [
        (["features.norm"], [], []),
        (["head."], [], ["training.personal: no parameter of the net begins with 'head.'"]),
        (
            ["features."],
            ["class_layers."],
            ["training.personal: nothing is left to train together; keep less at the sites"],
        ),
    ],
)
def test_what_stays_at_the_sites_is_some_of_the_nets_parameters_and_not_all(
    personal: list[str], frozen: list[str], expected: list[str], new_plan: NewPlan
) -> None:
    changed = {"personal": personal, "frozen": frozen}
    training = new_plan().training.model_dump() | changed
    assert objections(new_plan(training=training), today=TODAY) == expected


def test_every_strategy_a_plan_may_name_can_be_made() -> None:
    assert {*STRATEGY_PARAMS} <= {*STRATEGIES}
    for name in STRATEGIES:
        function = find("strategies", name, builtin=STRATEGIES)
        assert {*signature(function).parameters} == STRATEGY_PARAMS.get(name, set())
        assert function()


def test_a_pull_belongs_to_fedprox(new_plan: NewPlan) -> None:
    training = new_plan().training.model_dump() | {"proximal_mu": 0.1}
    found = objections(new_plan(training=training), today=TODAY)
    assert found == ["training.proximal_mu: belongs to the strategy fedprox; choose it or set 0"]
    assert not objections(new_plan(training=training, strategy={"name": "fedprox"}), today=TODAY)


def test_all_objections_are_told_at_once(new_plan: NewPlan) -> None:
    plan = new_plan(
        net={"name": "resnet"},
        task={"name": "divination"},
        imaging=[{"name": "blur"}, {"name": "window"}],
        strategy={"name": "median"},
        expires=date(2000, 1, 1),
    )
    found = [objection.split(":")[0] for objection in objections(plan, today=TODAY)]
    assert found == [
        "expires",
        "task.name",
        "net.name",
        "imaging.0.name",
        "imaging.1.params",
        "imaging.1.params",
        "strategy.name",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"net": {"name": "densenet", "params": {"num_groups": 0}}},
        {"net": {"name": "densenet", "params": {"num_groups": 3}}},
        {"net": {"name": "densenet", "params": {"init_features": -4}}},
        {"net": {"name": "densenet", "params": {"block_config": "abc"}}},
        {"net": {"name": "densenet", "params": {"spatial_dims": 7}}},
        {"net": {"name": "unet", "params": {"channels": []}}},
        {"net": {"name": "unet", "params": {"spatial_dims": 7}}},
        {"net": {"name": "unet", "params": {"norm": "batch"}}},
        {"net": {"name": "unet", "params": {"channels": [8, 16], "strides": ["a"]}}},
        {"task": {"name": "classification", "params": {"classes": 3}}},
        {"task": {"name": "segmentation", "params": {"classes": [True, "true"]}}},
        {"task": {"name": "segmentation", "params": {"classes": ["\u00fc"]}}},
        {"imaging": [{"name": "resize", "params": {"size": [0, 4]}}]},
        {"imaging": [{"name": "resize", "params": {"size": 4}}]},
        {"imaging": [{"name": "resize", "params": {"size": [[1, 2], [3, 4]]}}]},
        {"imaging": [{"name": "window", "params": {"low": 1, "high": "a"}}]},
    ],
)
def test_a_hostile_parameter_is_an_objection_and_never_a_crash(
    new_plan: NewPlan, change: dict[str, Any]
) -> None:
    (objection,) = objections(new_plan(**change), today=TODAY)
    assert objection.startswith(("imaging: ", "task or net: "))


def test_a_plan_file_is_returned_with_its_objections(new_plan: NewPlan, tmp_path: Path) -> None:
    file, plan = tmp_path / "plan.toml", new_plan(strategy={"name": "median"})
    file.write_text(render(plan), encoding="utf-8")
    signed, found = objections_to_file(file, today=TODAY)
    assert signed is not None
    assert signed.plan == plan
    assert found == [
        "strategy.name: no strategies called 'median'; known: fedavg, fedavgm, fedprox, lloyd"
    ]


def test_a_file_that_is_no_plan_is_still_searched_for_unknown_names(
    new_plan: NewPlan, tmp_path: Path
) -> None:
    file = tmp_path / "plan.toml"
    text = render(new_plan(net={"name": "resnet"}, imaging=[{"name": "blur"}]))
    file.write_text(text.replace("quorum = 2", "quorum = 0"), encoding="utf-8")
    signed, found = objections_to_file(file, today=TODAY)
    assert signed is None
    assert [o.split(":")[0] for o in found] == ["rounds.quorum", "net.name", "imaging.0.name"]


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "[", "net = 3\nimaging = 4"])
def test_a_file_that_is_no_plan_at_all_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text, encoding="utf-8")
    signed, found = objections_to_file(file, today=TODAY)
    assert signed is None
    assert found


def test_a_missing_plan_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="there is no file"):
        objections_to_file(tmp_path / "plan.toml", today=TODAY)

"""Each rule objects alone and in its own words; together they all object at once."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client import peers, policy
from client.policy import RULES, judge
from shared_models.plan import planned_events
from shared_models.privacy import epsilon

TODAY = datetime.now(UTC).date()
STRANGER = "ab" * 32

#: The rule, what is changed in the plan, what at the site, and what is said.
ALONE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "is_invited": (
        {"sites": ["south", "west"]},
        {},
        "sites: the plan does not name this site, north",
    ),
    "knows_coordinator": (
        {"coordinator": STRANGER},
        {},
        "coordinator: this site does not know the key; add it to policy.coordinators if it should",
    ),
    "allows_purpose": (
        {"purpose": "quality-assurance"},
        {},
        "purpose: 'quality-assurance' is not allowed at this site; "
        "allowed: demonstration, research",
    ),
    "allows_task": (
        {},
        {"policy.tasks": ["segmentation"]},
        "task.name: 'classification' is not allowed at this site; allowed: segmentation",
    ),
    "allows_net": (
        {},
        {"policy.nets": []},
        "net.name: 'densenet' is not allowed at this site; allowed: none",
    ),
    "allows_rounds": (
        {"training.num_rounds": 3},
        {"policy.max_rounds": 2},
        "training.num_rounds: expected at most 2 at this site, got 3",
    ),
    "demands_privacy": (
        {"privacy": None},
        {},
        "privacy: the plan has no privacy terms and this site does not allow that; add a [privacy] "
        "table to the plan",
    ),
    "allows_epsilon": (
        {"privacy.epsilon": 4.5},
        {},
        "privacy.epsilon: the study costs 4.5 per patient, this site allows 4 per study",
    ),
    "allows_delta": (
        {"privacy.delta": 0.06},
        {},
        "privacy.delta: expected at most 0.05 at this site, got 0.06",
    ),
    "knows_peers": (
        {"rounds.secure_aggregation": True, "rounds.quorum": 2},
        {},
        "rounds.secure_aggregation: this site trusts 0 of the plan's other sites, it must hide "
        "among 1; compare their keys and add them with consilia-site trust",
    ),
}


def test_a_plan_within_every_rule_meets_no_objection(plan_of, site_of) -> None:
    assert judge(plan_of(), site_of(), today=TODAY) == []


def test_every_rule_is_tried() -> None:
    assert list(ALONE) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("name", ALONE)
def test_each_rule_alone_objects_with_its_sentence(name: str, plan_of, site_of) -> None:
    plan_changes, site_changes, sentence = ALONE[name]
    plan, site = plan_of(plan_changes), site_of(site_changes)
    assert getattr(policy, name)(plan, site) == sentence
    assert judge(plan, site, today=TODAY) == [sentence]


@pytest.mark.parametrize(
    ("plan_changes", "site_changes"),
    [
        ({"training.num_rounds": 2}, {"policy.max_rounds": 2}),
        ({"privacy.epsilon": 4.0}, {"policy.max_epsilon_per_study": 4.0}),
        ({"privacy.delta": 0.05}, {"policy.max_delta": 0.05}),
        ({"privacy": None}, {"policy.allow_without_privacy": True}),
    ],
    ids=["rounds", "epsilon", "delta", "without privacy"],
)
def test_what_is_just_allowed_is_allowed(
    plan_changes: dict[str, Any], site_changes: dict[str, Any], plan_of, site_of
) -> None:
    assert judge(plan_of(plan_changes), site_of(site_changes), today=TODAY) == []


def test_all_objections_come_at_once(plan_of, site_of) -> None:
    changes = {
        "sites": ["south", "south"],
        "coordinator": STRANGER,
        "purpose": "quality-assurance",
        "training.num_rounds": 300,
        "privacy.delta": 0.06,
        "rounds.quorum": 3,
        "expires": TODAY - timedelta(days=1),
        "task.name": "captioning",
        "net.name": "resnet",
        "imaging": [{"name": "sharpen"}, {"name": "resize", "params": {"sise": [16, 16]}}],
        "strategy": {"name": "medain"},
    }
    found = judge(plan_of(changes), site_of(), today=TODAY)
    starts = [objection.split(":")[0] for objection in found]
    assert sorted(starts) == sorted(
        [
            *("sites", "coordinator", "purpose", "training.num_rounds", "privacy.delta"),
            *("task.name", "net.name", "privacy.epsilon"),  # not allowed here, or too dear
            *("sites", "rounds.quorum", "expires", "privacy.epsilon"),  # wrong in themselves
            *("task.name", "net.name", "strategy.name", "imaging.0.name"),  # unknown
            *("imaging.1.params", "imaging.1.params"),
        ]
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"net.name": "resnet"},
            r"net.name: no nets called 'resnet'; known: .*densenet.*unet.*",
        ),
        (
            {"task.name": "captioning"},
            r"task.name: no tasks called 'captioning'; known: .*classification.*segmentation.*",
        ),
        (
            {"imaging": [{"name": "sharpen"}]},
            r"imaging.0.name: no steps called 'sharpen'; known: .*crop-or-pad, .*window.*",
        ),
        (
            {"strategy": {"name": "medain"}},
            r"strategy.name: no strategies called 'medain'; known: .*fedavg.*fedprox.*",
        ),
        (
            {"net.params": {"depth": 3}},
            r"net.params: unknown parameter 'depth'; known: block_config, growth_rate, .*",
        ),
    ],
    ids=["net", "task", "step", "strategy", "parameter"],
)
def test_unknown_names_list_the_known_ones(
    changes: dict[str, Any], sentence: str, plan_of, site_of
) -> None:
    site = site_of(
        {
            "policy.nets": ["densenet", "resnet"],
            "policy.tasks": ["classification", "captioning"],
        }
    )
    (found,) = judge(plan_of(changes), site, today=TODAY)
    assert re.fullmatch(sentence, found)


def test_the_cost_is_what_the_site_computes_when_the_plan_states_less(plan_of, site_of) -> None:
    plan = plan_of({"privacy.epsilon": 0.5, "privacy.noise_multiplier": 0.5})
    cost = epsilon(planned_events(plan), delta=0.01)
    assert cost > 4
    found = policy.allows_epsilon(plan, site_of())
    assert found == (
        f"privacy.epsilon: the study costs {cost:g} per patient, this site allows 4 per study"
    )


def test_training_alone_counts_towards_the_cost(plan_of, site_of) -> None:
    both, one = plan_of({"compare_alone": True}), plan_of({"compare_alone": False})
    costs = [epsilon(planned_events(plan), delta=0.01) for plan in (both, one)]
    assert costs[0] > costs[1]
    site = site_of({"policy.max_epsilon_per_study": costs[1]})
    for compares, is_allowed in ((False, True), (True, False)):
        plan = plan_of({"compare_alone": compares, "privacy.epsilon": costs[1]})
        assert (policy.allows_epsilon(plan, site) is None) == is_allowed


def test_without_privacy_terms_epsilon_and_delta_are_not_asked(plan_of, site_of) -> None:
    plan = plan_of({"privacy": None})
    assert policy.allows_epsilon(plan, site_of()) is None
    assert policy.allows_delta(plan, site_of()) is None


def test_a_plan_is_judged_by_the_day_given(plan_of, site_of) -> None:
    plan = plan_of({"expires": date(2030, 1, 1)})
    assert judge(plan, site_of(), today=date(2030, 1, 1)) == []
    (found,) = judge(plan, site_of(), today=date(2030, 1, 2))
    assert found == "expires: the plan expired on 2030-01-01; propose a new one"


def test_a_plugin_the_site_does_not_list_is_unknown_here(plan_of, site_of) -> None:
    site = site_of({"policy.nets": ["theirs"], "policy.plugins": ["nowhere==1.0"]})
    (found,) = judge(plan_of({"net.name": "theirs", "net.params": {}}), site, today=TODAY)
    assert found.startswith("net.name: no nets called 'theirs'; known: ")


SECURE = {
    "sites": ["north", "south", "west"],
    "rounds.secure_aggregation": True,
    "rounds.quorum": 3,
    "training.steps_per_round": 1,
}


@pytest.mark.parametrize(
    ("noise_shares", "names", "is_allowed"),
    [
        (1, [], False),
        (1, ["east", "north"], False),
        (1, ["west"], True),
        (2, ["south"], True),
        (3, ["south", "east"], False),
        (3, ["south", "west"], True),
    ],
)
def test_enough_of_the_plans_other_sites_must_be_trusted_to_hide_among(
    noise_shares: int, names: list[str], is_allowed: bool, plan_of, site_of, tmp_path: Path
) -> None:
    site = site_of({"policy.peers": tmp_path / "peers.toml"})
    for name in names:
        peers.trust(site.policy.peers, name=name, key="ab" * 32)
    plan = plan_of(SECURE | {"privacy.noise_shares": noise_shares})
    assert (policy.knows_peers(plan, site) is None) == is_allowed
    assert (judge(plan, site, today=TODAY) == []) == is_allowed


def test_without_secure_aggregation_nobody_has_to_be_trusted(plan_of, site_of) -> None:
    assert (
        policy.knows_peers(plan_of(SECURE | {"rounds.secure_aggregation": False}), site_of())
        is None
    )

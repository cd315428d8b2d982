"""Each rule objects alone and in its own words; together they all object at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import ledger, peers, policy
from client.config import PolicySettings, SiteConfig
from client.policy import RULES, RULES_BEFOREHAND, is_quiet, judge
from shared_models.errors import LedgerError
from shared_models.plan import StudyPlan, event_of, planned_events
from shared_models.privacy import epsilon
from shared_models.signing import digest

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
    "agrees_on_classes": (
        {},
        {"data.classes": ["opaque", "clear"]},
        "task.params.classes: this site's labels number opaque, clear, the plan's clear, opaque; "
        "ask for this order, or correct data.classes if it is not what the labels mean",
    ),
    "knows_peers": (
        {"rounds.secure_aggregation": True, "rounds.quorum": 2},
        {},
        "rounds.secure_aggregation: this site trusts 0 of the plan's other sites, it must hide "
        "among 1; compare their keys and add them with consilia-site trust",
    ),
    "allows_fingerprint": (
        {
            "imaging": (),
            "fingerprint": {
                "size": {"low": 8, "high": 512, "num_cells": 30},
                "noise_multiplier": 2.0,
            },
        },
        {},
        "fingerprint: this site tells no fingerprints of its images; ask its people to set "
        "policy.allow_fingerprint, or leave the [fingerprint] table out",
    ),
    "allows_lifetime": (
        {},
        {"policy.max_epsilon_lifetime": 0.5},
        "privacy.epsilon: with what was spent before, this cohort's lifetime would come to COST of "
        "0.5 at delta 0.01; ask for a cheaper study, or take part with other patients",
    ),
    "allows_size": (
        {"net.params": {"init_features": 64, "growth_rate": 32, "block_config": [6, 12]}},
        {"policy.max_update_mb": 4.0},
        "net: an update is 4.9 MB, this site lets 4 leave; ask for a smaller net, or raise "
        "policy.max_update_mb",
    ),
}


def test_a_plan_within_every_rule_meets_no_objection(plan_of, site_of) -> None:
    assert judge(plan_of(), site_of(), today=TODAY) == []


def test_every_rule_is_tried() -> None:
    assert list(ALONE) == [rule.__name__ for rule in (*RULES, *RULES_BEFOREHAND)]


@pytest.mark.parametrize("name", ALONE)
def test_each_rule_alone_objects_with_its_sentence(name: str, plan_of, site_of) -> None:
    plan_changes, site_changes, sentence = ALONE[name]
    plan, site = plan_of(plan_changes), site_of(site_changes)
    if "COST" in sentence:
        sentence = sentence.replace("COST", f"{epsilon(planned_events(plan), delta=0.01):g}")
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


def test_adding_a_rule_is_a_function_and_its_name(
    monkeypatch: pytest.MonkeyPatch, plan_of, site_of
) -> None:
    def rests_on_sundays(plan: StudyPlan, site: SiteConfig) -> str | None:
        """No study may have a multiple of seven rounds."""
        return None if plan.training.num_rounds % 7 else f"training.num_rounds: {site.name} rests"

    monkeypatch.setattr(policy, "RULES", (*RULES, rests_on_sundays))
    assert judge(plan_of({"training.num_rounds": 6}), site_of(), today=TODAY) == []
    found = judge(plan_of({"training.num_rounds": 7, "sites": ["south"]}), site_of(), today=TODAY)
    assert found[0].startswith("sites: ")
    assert "training.num_rounds: north rests" in found


@pytest.mark.parametrize("rule", [*RULES, *RULES_BEFOREHAND], ids=lambda rule: rule.__name__)
def test_every_rule_says_what_it_is_for(rule: policy.Rule) -> None:
    assert (rule.__doc__ or "").split("\n")[0].endswith((".", ","))


# --- the cohort's lifetime


@pytest.fixture
def site_with_ledger(site_of, tmp_path: Path) -> Callable[..., SiteConfig]:
    """Return a site whose ledger was charged for some steps of other studies, or of a plan."""

    def make(charges: dict[str, int], plan: StudyPlan, **changes: Any) -> SiteConfig:
        site: SiteConfig = site_of({"state_dir": tmp_path / "state"} | changes)
        plenty = ledger.Budget(per_study=900.0, lifetime=900.0, delta=0.01)
        for study, steps in charges.items():
            event = event_of(plan, steps=steps)
            ledger.reserve(site.state_dir, study=study, round_=0, event=event, budget=plenty)
        return site

    return make


def test_what_other_studies_spent_counts_towards_the_lifetime(plan_of, site_with_ledger) -> None:
    plan = plan_of({"compare_alone": False})
    alone = epsilon(planned_events(plan), delta=0.01)
    both = epsilon([*planned_events(plan), event_of(plan, steps=40)], delta=0.01)
    charges = {"5a" * 32: 40}
    for lifetime, is_allowed in ((both, True), ((alone + both) / 2, False)):
        site = site_with_ledger(charges, plan, **{"policy.max_epsilon_lifetime": lifetime})
        found = judge(plan, site, today=TODAY)
        assert (found == []) == is_allowed
        charges = {}
    assert found == [policy.allows_lifetime(plan, site)]
    assert f"would come to {both:g} of {(alone + both) / 2:g} at delta 0.01" in found[0]


def test_the_lifetime_is_counted_at_the_smallest_delta_ever_agreed(
    plan_of, site_with_ledger
) -> None:
    plan = plan_of({"compare_alone": False, "privacy.delta": 0.02})
    site = site_with_ledger({"5a" * 32: 1}, plan, **{"policy.max_epsilon_lifetime": 0.1})
    assert "at delta 0.01;" in (policy.allows_lifetime(plan, site) or "")


def test_a_study_that_has_begun_is_left_to_the_ledger(plan_of, site_with_ledger) -> None:
    plan = plan_of({"compare_alone": False})
    cost = epsilon(planned_events(plan), delta=0.01)
    site = site_with_ledger(
        {digest(plan): 2, "5a" * 32: 400}, plan, **{"policy.max_epsilon_lifetime": cost}
    )
    assert policy.allows_lifetime(plan, site) is None


def test_a_ledger_that_cannot_be_read_allows_nothing(plan_of, site_with_ledger) -> None:
    plan = plan_of()
    site = site_with_ledger({"5a" * 32: 1}, plan)
    (site.state_dir / ledger.FILE).write_text("{}\n")
    with pytest.raises(LedgerError):
        judge(plan, site, today=TODAY)


def test_without_privacy_terms_the_ledger_is_not_read(plan_of, site_with_ledger) -> None:
    site = site_with_ledger({"5a" * 32: 1}, plan_of())
    (site.state_dir / ledger.FILE).write_text("{}\n")
    assert policy.allows_lifetime(plan_of({"privacy": None}), site) is None


# --- size and classes


def test_an_update_is_as_large_as_what_the_gate_measures(plan_of, site_of) -> None:
    plan, masked = plan_of(), plan_of({"rounds.secure_aggregation": True})
    size = policy.update_bytes(plan)
    assert policy.update_bytes(masked) == 2 * size
    for limit, is_allowed in ((size / 2**20, True), ((size - 4) / 2**20, False)):
        site = site_of({"policy.max_update_mb": limit})
        assert (policy.allows_size(plan, site) is None) == is_allowed


def test_no_net_is_made_of_a_plan_that_names_what_there_is_not(plan_of, site_of) -> None:
    plan = plan_of({"net.name": "resnet"})
    site = site_of({"policy.nets": ["resnet"], "policy.max_update_mb": 0.001})
    (found,) = judge(plan, site, today=TODAY)
    assert found.startswith("net.name: no nets called")


def test_a_site_that_labels_with_words_takes_the_classes_in_any_order(plan_of, site_of) -> None:
    for classes in (["clear", "opaque"], ["opaque", "clear"]):
        plan = plan_of({"task.params": {"classes": classes}})
        assert policy.agrees_on_classes(plan, site_of()) is None
        same = site_of({"data.classes": classes})
        assert policy.agrees_on_classes(plan, same) is None
        assert policy.agrees_on_classes(plan_of({"task.params": {}}), same) is not None


# --- quiet hours


@pytest.fixture
def settings(site_of) -> Callable[..., PolicySettings]:
    def make(*hours: str, time_zone: str = "Europe/Berlin") -> PolicySettings:
        found: SiteConfig = site_of({"policy.quiet_hours": hours, "policy.time_zone": time_zone})
        return found.policy

    return make


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("hours", "quiet", "loud"),
    [
        ("07:00-19:00", ["2026-11-24T07:00", "2026-11-29T18:59"], ["06:59", "19:00", "23:00"]),
        ("mon-fri 07:00-19:00", ["2026-11-27T12:00"], ["2026-11-28T12:00", "2026-11-29T12:00"]),
        ("sat,sun 00:00-24:00", ["2026-11-28T00:00", "2026-11-29T23:59"], ["2026-11-27T23:59"]),
        ("fri-mon 12:00-13:00", ["2026-11-30T12:30"], ["2026-11-24T12:30"]),
        ("22:00-06:00", ["2026-11-24T22:00", "2026-11-24T05:59"], ["06:00", "21:59"]),
        ("sat 22:00-06:00", ["2026-11-28T23:00", "2026-11-29T05:00"], ["2026-11-28T05:00"]),
        ("sun 22:00-06:00", ["2026-11-30T05:59"], ["2026-11-29T05:59", "2026-11-30T22:00"]),
        ("wed 22:00-00:00", ["2026-11-25T23:59"], ["2026-11-26T00:00", "2026-11-25T00:00"]),
    ],
)
def test_quiet_hours_hold_from_their_first_minute_to_before_their_last(
    hours: str, quiet: list[str], loud: list[str], settings
) -> None:
    for times, is_expected in ((quiet, True), (loud, False)):
        for time in times:
            text = time if "T" in time else f"2026-11-24T{time}"
            now = datetime.fromisoformat(text).replace(tzinfo=BERLIN)
            assert is_quiet(settings(hours), now) == is_expected, time


def test_without_quiet_hours_no_hour_is_quiet(settings) -> None:
    assert not is_quiet(settings(), datetime.now(UTC))


def test_one_of_several_stretches_is_enough(settings) -> None:
    policy_ = settings("mon 08:00-09:00", "tue 10:00-11:00")
    assert is_quiet(policy_, datetime(2026, 11, 24, 10, 30, tzinfo=BERLIN))
    assert not is_quiet(policy_, datetime(2026, 11, 24, 8, 30, tzinfo=BERLIN))


def test_a_time_without_a_zone_is_refused(settings) -> None:
    with pytest.raises(ValueError, match="zone"):
        is_quiet(settings("07:00-19:00"), datetime(2026, 11, 24, 8))


def test_without_a_time_zone_the_machines_own_clock_counts(
    settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    now = datetime(2026, 11, 24, 23, 30, tzinfo=UTC)  # 08:30 of the 25th in Tokyo
    for zone, is_expected in (("Asia/Tokyo", True), ("UTC", False)):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert is_quiet(settings("wed 08:00-09:00", time_zone=""), now) == is_expected
    monkeypatch.undo()
    time.tzset()


def test_clocks_that_are_put_back_make_an_hour_quiet_twice(settings) -> None:
    policy_ = settings("02:00-03:00")
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)  # 02:30 summer time
    assert [is_quiet(policy_, first + timedelta(hours=h)) for h in (-1, 0, 1, 2)] == [
        False,
        True,
        True,
        False,
    ]


def test_clocks_that_are_put_forward_leave_the_hours_around_quiet(settings) -> None:
    policy_ = settings("01:30-03:30")
    jump = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)  # 02:00 becomes 03:00
    quiet = [is_quiet(policy_, jump + timedelta(minutes=m)) for m in (-31, -30, -1, 0, 29, 30)]
    assert quiet == [False, True, True, True, True, False]


clocks = st.times().map(lambda t: t.strftime("%H:%M"))
moments = st.datetimes(datetime(2026, 1, 1), datetime(2027, 12, 31), timezones=st.just(UTC))


@given(clocks, clocks, moments)
def test_a_stretch_and_its_complement_share_no_moment_and_leave_none_out(
    start: str, end: str, now: datetime
) -> None:
    if start == end:
        return
    one, other = ([f"{a}-{b}"] for a, b in ((start, end), (end, start)))
    made = [
        PolicySettings.model_validate(BARE | {"quiet_hours": hours, "time_zone": "Europe/Berlin"})
        for hours in (one, other)
    ]
    assert is_quiet(made[0], now) != is_quiet(made[1], now)


@given(st.lists(st.sampled_from(policy.DAYS), unique=True), moments)
def test_whole_days_are_quiet_on_those_days_only(days: list[str], now: datetime) -> None:
    hours = [f"{','.join(days)} 00:00-24:00"] if days else []
    made = PolicySettings.model_validate(BARE | {"quiet_hours": hours, "time_zone": "UTC"})
    assert is_quiet(made, now) == (policy.DAYS[now.weekday()] in days)


@given(clocks, clocks, st.sampled_from(policy.DAYS), moments)
def test_a_stretch_of_a_day_is_one_of_every_day_and_all_days_together_are_it(
    start: str, end: str, day: str, now: datetime
) -> None:
    if start == end:
        return
    every = PolicySettings.model_validate(BARE | {"quiet_hours": [f"{start}-{end}"]})
    each = PolicySettings.model_validate(
        BARE | {"quiet_hours": [f"{name} {start}-{end}" for name in policy.DAYS]}
    )
    one = PolicySettings.model_validate(BARE | {"quiet_hours": [f"{day} {start}-{end}"]})
    assert is_quiet(each, now) == is_quiet(every, now)
    assert is_quiet(every, now) or not is_quiet(one, now)


BARE: dict[str, Any] = {
    "coordinators": [],
    "purposes": [],
    "tasks": [],
    "nets": [],
    "max_rounds": 1,
    "max_epsilon_per_study": 1.0,
    "max_epsilon_lifetime": 1.0,
    "max_delta": 0.1,
    "metrics": [],
}

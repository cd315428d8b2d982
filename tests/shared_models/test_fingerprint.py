"""What a plan may ask of a fingerprint, and what its counts give away: proved over small cases."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from itertools import product
from typing import Any

import pytest
import tomli_w
from dp_accounting import GaussianDpEvent, NeighboringRelation, pld
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from shared_models import fingerprint as fingerprints
from shared_models import plan as plans
from shared_models.allowlists import objections
from shared_models.contracts import Fingerprint, Histogram
from shared_models.errors import DocumentError
from shared_models.fingerprint import faults, gathered, layouts, sensitivity, summed
from shared_models.plan import StudyPlan, planned_events
from shared_models.privacy import epsilon, statement

TODAY = date(2026, 11, 24)
SPACING = {"low": 0.2, "high": 8.0, "num_cells": 32}
CT = {
    "spacing": SPACING,
    "extent": {"low": 20, "high": 900, "num_cells": 48},
    "size": {"low": 8, "high": 1024, "num_cells": 48},
    "intensity": {"low": -1200, "high": 2000, "num_cells": 64},
    "modalities": ["CT", "MR"],
    "classes": "label",
}
PRIVACY = {"epsilon": 1.0, "delta": 1e-3, "noise_multiplier": 2.0, "max_grad_norm": 1.0}

Plans = Callable[..., StudyPlan]
cohorts = st.lists(st.integers(0, 12), min_size=2, max_size=12)


@pytest.fixture
def asking(new_plan: Plans) -> Plans:
    """Return what makes a plan that asks for a fingerprint."""

    def make(terms: Any = CT, **changed: Any) -> StudyPlan:
        return new_plan(**{"fingerprint": terms, "imaging": []} | changed)

    return make


# --- gathering


@given(cohorts, st.integers(2, 9))
def test_no_count_from_one_to_min_cell_less_one_is_told(counts: list[int], least: int) -> None:
    if sum(counts) < least:
        with pytest.raises(ValueError, match=f"expected at least {least} counts"):
            gathered(counts, least=least)
        return
    told = gathered(counts, least=least)
    assert sum(told) == sum(counts)
    assert all(count == 0 or count >= least for count in told)


@given(cohorts, st.integers(2, 9))
def test_gathering_moves_fewer_than_min_cell_patients_past_the_end_of_any_cell(
    counts: list[int], least: int
) -> None:
    if sum(counts) < least:
        return
    told = gathered(counts, least=least)
    for end in range(1, len(counts)):
        assert abs(sum(told[:end]) - sum(counts[:end])) < least


@pytest.mark.parametrize(("num_cells", "most", "least"), [(4, 7, 3), (3, 9, 4), (2, 12, 5)])
def test_none_can_be_worked_out_from_what_is_told(num_cells: int, most: int, least: int) -> None:
    """Against who knows the rule, the number of patients, and what is told: by trying them all.

    Whatever was told, a count that is too small to be told could have been another one.
    """
    told_of: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for counts in product(range(most + 1), repeat=num_cells):
        if sum(counts) >= least:
            told_of[gathered(counts, least=least)].append(counts)
    tried = 0
    for told, possible in told_of.items():
        # at the edge of what was tried, others that would tell the same are not among them
        whole = [counts for counts in possible if sum(told) <= most]
        for counts, cell in product(whole, range(num_cells)):
            if 0 < counts[cell] < least:
                tried += 1
                assert any(other[cell] != counts[cell] for other in whole)
    assert tried > 50


@given(cohorts)
def test_counts_that_are_large_enough_are_told_as_they_are(counts: list[int]) -> None:
    large = [count + 5 for count in counts]
    assert gathered(large, least=5) == tuple(large)


# --- what it costs


@pytest.mark.parametrize(
    ("terms", "number"),
    [(CT, 11), ({"spacing": SPACING}, 2), ({"classes": "label"}, 1)],
)
def test_the_sensitivity_is_the_root_of_the_number_of_histograms(
    terms: Any, number: int, asking: Plans
) -> None:
    plan = asking(terms)
    assert len(layouts(plan)) == number
    assert sensitivity(plan) == pytest.approx(math.sqrt(number))
    assert sensitivity(plan) ** 2 >= number


def test_a_net_in_three_dimensions_is_asked_along_three_axes(asking: Plans) -> None:
    plan = asking({"spacing": SPACING}, net={"name": "unet", "params": {"spatial_dims": 3}})
    assert [one.name for one in layouts(plan)] == ["spacing-z", "spacing-y", "spacing-x"]


@pytest.mark.parametrize("noise", [0.7, 2.0, 20.0])
def test_its_epsilon_is_the_gaussian_mechanisms(noise: float, asking: Plans) -> None:
    """Against dp_accounting called directly, and the closed form (Balle and Wang 2018)."""
    plan = asking(CT | {"noise_multiplier": noise}, privacy=PRIVACY)
    (event,) = planned_events(plan)
    assert (event.sampler, event.sample_rate, event.steps) == ("all", 1.0, 1)
    found = epsilon([event], delta=1e-3)
    direct = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    direct.compose(GaussianDpEvent(noise))
    assert found == pytest.approx(direct.get_epsilon(1e-3), abs=2e-3)

    def delta_at(eps: float) -> float:
        half = 1 / (2 * noise)
        return norm.cdf(half - eps * noise) - math.exp(eps) * norm.cdf(-half - eps * noise) - 1e-3

    exact = 0.0 if delta_at(0) < 0 else brentq(delta_at, 0, 50)
    assert exact <= found <= exact + 5e-3


def test_nothing_is_planned_beside_it(asking: Plans) -> None:
    plan = asking(CT | {"noise_multiplier": 2.0}, privacy=PRIVACY, compare_alone=True)
    assert [event.purpose for event in planned_events(plan)] == ["fingerprint"]
    assert planned_events(asking()) == ()


def test_its_statement_covers_the_histograms_and_no_update(asking: Plans) -> None:
    plan = asking(CT | {"noise_multiplier": 2.0}, privacy=PRIVACY)
    said = statement(planned_events(plan), delta=1e-3)
    assert "histogram" in said.covers
    assert "update" not in said.covers
    assert said.max_grad_norm == sensitivity(plan)


# --- plans that ask too much


def test_a_sound_plan_has_nothing_to_object_to(asking: Plans) -> None:
    assert objections(asking(), today=TODAY) == []
    noised = asking(CT | {"noise_multiplier": 4.0}, privacy=PRIVACY)
    assert objections(noised, today=TODAY) == []


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ({"spacing": SPACING | {"num_cells": 4000}}, "less than or equal to 64"),
        ({"spacing": SPACING | {"low": math.nan}}, "finite"),
        ({"spacing": SPACING | {"high": math.inf}}, "finite"),
        ({"spacing": SPACING | {"low": 0.0}}, "greater than 0"),
        ({"spacing": SPACING | {"high": 0.1}}, "low under high"),
        # one patient's own spacing, between two edges
        ({"spacing": {"low": 0.97656, "high": 0.97657, "num_cells": 2}}, "finer"),
        ({"size": {"low": 511, "high": 513, "num_cells": 2}}, "finer"),
        ({"intensity": {"low": 40, "high": 41, "num_cells": 2}}, "at least 1 wide"),
        ({"intensity": {"low": 0, "high": math.nan, "num_cells": 2}}, "finite"),
        ({"intensity": CT["intensity"] | {"percentiles": [0.5] * 3}}, "rising"),
        ({"intensity": CT["intensity"] | {"percentiles": [n / 2 for n in range(99)]}}, "5 items"),
        ({"spacing": SPACING, "min_cell": 1}, "greater than or equal to 3"),
        ({"spacing": SPACING, "patients": True}, "unknown key"),
    ],
)
def test_a_hostile_plan_cannot_be_read(terms: dict[str, Any], sentence: str, asking: Plans) -> None:
    data = asking().model_dump(mode="json", exclude_none=True) | {"fingerprint": terms}
    with pytest.raises(DocumentError) as caught:
        plans.parse(tomli_w.dumps(data))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("fingerprint")
    assert "0.97656" not in str(caught.value)


@pytest.mark.parametrize(
    ("terms", "changed", "sentence"),
    [
        ({}, {}, "asks for nothing"),
        (CT, {"privacy": PRIVACY}, "say how much noise"),
        (CT | {"noise_multiplier": 1.0}, {}, "noise is charged under privacy terms"),
        (CT | {"noise_multiplier": 0.3}, {"privacy": PRIVACY}, "cost"),
        (CT | {"modalities": ["CT", "CT"]}, {}, "each modality once"),
        (CT, {"imaging": [{"name": "resize", "params": {"size": [8, 8]}}]}, "turn or cut"),
        (CT | {"classes": "present"}, {}, "counted as 'label'"),
        (
            {"intensity": CT["intensity"] | {"within": "foreground"}},  # type: ignore[operator]
            {},
            "no label maps",
        ),
        (
            {"classes": "present"},
            {
                "task": {
                    "name": "segmentation",
                    "params": {"classes": [f"part {n}" for n in range(41)]},
                },
                "net": {"name": "unet", "params": {}},
            },
            "at most 40 histograms",
        ),
    ],
)
def test_a_plan_that_asks_wrongly_is_told_so(
    terms: Any, changed: dict[str, Any], sentence: str, asking: Plans
) -> None:
    assert any(sentence in text for text in objections(asking(terms, **changed), today=TODAY))


def test_a_plan_with_a_fingerprint_is_read_as_it_was_written(asking: Plans) -> None:
    plan = asking()
    assert plans.parse(plans.render(plan)).plan == plan


# --- what is told


@pytest.fixture
def told(asking: Plans) -> tuple[Fingerprint, StudyPlan]:
    """Return a sound fingerprint of 20 patients."""
    plan = asking({"spacing": SPACING, "classes": "label"})
    counts = {one.name: [0.0] * one.num_cells for one in layouts(plan)}
    for each in counts.values():
        each[0], each[1] = 8.0, 12.0
    histograms = tuple(Histogram(name=n, counts=tuple(each)) for n, each in counts.items())
    return Fingerprint(min_cell=5, histograms=histograms), plan


def test_what_the_plan_asks_for_has_no_fault(told: tuple[Fingerprint, StudyPlan]) -> None:
    assert faults(*told, num_patients=20, min_cell=5) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda one: one.model_copy(update={"counts": (16.0, 4.0)}), "too few"),
        (lambda one: one.model_copy(update={"counts": (7.5, 12.5)}), "part of one"),
        (lambda one: one.model_copy(update={"counts": (-5.0, 25.0)}), "too few"),
        (lambda one: one.model_copy(update={"counts": (8.0, 13.0)}), "every patient once"),
        (lambda one: one.model_copy(update={"counts": (8.0, 12.0, 0.0)}), "not those"),
        (lambda one: one.model_copy(update={"name": "names"}), "not those"),
    ],
)
def test_what_the_plan_does_not_ask_for_is_a_fault(
    change: Callable[[Histogram], Histogram],
    sentence: str,
    told: tuple[Fingerprint, StudyPlan],
) -> None:
    found, plan = told
    bad = found.model_copy(
        update={"histograms": (*found.histograms[:-1], change(found.histograms[-1]))}
    )
    assert any(sentence in text for text in faults(bad, plan, num_patients=20, min_cell=5))


def test_a_sites_own_floor_counts_where_it_is_larger(
    told: tuple[Fingerprint, StudyPlan],
) -> None:
    assert "7 patients" in faults(*told, num_patients=20, min_cell=7)[0]


def test_sums_are_of_cells(told: tuple[Fingerprint, StudyPlan]) -> None:
    found, _ = told
    total = summed([found, found, found])
    assert total.histograms[-1].counts == (24.0, 36.0)
    with pytest.raises(ValueError, match="at least one"):
        summed([])


@given(st.floats(0.01, 100), st.integers(0, 2))
def test_every_value_has_one_cell_and_lies_in_it(value: float, which: int) -> None:
    scale = fingerprints.LogScale(low=0.2, high=8.0, num_cells=20 + which)
    layout = fingerprints.Layout("spacing-x", fingerprints._edges(scale), is_log=True)
    cell = layout.cell_of(value)
    assert 0 <= cell < layout.num_cells
    low = -math.inf if cell == 0 else layout.edges[cell - 1]
    high = math.inf if cell == layout.num_cells - 1 else layout.edges[cell]
    assert low <= value < high
    if math.isfinite(low) and math.isfinite(high):
        assert low < layout.middle(cell) < high

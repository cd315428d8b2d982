"""From sums of histograms to imaging steps: nnU-Net's rules, and what noise does to them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.geometry import Reasoned, cell_at, occupied, propose, to_toml
from shared_models import allowlists
from shared_models.contracts import Fingerprint, Histogram
from shared_models.errors import ConsiliaError
from shared_models.fingerprint import layouts
from shared_models.plan import StudyPlan

TERMS: dict[str, Any] = {
    "spacing": {"low": 0.2, "high": 12.0, "num_cells": 64},
    "extent": {"low": 10, "high": 900, "num_cells": 64},
    "intensity": {"low": -1200, "high": 2000, "num_cells": 64},
    "modalities": ["CT", "MR"],
}
UNET = {"name": "unet", "params": {"spatial_dims": 3, "channels": [4, 8, 16, 32]}}
CELL = (12.0 / 0.2) ** (1 / 64)  # from one spacing to the next

Drafts = Callable[..., StudyPlan]


@pytest.fixture
def draft(new_plan: Callable[..., StudyPlan]) -> Drafts:
    def make(**changed: Any) -> StudyPlan:
        task = {"name": "segmentation", "params": {"classes": ["liver"]}}
        net = {**UNET, "params": UNET["params"] | {"strides": [2, 2, 2]}}  # type: ignore[operator, dict-item]
        fields = {"fingerprint": TERMS, "imaging": [], "task": task, "net": net}
        return new_plan(**fields | changed)

    return make


def counts_of(plan: StudyPlan, patients: dict[str, Sequence[float]]) -> Fingerprint:
    """Count what each histogram is told of, one value for each patient."""
    found = []
    for layout in layouts(plan):
        counts = [0.0] * layout.num_cells
        for value in patients[layout.name]:
            counts[layout.cell_of(value)] += 1
        found.append(Histogram(name=layout.name, counts=tuple(counts)))
    return Fingerprint(min_cell=0, histograms=tuple(found))


def cohort(**changed: Any) -> dict[str, Sequence[float]]:
    patients: dict[str, Sequence[float]] = {
        "spacing-z": [1.0] * 60,
        "spacing-y": [0.5] * 30 + [0.8] * 70,
        "spacing-x": [0.5] * 30 + [0.8] * 70,
        "extent-z": np.linspace(100, 200, 101).tolist(),
        "extent-y": [300.0] * 99,
        "extent-x": [300.0] * 99,
        "percentile-0": [-950.0] * 50,
        "percentile-1": [0.0] * 50,
        "percentile-2": [410.0] * 50,
        "modality": [0] * 90 + [1] * 10,
    }
    return patients | changed


def by_name(proposal: list[Reasoned]) -> dict[str, dict[str, Any]]:
    return {step.name: dict(step.params) for step, _ in proposal}


def test_ct_is_resampled_to_the_median_windowed_and_made_one_size(draft: Drafts) -> None:
    plan = draft()
    found = by_name(propose(counts_of(plan, cohort()), plan))
    assert list(found) == ["resample", "window", "crop-or-pad"]
    spacing = found["resample"]["spacing_mm"]
    assert spacing == pytest.approx((1.0, 0.8, 0.8), rel=CELL - 1)
    assert found["window"]["low"] == pytest.approx(-950, abs=50)
    assert found["window"]["high"] == pytest.approx(410, abs=50)
    size = found["crop-or-pad"]["size"]
    assert all(side % 8 == 0 for side in size)
    exact = (195 / spacing[0], 300 / spacing[1], 300 / spacing[2])
    assert all(0.9 * want <= side <= 1.1 * want + 8 for side, want in zip(size, exact, strict=True))


def test_mr_is_standardized_image_by_image(draft: Drafts) -> None:
    plan = draft()
    found = by_name(propose(counts_of(plan, cohort(modality=[1] * 60 + [0] * 40)), plan))
    assert found["standardize"] == {}
    assert "window" not in found


def test_an_axis_over_three_times_as_coarse_takes_the_tenth_percentile(draft: Drafts) -> None:
    """nnU-Net's rule; the tenth percentile is never finer than the other axes' median."""
    plan = draft()
    thick = cohort(**{"spacing-z": [3.0] * 20 + [5.0] * 80, "extent-z": [100.0] * 100})
    proposal = propose(counts_of(plan, thick), plan)
    assert by_name(proposal)["resample"]["spacing_mm"][0] == pytest.approx(3.0, rel=CELL - 1)
    assert any("10th percentile" in text for _, why in proposal for text in why)
    fine = cohort(**{"spacing-z": [0.3] * 20 + [5.0] * 80, "extent-z": [100.0] * 100})
    spacing = by_name(propose(counts_of(plan, fine), plan))["resample"]["spacing_mm"]
    assert spacing[0] == spacing[1]


def test_an_axis_with_as_many_voxels_as_the_others_keeps_its_median(draft: Drafts) -> None:
    plan = draft()
    tall = cohort(**{"spacing-z": [3.0] * 20 + [5.0] * 80, "extent-z": [890.0] * 100})
    found = by_name(propose(counts_of(plan, tall), plan))
    assert found["resample"]["spacing_mm"][0] == pytest.approx(5.0, rel=CELL - 1)


def test_the_size_holds_the_percentile_asked_for(draft: Drafts) -> None:
    plan = draft()
    total = counts_of(plan, cohort())
    sizes = [
        by_name(propose(total, plan, percentile=share))["crop-or-pad"]["size"][0]
        for share in (10, 50, 95)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_value_outside_the_range_asked_for_is_refused(draft: Drafts) -> None:
    plan = draft()
    for wild in (0.05, 40.0):
        with pytest.raises(ConsiliaError, match=r"fingerprint\.spacing: .* outside 0\.2 to 12"):
            propose(counts_of(plan, cohort(**{"spacing-z": [wild] * 60})), plan)


def test_another_plans_histograms_are_refused(draft: Drafts, new_plan: Any) -> None:
    plan = draft()
    with pytest.raises(ValueError, match="the draft asks for"):
        propose(counts_of(plan, cohort()), draft(fingerprint={"spacing": TERMS["spacing"]}))


def test_what_was_not_asked_for_is_not_proposed(draft: Drafts) -> None:
    plan = draft(fingerprint={"spacing": TERMS["spacing"]})
    total = counts_of(plan, cohort())
    assert list(by_name(propose(total, plan))) == ["resample", "standardize"]
    sized = draft(fingerprint={"size": {"low": 8, "high": 512, "num_cells": 64}})
    total = counts_of(sized, {f"size-{axis}": [50.0] * 30 for axis in "zyx"})
    assert by_name(propose(total, sized))["crop-or-pad"] == {"size": (56, 56, 56)}


def test_pictures_get_a_size_in_two_dimensions(draft: Drafts) -> None:
    plan = draft(
        fingerprint={"size": {"low": 8, "high": 4096, "num_cells": 64}},
        task={"name": "classification", "params": {"classes": ["clear", "opaque"]}},
        net={"name": "densenet", "params": {"block_config": [2, 2]}},
    )
    total = counts_of(plan, {"size-y": [900.0] * 20, "size-x": [1000.0] * 20})
    (size,) = by_name(propose(total, plan))["crop-or-pad"].values()
    assert all(side % 8 == 0 for side in size)
    assert len(size) == 2


def test_the_tables_can_be_pasted_into_a_plan(draft: Drafts) -> None:
    plan = draft(imaging=[{"name": "orient", "params": {"axes": "LPS"}}])
    proposal = propose(counts_of(plan, cohort()), plan)
    text = to_toml(proposal)
    steps = tomllib.loads(text)["imaging"]
    assert [step["name"] for step in steps] == ["orient", "resample", "window", "crop-or-pad"]
    pasted = StudyPlan.model_validate(
        plan.model_dump(exclude={"fingerprint", "imaging"}) | {"imaging": steps}
    )
    assert pasted.imaging == tuple(one.step for one in proposal)
    assert allowlists.objections(pasted, today=date(2026, 11, 24)) == []
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert len(comments) == sum(len(one.why) for one in proposal)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any), st.floats(0.01, 0.99))
def test_without_noise_a_share_is_found_where_numpy_finds_it(
    counts: list[int], share: float
) -> None:
    values = np.repeat(np.arange(len(counts)), counts)
    expected = np.quantile(values, share, method="inverted_cdf")
    assert cell_at([float(n) for n in counts], share) == expected


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_noise_moves_a_share_by_little(share: float) -> None:
    """200 patients in 8 of 60 cells, noise of 8 in each: nearly always within two cells."""
    rng = np.random.default_rng(7)
    exact = np.zeros(60)
    exact[16:24] = 25
    truth = cell_at(exact.tolist(), share)
    found = np.array(
        [cell_at((exact + rng.normal(0, 8, 60)).tolist(), share, deviation=8) for _ in range(200)]
    )
    assert np.mean(np.abs(found - truth) <= 2) > 0.95


def test_patients_of_two_kinds_are_not_taken_for_noise() -> None:
    counts = [0.0] * 5 + [40.0] + [1.0, -2.0] * 3 + [30.0] + [2.0] * 9
    assert occupied(counts, deviation=4) == slice(5, 13)
    assert occupied(counts, deviation=0) == slice(0, len(counts))


def test_where_there_is_only_noise_no_stretch_is_left_out() -> None:
    assert occupied([1.0, -1.0, 0.5], deviation=4) == slice(0, 3)

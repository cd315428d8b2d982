"""A plan is one document: what it says, what is wrong with it, and no more."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared_models.errors import DocumentError
from shared_models.plan import (
    PrivacyTerms,
    StudyPlan,
    event_of,
    fewest_honest,
    own_objections,
    parse,
    planned_events,
    read,
    render,
)
from shared_models.signing import digest, is_signed_by, sign

MARK = "MARKED-7731"
TODAY = date(2026, 3, 1)
PRIVACY = {"epsilon": 8.0, "delta": 1e-3, "noise_multiplier": 2.0, "max_grad_norm": 1.0}
NewPlan = Callable[..., StudyPlan]


def objections(plan: StudyPlan) -> list[str]:
    return list(own_objections(plan, today=TODAY))


def refused(text: str) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    return caught.value


scalars = (
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
params = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True),
    scalars | st.lists(scalars, max_size=3) | st.lists(st.lists(scalars, min_size=1, max_size=2)),
    max_size=3,
)


@given(params=params, description=st.text(max_size=30), privacy=st.sampled_from([None, PRIVACY]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_plan_written_as_toml_is_read_as_the_same_plan(
    new_plan: NewPlan, params: dict[str, Any], description: str, privacy: dict[str, Any] | None
) -> None:
    plan = new_plan(
        net={"name": "unet", "params": params}, description=description, privacy=privacy
    )
    again = parse(render(plan))
    assert again.plan == plan
    assert digest(again.plan) == digest(plan)
    assert again.signature is None


def test_a_signature_stands_in_the_same_file_and_is_not_part_of_what_is_signed(
    plan: StudyPlan, coordinator_key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(render(plan, sign(plan, key=coordinator_key)), encoding="utf-8")
    signed = read(file)
    assert is_signed_by(signed.plan, signed.signature, key=plan.coordinator)
    assert digest(signed.plan) == digest(plan)


def test_any_change_is_a_new_plan_with_a_new_digest(new_plan: NewPlan) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"description": "x"},
        {"seed": 1},
        {"min_patients": 11},
        {"sites": ["north", "west"]},
        {"privacy": PRIVACY},
        {"privacy": PRIVACY | {"noise_multiplier": 2.1}},
        {"net": {"name": "densenet", "params": {}}},
        {"imaging": []},
        {"rounds": {"quorum": 1}},
    ]
    digests = {digest(new_plan(**change)) for change in changes}
    assert len(digests) == len(changes)


def test_a_plan_that_is_not_signed_is_read_without_a_signature(plan: StudyPlan) -> None:
    assert parse(render(plan)).signature is None


def test_unknown_keys_are_told_with_the_known_ones_all_at_once(plan: StudyPlan) -> None:
    text = render(plan).replace("learning_rate", "learning_rat") + "\n[extra]\nx = 1\n"
    objections = refused(text).objections
    assert any(
        o.startswith("training.learning_rat: unknown key; known here:") and "learning_rate" in o
        for o in objections
    )
    assert any(o.startswith("extra: unknown key; known here:") and "seed" in o for o in objections)
    assert any(o == "training.learning_rate: field required" for o in objections)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("sample_rate = 0.1", "sample_rate = nan", "training.sample_rate"),
        ("sample_rate = 0.1", "sample_rate = inf", "training.sample_rate"),
        ("sample_rate = 0.1", "sample_rate = 0.0", "training.sample_rate"),
        ("sample_rate = 0.1", "sample_rate = 1.5", "training.sample_rate"),
        ("sample_rate = 0.1", 'sample_rate = "often"', "training.sample_rate"),
        ("learning_rate = 0.01", "learning_rate = -0.01", "training.learning_rate"),
        ("learning_rate = 0.01", "learning_rate = 1e999", "training.learning_rate"),
        ("num_rounds = 2", "num_rounds = 0", "training.num_rounds"),
        ("num_rounds = 2", "num_rounds = 2.5", "training.num_rounds"),
        ("num_rounds = 2", "num_rounds = 1000000", "training.num_rounds"),
        ("quorum = 2", "quorum = 0", "rounds.quorum"),
        ("quorum = 2", "quorum = [2]", "rounds.quorum"),
        ("epsilon = 8.0", "epsilon = -1.0", "privacy.epsilon"),
        ("epsilon = 8.0", "epsilon = nan", "privacy.epsilon"),
        ("epsilon = 8.0", "epsilon = inf", "privacy.epsilon"),
        ("delta = 0.001", "delta = 1.0", "privacy.delta"),
        ("delta = 0.001", "delta = 0.0", "privacy.delta"),
        ("noise_multiplier = 2.0", "noise_multiplier = 0.0", "privacy.noise_multiplier"),
        ('unit = "patient"', 'unit = "image"', "privacy.unit"),
        ('purpose = "research"', 'purpose = "profit"', "purpose"),
        ('name = "lungs"', 'name = "../lungs"', "name"),
        ('name = "lungs"', 'name = "Lungs"', "name"),
        ("expires = 2099-01-01", 'expires = "soon"', "expires"),
        ("schema_version = 1", "schema_version = 2", "schema_version"),
        ("seed = 0", "seed = -1", "seed"),
        ("size = [", "size = [nan, ", "imaging.0.params.size"),
        ('"north"', '"no/rth"', "sites.0"),
        ("min_patients = 10", "min_patients = 1", "min_patients"),
    ],
)
def test_a_value_outside_its_bounds_is_told_by_its_field(
    new_plan: NewPlan, old: str, new: str, where: str
) -> None:
    text = render(new_plan(privacy=PRIVACY, seed=0))
    assert old in text
    assert any(o.startswith(where) for o in refused(text.replace(old, new)).objections)


def test_every_objection_to_a_document_is_told_at_once(new_plan: NewPlan) -> None:
    text = render(new_plan(privacy=PRIVACY))
    for old, new in (("epsilon = 8.0", "epsilon = -1.0"), ("quorum = 2", "quorum = 0")):
        text = text.replace(old, new)
    assert [o.split(":")[0] for o in refused(text).objections] == [
        "rounds.quorum",
        "privacy.epsilon",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "lungs"', f'name = "{MARK}"'),
        ('purpose = "research"', f'purpose = "{MARK}"'),
        ("sample_rate = 0.1", f'sample_rate = "{MARK}"'),
        ('"north"', f'"{MARK}/x"'),
        ("expires = 2099-01-01", f'expires = "{MARK}"'),
        ("seed = 0", f'seed = ["{MARK}"]'),
        ("seed = 0", f"seed = {MARK}"),
        ("seed = 0", f'seed = "{MARK}'),
        ("seed = 0", f'signature = "{MARK}"'),
        ("seed = 0", f'signature = {{key = "{MARK}", value = "{MARK}"}}'),
    ],
)
def test_an_objection_never_repeats_a_value(plan: StudyPlan, old: str, new: str) -> None:
    text = render(plan)
    assert old in text
    error = refused(text.replace(old, new, 1))
    assert MARK not in str(error)
    assert error.objections


@pytest.mark.parametrize("text", ["", "[", "\x00", "a = " + "[" * 5000, "seed = " + "1" * 5000])
def test_what_is_no_toml_or_no_plan_is_refused(text: str) -> None:
    assert refused(text).exit_code == 12


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_told_by_its_name(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "plan.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DocumentError, match=r"plan\.toml"):
        read(file)


def test_a_folder_in_place_of_a_plan_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="as text: IsADirectoryError"):
        read(tmp_path)


def test_a_good_plan_meets_no_objection(new_plan: NewPlan) -> None:
    assert objections(new_plan()) == []
    assert objections(new_plan(privacy=PRIVACY)) == []


def test_a_plan_is_valid_on_the_day_it_expires_and_not_after(new_plan: NewPlan) -> None:
    assert objections(new_plan(expires=TODAY)) == []
    assert objections(new_plan(expires=date(2026, 2, 28))) == [
        "expires: the plan expired on 2026-02-28; propose a new one"
    ]


def test_a_site_named_twice_is_objected_to(new_plan: NewPlan) -> None:
    assert objections(new_plan(sites=["north", "north"])) == ["sites: expected each site once"]


def test_a_quorum_over_the_number_of_sites_is_objected_to(new_plan: NewPlan) -> None:
    (objection,) = objections(new_plan(rounds={"quorum": 3}))
    assert objection == "rounds.quorum: expected at most the 2 sites of the plan, got 3"


def test_a_plan_that_costs_more_than_it_states_is_objected_to_with_the_cost(
    new_plan: NewPlan,
) -> None:
    (objection,) = objections(new_plan(privacy=PRIVACY | {"epsilon": 0.05}))
    assert objection.startswith("privacy.epsilon: the plan's steps and noise cost ")
    assert "raise noise_multiplier or plan fewer steps" in objection


def test_training_alone_is_charged_on_top(new_plan: NewPlan) -> None:
    apart = planned_events(new_plan(privacy=PRIVACY))
    compared = planned_events(new_plan(privacy=PRIVACY, compare_alone=True))
    assert [event.purpose for event in apart] == ["train"]
    assert [event.purpose for event in compared] == ["train", "alone"]
    assert {event.steps for event in compared} == {2 * 5}


def test_without_privacy_terms_nothing_is_planned_to_be_charged(plan: StudyPlan) -> None:
    assert planned_events(plan) == ()
    with pytest.raises(ValueError, match="privacy terms"):
        event_of(plan, steps=1)


def test_an_event_says_what_the_plan_says(new_plan: NewPlan) -> None:
    plan = new_plan(privacy=PRIVACY)
    event = event_of(plan, steps=7, purpose="alone")
    terms = plan.privacy
    assert isinstance(terms, PrivacyTerms)
    assert event.model_dump() == {
        "mechanism": "gaussian",
        "sampler": "poisson",
        "relation": "add-or-remove-one",
        "unit": "patient",
        "purpose": "alone",
        "sample_rate": plan.training.sample_rate,
        "noise_multiplier": terms.noise_multiplier,
        "max_grad_norm": terms.max_grad_norm,
        "images_per_patient": plan.training.images_per_patient,
        "steps": 7,
        "noise_shares": 1,
    }


def test_a_hostile_plan_with_next_to_no_noise_is_judged_and_refused(new_plan: NewPlan) -> None:
    plan = new_plan(
        privacy=PRIVACY | {"noise_multiplier": 1e-9},
        training={
            "num_rounds": 10_000,
            "steps_per_round": 100_000,
            "sample_rate": 1.0,
            "learning_rate": 1,
        },
    )
    (objection,) = objections(plan)
    assert objection.startswith("privacy.epsilon: the plan's steps and noise cost inf")


def test_a_plan_cannot_be_changed(plan: StudyPlan) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan.seed = 2  # type: ignore[misc]


# --- secure aggregation, split noise, and what a round asked again costs

SPLIT = PRIVACY | {"noise_shares": 2}
SECURE = {"quorum": 2, "secure_aggregation": True}
ONE_STEP = {
    "num_rounds": 2,
    "steps_per_round": 1,
    "sample_rate": 0.1,
    "learning_rate": 0.01,
    "optimizer": "sgd",
}


def test_a_split_noise_under_secure_aggregation_meets_no_objection(new_plan: NewPlan) -> None:
    assert objections(new_plan(privacy=SPLIT, rounds=SECURE, training=ONE_STEP)) == []


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        (
            {"training": ONE_STEP | {"personal": ["features."]}},
            "training.personal: layers that stay at a site have its share of the noise only, which "
            "protects sums; set noise_shares = 1, or keep no layers there",
        ),
        (
            {"rounds": SECURE | {"quorum": 1}, "privacy": PRIVACY},
            "rounds.quorum: expected at least 2 under secure_aggregation; one site hides nothing",
        ),
        (
            {"training": ONE_STEP | {"optimizer": "adam-bc"}, "privacy": None},
            "training.optimizer: adam-bc corrects for noise; add privacy terms or choose adamw",
        ),
        (
            {"rounds": {"quorum": 2}},
            "privacy.noise_shares: a split noise protects only sums; set "
            "rounds.secure_aggregation = true, or noise_shares = 1",
        ),
        (
            {"privacy": PRIVACY | {"noise_shares": 3}},
            "privacy.noise_shares: expected at most the quorum of 2, got 3",
        ),
        (
            {"training": ONE_STEP | {"steps_per_round": 2}},
            "privacy.noise_shares: what is summed must be one step's gradients; set "
            'training.steps_per_round = 1 and optimizer = "sgd"',
        ),
        (
            {"training": ONE_STEP | {"optimizer": "adamw"}},
            "privacy.noise_shares: what is summed must be one step's gradients; set "
            'training.steps_per_round = 1 and optimizer = "sgd"',
        ),
    ],
)
def test_terms_that_do_not_go_together_are_objected_to_with_their_cure(
    new_plan: NewPlan, change: dict[str, Any], objection: str
) -> None:
    fields = {"privacy": SPLIT, "rounds": SECURE, "training": ONE_STEP}
    assert objections(new_plan(**(fields | change))) == [objection]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam-bc"])
def test_a_noise_that_is_not_split_may_be_stepped_along_by_any_optimizer(
    optimizer: str, new_plan: NewPlan
) -> None:
    training = ONE_STEP | {"optimizer": optimizer, "steps_per_round": 3}
    for rounds in (SECURE, {"quorum": 2}):
        assert objections(new_plan(privacy=PRIVACY, rounds=rounds, training=training)) == []


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("noise_shares = 2", "noise_shares = 0", "privacy.noise_shares"),
        ("noise_shares = 2", "noise_shares = 1001", "privacy.noise_shares"),
        ("noise_shares = 2", "noise_shares = 1.5", "privacy.noise_shares"),
        ('clipping = "flat"', 'clipping = "none"', "privacy.clipping"),
        ("spare = 0", "spare = -1", "rounds.spare"),
        ("averaging = 0.0", "averaging = 1.0", "rounds.averaging"),
        ("averaging = 0.0", "averaging = nan", "rounds.averaging"),
        ("views = 1", "views = 0", "training.views"),
        ("shift = 0", "shift = -1", "training.shift"),
        ("shift = 0", "shift = 65", "training.shift"),
        ("frozen = []", 'frozen = [""]', "training.frozen.0"),
        ("frozen = []", 'frozen = "head"', "training.frozen"),
        ('optimizer = "sgd"', 'optimizer = "adam"', "training.optimizer"),
        ("seed = 0", f'start = "{MARK}"', "start"),
    ],
)
def test_a_new_terms_value_outside_its_bounds_is_told_by_its_field(
    new_plan: NewPlan, old: str, new: str, where: str
) -> None:
    text = render(new_plan(privacy=SPLIT, rounds=SECURE, training=ONE_STEP, seed=0))
    assert old in text
    error = refused(text.replace(old, new))
    assert [o.split(":")[0] for o in error.objections] == [where]
    assert MARK not in str(error)


def test_all_terms_of_a_plan_are_read_as_they_were_written(new_plan: NewPlan) -> None:
    training = ONE_STEP | {"views": 4, "shift": 2, "frozen": ["features.", "head"], "flips": True}
    rounds = SECURE | {"spare": 3, "averaging": 0.9}
    privacy = SPLIT | {"clipping": "automatic"}
    plan = new_plan(training=training, rounds=rounds, privacy=privacy, start="ab" * 32)
    assert parse(render(plan)).plan == plan


@pytest.mark.parametrize("spare", [0, 5])
def test_the_budget_covers_the_spare_rounds_and_training_alone_asks_for_none(
    spare: int, new_plan: NewPlan
) -> None:
    rounds = SECURE | {"spare": spare}
    plan = new_plan(privacy=SPLIT, rounds=rounds, training=ONE_STEP, compare_alone=True)
    together, alone = planned_events(plan)
    assert (together.steps, alone.steps) == (2 + spare, 2)
    assert (together.noise_shares, alone.noise_shares) == (2, 1)
    assert together.noise_multiplier == alone.noise_multiplier == PRIVACY["noise_multiplier"]


@pytest.mark.parametrize(
    ("privacy", "expected"), [(None, 2), (PRIVACY, 2), (SPLIT, 2), (SPLIT | {"noise_shares": 5}, 5)]
)
def test_as_many_sites_must_be_honest_as_share_the_noise_and_two_at_least(
    privacy: dict[str, Any] | None, expected: int, new_plan: NewPlan
) -> None:
    assert fewest_honest(new_plan(privacy=privacy)) == expected

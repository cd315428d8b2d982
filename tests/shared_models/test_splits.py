"""A patient's split depends on the patient and the study alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_models.splits import SPLITS, split_of

patients = st.text(min_size=1, max_size=20)
keys = st.text(max_size=90)


@given(patient=patients, key=keys)
def test_all_images_of_one_patient_are_in_one_split(patient: str, key: str) -> None:
    assert split_of(patient, key=key) == split_of(str(patient), key=str(key))
    assert split_of(patient, key=key) in SPLITS


@given(cohort=st.lists(patients, unique=True, max_size=20), newcomer=patients)
def test_a_new_patient_never_moves_another(cohort: list[str], newcomer: str) -> None:
    before = {patient: split_of(patient, key="lungs") for patient in cohort}
    after = {patient: split_of(patient, key="lungs") for patient in [newcomer, *cohort]}
    assert all(after[patient] == before[patient] for patient in cohort)


@given(patient=patients, test=st.floats(0, 0.5), val=st.floats(0, 0.5), more=st.floats(0, 0.5))
def test_a_larger_test_share_only_adds_to_the_test_patients(
    patient: str, test: float, val: float, more: float
) -> None:
    if split_of(patient, key="k", test=test, val=val) == "test":
        assert split_of(patient, key="k", test=test + more, val=val) == "test"


def test_shares_are_kept_over_many_patients() -> None:
    splits = [split_of(f"p{i}", key="k", test=0.2, val=0.1) for i in range(20_000)]
    shares = [splits.count(name) / len(splits) for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.012)


def test_a_share_of_nothing_gets_nobody_and_of_all_everybody() -> None:
    names = [f"p{i}" for i in range(500)]
    assert {split_of(p, key="k", test=0.0) for p in names} == {"train"}
    assert {split_of(p, key="k", test=1.0) for p in names} == {"test"}
    assert {split_of(p, key="k", test=0.0, val=1.0) for p in names} == {"val"}


def overlap(first: str, second: str) -> float:
    """Return the share of one study's test patients who are the other's too."""
    tests = [
        {p for p in range(5000) if split_of(str(p), key=key) == "test"} for key in (first, second)
    ]
    return len(tests[0] & tests[1]) / len(tests[0])


@pytest.mark.parametrize("common", ["", "a" * 64, "a" * 100])
def test_two_studies_do_not_share_their_test_patients(common: str) -> None:
    assert overlap(common + "lungs", common + "livers") == pytest.approx(0.2, abs=0.05)


def test_another_process_finds_the_same_splits() -> None:
    code = (
        "from shared_models.splits import split_of;"
        "print([split_of(str(i), key='k') for i in range(99)])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str([split_of(str(i), key="k") for i in range(99)])


def test_a_study_keeps_its_splits_from_one_version_of_this_program_to_the_next() -> None:
    """A change here would put test patients of a running study into its training set."""
    found = [split_of(f"p{i}", key="consilia split lungs", val=0.1) for i in range(12)]
    assert " ".join(found) == (
        "test train train train train test train train test test train train"
    )

"""What labels are called in plans is said by a person, signed, and applied; nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import config as configs
from client import mapping
from shared_models import tasks
from shared_models.errors import DataError, SignatureError
from shared_models.registry import find


@pytest.fixture
def site(hospital: Any) -> configs.SiteConfig:
    return configs.read(hospital.config_file)


def segmenting(plan_of: Callable[..., Any]) -> Any:
    return plan_of({"task": {"name": "segmentation", "params": {"classes": ["organ", "lesion"]}}})


def task_of(plan: Any) -> Any:
    return find("tasks", plan.task.name, builtin=tasks.BUILTIN)(**plan.task.params)


def test_a_sites_own_mapping_is_read_back(site: Any, hospital: Any) -> None:
    assert mapping.read(site, key=hospital.key) == ()
    found = mapping.make(site, ["Verschattung = opaque", "0=clear"], key=hospital.key, who="Ada")
    mapping.write(site, found)
    assert mapping.read(site, key=hospital.key) == (("Verschattung", "opaque"), ("0", "clear"))


def test_a_mapping_that_the_sites_key_did_not_sign_is_refused(site: Any, hospital: Any) -> None:
    stranger = Ed25519PrivateKey.generate()
    mapping.write(site, mapping.make(site, ["a=b"], key=stranger, who="Eve"))
    with pytest.raises(SignatureError, match="not signed by this site's key"):
        mapping.read(site, key=hospital.key)
    mapping.write(site, mapping.make(site, ["a=b"], key=hospital.key, who="Ada"))
    file: Path = site.data.mapping
    file.write_bytes(file.read_bytes().replace(b'"b"', b'"c"'))
    with pytest.raises(SignatureError):
        mapping.read(site, key=hospital.key)


@pytest.mark.parametrize("pairs", [["a"], ["=b"], ["a="], ["a=" + "b" * 200]])
def test_what_is_no_mapping_is_wrong_usage(site: Any, hospital: Any, pairs: list[str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        mapping.make(site, pairs, key=hospital.key, who="Ada")


def test_words_are_understood_through_the_mapping_and_others_as_before(
    plan_of: Callable[..., Any],
) -> None:
    plan = plan_of()
    task = mapping.applied(task_of(plan), plan, (("Verschattung", "opaque"),))
    assert (task.encode_class("Verschattung"), task.encode_class("clear")) == (1, 0)
    with pytest.raises(ValueError, match="expected a label"):
        task.encode_class("opak")


def test_a_maps_numbers_become_the_plans_whatever_its_order(plan_of: Callable[..., Any]) -> None:
    label = np.array([[[0, 1, 2, 7]]], np.float32)
    pairs = (("1", "lesion"), ("2", "organ"), ("7", "background"))
    plan = segmenting(plan_of)
    assert mapping.applied(task_of(plan), plan, pairs).encode_map(label).ravel().tolist() == [
        0,
        2,
        1,
        0,
    ]
    other = plan_of({"task": {"name": "segmentation", "params": {"classes": ["lesion", "organ"]}}})
    told = mapping.applied(task_of(other), other, pairs).encode_map(label)
    assert told.ravel().tolist() == [0, 1, 2, 0]


def test_a_class_that_the_plan_lacks_is_refused(plan_of: Callable[..., Any]) -> None:
    plan = segmenting(plan_of)
    with pytest.raises(DataError, match="none of the plan's classes; map the labels again"):
        mapping.applied(task_of(plan), plan, (("1", "liver"),))


def test_plans_may_call_the_same_label_differently(plan_of: Callable[..., Any]) -> None:
    pairs = (("1", "liver"), ("1", "organ"), ("2", "lesion"))
    assert mapping.values_of(segmenting(plan_of), pairs) == {1: 1, 2: 2}
    with pytest.raises(DataError, match="two of the plan's classes"):
        mapping.values_of(segmenting(plan_of), (*pairs, ("1", "lesion")))

"""Weights become one vector and come back, bit for bit."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared_models.weights import (
    digest,
    flatten,
    is_finite,
    load,
    save,
    schema_of,
    size_of,
    subtract,
    unflatten,
)

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements=st.floats(-1e6, 1e6, width=32),
)
named = st.dictionaries(st.text(min_size=1, max_size=6), arrays, max_size=5)
Named = dict[str, np.ndarray]


@given(weights=named)
def test_weights_come_back_from_their_vector_bit_for_bit(weights: Named) -> None:
    vector, schema = flatten(weights), schema_of(weights)
    assert vector.dtype == np.float32
    assert vector.shape == (size_of(schema),)
    back = unflatten(vector, schema)
    assert set(back) == set(weights)
    for name, value in weights.items():
        assert back[name].shape == value.shape
        assert back[name].tobytes() == value.tobytes()


@given(weights=named)
def test_the_order_of_names_changes_nothing(weights: Named) -> None:
    turned = dict(reversed(weights.items()))
    assert flatten(turned).tobytes() == flatten(weights).tobytes()
    assert schema_of(turned) == schema_of(weights)


def test_the_vector_is_in_the_order_of_code_points_and_c_order() -> None:
    weights = {
        "b": np.array([[1, 2], [3, 4]], np.float32),
        "a.10": np.array([5], np.float32),
        "a.2": np.array([6], np.float32),
        "B": np.array(7, np.float32),
    }
    assert flatten(weights).tolist() == [7, 5, 6, 1, 2, 3, 4]


def test_arrays_in_other_orders_and_precisions_are_taken_as_numbers() -> None:
    value = np.array([[1.5, 2.5], [3.5, 4.5]])
    fortran = np.asfortranarray(value)
    assert flatten({"a": fortran}).tolist() == [1.5, 2.5, 3.5, 4.5]
    assert flatten({"a": fortran}).dtype == np.float32


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(5, np.float32),
        np.zeros(3, np.float32),
        np.zeros(4, np.float64),
        np.zeros((2, 2), np.float32),
        np.zeros((4, 1), np.float32),
        np.zeros(0, np.float32),
        np.zeros(4, ">f4"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected float32 \(4,\), got"):
        unflatten(vector, (("a", (3,)), ("b", ())))


def test_an_update_is_the_difference_name_by_name() -> None:
    left = {"a": np.array([3.0], np.float32), "b": np.array([1.0], np.float32)}
    right = {"b": np.array([4.0], np.float32), "a": np.array([1.0], np.float32)}
    assert {n: v.tolist() for n, v in subtract(left, right).items()} == {"a": [2.0], "b": [-3.0]}


@given(vector=hnp.arrays(np.float32, st.integers(0, 8), elements=st.floats(width=32)))
def test_finite_means_what_numpy_says(vector: np.ndarray) -> None:
    """Also where the sum of squares overflows though no number does."""
    assert is_finite(vector) == bool(np.isfinite(vector).all())


def test_the_digest_is_the_sha256_of_little_endian_bytes() -> None:
    vector = np.array([1.5, -2.25, 3e-30], np.float32)
    expected = hashlib.sha256(struct.pack("<3f", *vector)).hexdigest()
    assert digest(vector) == expected
    assert digest(vector.astype(">f4")) == expected
    assert digest(np.repeat(vector, 2)[::2]) == expected


def test_one_bit_changes_the_digest() -> None:
    vector = np.ones(8, np.float32)
    other = vector.copy()
    other[3] = np.nextafter(np.float32(1), np.float32(2))
    assert digest(vector) != digest(other)
    assert digest(np.array([0.0], np.float32)) != digest(np.array([-0.0], np.float32))


@given(weights=named)
def test_equal_weights_are_stored_as_equal_bytes_and_read_again(
    tmp_path_factory: pytest.TempPathFactory, weights: Named
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    save(folder / "a", weights)
    save(folder / "b", dict(reversed(weights.items())))
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert flatten(load(folder / "a")).tobytes() == flatten(weights).tobytes()


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(tmp_path / "weights")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="weights"):
        load(tmp_path / "weights")

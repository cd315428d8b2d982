"""Weights become one vector and come back, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared_models import weights as weights_module
from shared_models.files import replace
from shared_models.weights import (
    Flat,
    Spool,
    Stored,
    digest,
    entries,
    flat_of,
    flatten,
    is_finite,
    joined,
    load,
    packed,
    save,
    schema_of,
    serialized,
    size_of,
    spooled,
    stowed,
    subtract,
    unflatten,
    unpacked,
    vector_of,
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


@given(weights=named)
def test_wherever_numbers_lie_they_have_the_same_bytes_and_the_same_digest(weights: Named) -> None:
    vector = flatten(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "STRETCH_BYTES", 12)
        kept = stowed(weights)
        for found in (packed(weights), packed(kept), spooled(packed(weights).stretches())):
            assert found.size == vector.nbytes
            assert b"".join(found.stretches()) == vector.tobytes()
            assert digest(found) == digest(vector)
            assert is_finite(found)
    assert schema_of(kept) == schema_of(weights)
    assert {name: kept[name].tobytes() for name in kept} == {
        name: value.tobytes() for name, value in weights.items()
    }


@given(sizes=st.lists(st.integers(0, 5), max_size=5), cut=st.tuples(*[st.integers(0, 25)] * 2))
def test_parts_are_read_as_one_wherever_a_stretch_begins(
    sizes: list[int], cut: tuple[int, int]
) -> None:
    whole = bytes(range(sum(sizes)))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [whole[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    flat = joined([flat_of(np.frombuffer(part, np.uint8)) for part in parts])
    start, stop = sorted(min(at, flat.size) for at in cut)
    assert flat.size == len(whole)
    assert bytes(flat.read(start, stop)) == whole[start:stop]
    assert bytes(flat.part(start, stop).read(0, stop - start)) == whole[start:stop]


def test_what_is_in_memory_is_not_copied() -> None:
    weights = {"b": np.ones(3, np.float32), "a": np.ones((2, 2), np.float32)}
    stretches = [np.frombuffer(packed({n: v}).read(0, v.nbytes), "<f4") for n, v in weights.items()]
    assert all(map(np.shares_memory, stretches, weights.values()))
    vector = flatten(weights)
    assert np.shares_memory(vector_of(flat_of(vector)), vector)
    assert np.shares_memory(unpacked(flat_of(vector), schema_of(weights))["b"], vector)


def test_stored_arrays_cannot_be_written_to() -> None:
    kept = stowed({"a": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="read-only"):
        kept["a"][0] = 2.0


def test_a_vector_of_another_size_has_no_arrays() -> None:
    with pytest.raises(ValueError, match="expected 16 bytes, got 12"):
        unpacked(flat_of(np.zeros(3, np.float32)), (("a", (4,)),))


def test_a_spool_has_no_name_and_is_closed_when_nobody_can_read_from_it(tmp_path: Path) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    spool = Spool(tmp_path)
    part = spool.append(b"north")
    assert spool.append(b"south").read(0, 5) == b"south"
    assert list(tmp_path.iterdir()) == []
    assert (part.read(1, 3), spool.flat.read(3, 8)) == (b"or", b"thsou")
    del spool
    assert part.read(0, 5) == b"north"
    del part
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_file_that_ends_too_soon_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a", {"a": np.ones(4, np.float32)})
    found = load(tmp_path / "a")
    os.truncate(tmp_path / "a", (tmp_path / "a").stat().st_size - 1)
    with pytest.raises(OSError, match="ended too soon"):
        found["a"]


@given(weights=named)
def test_what_is_stored_is_what_safetensors_itself_would_write(
    tmp_path_factory: pytest.TempPathFactory, weights: Named
) -> None:
    from safetensors.numpy import load as theirs
    from safetensors.numpy import save as save_theirs

    file = tmp_path_factory.mktemp("weights") / "a"
    save(file, stowed(weights))
    whole = {name: np.asarray(value, order="C") for name, value in weights.items()}
    assert file.read_bytes() == save_theirs({name: whole[name] for name in sorted(whole)})
    assert flatten(theirs(file.read_bytes())).tobytes() == flatten(weights).tobytes()


def test_numbers_of_many_kinds_are_stored_and_safetensors_reads_them(tmp_path: Path) -> None:
    from safetensors.numpy import load as theirs

    kinds = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    arrays = {kind: np.arange(3).astype(kind) for kind in kinds}
    replace(tmp_path / "a", serialized(entries(arrays, prefix="part/")))
    for found in (load(tmp_path / "a"), theirs((tmp_path / "a").read_bytes())):
        assert {name: found[f"part/{name}"].tolist() for name in kinds} == {
            name: value.tolist() for name, value in arrays.items()
        }
    assert stowed(arrays)["f8"].dtype == np.float64


def test_a_file_is_written_and_read_one_stretch_or_one_array_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "STRETCH_BYTES", 64)
    asked: list[int] = []
    raw = np.arange(100, dtype=np.float32).tobytes()

    def read(start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return raw[start:stop]

    save(tmp_path / "a", unpacked(Flat(400, read), (("a", (60,)), ("b", (40,)))))
    assert max(asked) == 64
    found = load(tmp_path / "a")
    assert isinstance(found, Stored)
    assert found["b"].tolist() == list(range(60, 100))


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "head",
    [
        [],
        {"a": 3},
        {"a": GOOD["a"] | {"dtype": "F33"}},
        {"a": GOOD["a"] | {"shape": [3]}},
        {"a": GOOD["a"] | {"shape": [-1, -2]}},
        {"a": GOOD["a"] | {"shape": "12"}},
        {"a": GOOD["a"] | {"data_offsets": [0, 7]}},
        {"a": GOOD["a"] | {"data_offsets": [-8, 0]}},
        {"a": GOOD["a"] | {"data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        GOOD | {"b": GOOD["a"]},
        GOOD | {"b": GOOD["a"] | {"data_offsets": [16, 24]}},
        {},
    ],
)
def test_a_head_that_does_not_fit_its_file_is_refused(head: Any, tmp_path: Path) -> None:
    def written(told: Any) -> Path:
        text = json.dumps(told).encode()
        (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        return tmp_path / "a"

    assert load(written(GOOD | {"__metadata__": {"x": "y"}}))["a"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(written(head))


@pytest.mark.parametrize("start", [b"", b"12", struct.pack("<Q", 9), struct.pack("<Q", 2**63)])
def test_a_file_that_is_too_short_is_refused(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(start)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(tmp_path / "a")


def test_large_blocks_that_are_freed_go_back_to_the_system() -> None:
    """In a process of its own: how memory is given back is a setting of the whole process."""
    program = """
import threading
from shared_models.weights import return_what_is_freed

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def work():
    bytes(20 * 2**20)  # freed: from here on glibc would keep what is smaller
    kept = [(b"x" * (8 * 2**20), b"y" * 2**16) for _ in range(8)]
    small = [part[1] for part in kept]
    before = held()
    del kept
    print(before - held())

return_what_is_freed()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > 60

"""Weights as named float32 arrays, and as the one flat vector that travels.

The vector is every array, C order, concatenated in the order of the names' code points. Names and
shapes do not travel: both sides know them from the plan's net, so a peer cannot smuggle any.
Stored weights are safetensors, never pickle.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
Schema = tuple[tuple[str, tuple[int, ...]], ...]


def schema_of(weights: Weights) -> Schema:
    """Return names and shapes, sorted by name."""
    return tuple((name, tuple(weights[name].shape)) for name in sorted(weights))


def size_of(schema: Schema) -> int:
    """Return how many numbers weights of this schema hold."""
    return sum(math.prod(shape) for _, shape in schema)


def flatten(weights: Weights) -> Array:
    """Return all weights as one float32 vector."""
    parts = [np.ravel(weights[name]) for name in sorted(weights)]
    return (
        np.concatenate(parts).astype(np.float32, copy=False) if parts else np.zeros(0, np.float32)
    )


def unflatten(vector: Array, schema: Schema) -> dict[str, Array]:
    """Return named views into ``vector``.

    Raises:
        ValueError: if the vector is not float32, one-dimensional and of the schema's size.
    """
    if vector.dtype != np.float32 or vector.shape != (size_of(schema),):
        raise ValueError(
            f"expected float32 ({size_of(schema)},), got {vector.dtype} {vector.shape}"
        )
    weights, start = {}, 0
    for name, shape in schema:
        stop = start + math.prod(shape)
        weights[name] = vector[start:stop].reshape(shape)
        start = stop
    return weights


def subtract(left: Weights, right: Weights) -> dict[str, Array]:
    """Return ``left - right``, name by name: an update, when ``right`` is where training began."""
    return {name: left[name] - right[name] for name in left}


def is_finite(vector: Array) -> bool:
    """Tell whether every number is finite, in one pass without a copy of the vector."""
    with np.errstate(over="ignore", invalid="ignore"):
        is_small = bool(np.isfinite(np.dot(vector, vector)))
    return is_small or bool(np.isfinite(vector).all())


def digest(vector: NDArray[Any]) -> str:
    """Return the SHA-256 of the vector's little-endian bytes, in hexadecimal."""
    little = np.ascontiguousarray(vector, dtype=vector.dtype.newbyteorder("<"))
    return hashlib.sha256(little.view(np.uint8).data).hexdigest()


def save(file: Path, weights: Weights) -> None:
    """Write ``weights`` as safetensors: equal weights, equal bytes."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(weights[name]) for name in sorted(weights)}, file)


def load(file: Path) -> dict[str, Array]:
    """Read safetensors.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file") from error

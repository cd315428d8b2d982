"""Weights as named float32 arrays, and as the one flat vector that travels.

The vector is every array, C order, concatenated in the order of the names' code points. Names and
shapes do not travel: both sides know them from the plan's net, so a peer cannot smuggle any.
Stored weights are safetensors, never pickle.

A large model that only passes through is not held in memory: its vector is a ``Flat``, bytes in
memory or in a file that are read stretch by stretch, and its arrays are ``Stored``, each read when
it is asked for.

Guarantees:
    Wherever numbers lie, they have the same bytes and the same digest.
    A file of weights is written and read one stretch or one array at a time.
    A spool has no name, and is gone with the process, however it ends.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import struct
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from operator import index
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from shared_models.files import replace

HEAD = struct.Struct("<Q")  # how long a safetensors file's head is
MOST_HEAD_BYTES = 100 * 10**6  # by the format
STRETCH_BYTES = 8 * 2**20
LARGE_BYTES = 2**20
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
#: The numbers a file of weights may hold, by safetensors' names for them; and the other way round.
NUMBERS = {
    **{f"F{8 * size}": f"<f{size}" for size in (8, 4, 2)},
    **{f"I{8 * size}": f"<i{size}" for size in (8, 4, 2)},
    **{f"U{8 * size}": f"<u{size}" for size in (8, 4, 2)},
    **{"I8": "|i1", "U8": "|u1", "BOOL": "|b1"},
}
KINDS = {numbers: kind for kind, numbers in NUMBERS.items()}

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
Schema = tuple[tuple[str, tuple[int, ...]], ...]
Buffer = bytes | memoryview
Read = Callable[[int, int], Buffer]


class Flat(NamedTuple):
    """So many bytes, in memory or in a file: ``read(start, stop)`` gives a stretch of them."""

    size: int
    read: Read

    def stretches(self) -> Iterator[Buffer]:
        """Yield all bytes in order, ``STRETCH_BYTES`` at a time."""
        for start in range(0, self.size, STRETCH_BYTES):
            yield self.read(start, min(start + STRETCH_BYTES, self.size))

    def part(self, start: int, stop: int) -> Flat:
        """Return where some of the bytes lie, without reading them."""
        return Flat(stop - start, lambda first, last: self.read(start + first, start + last))


class Place(NamedTuple):
    """Where an array's bytes begin, what kind of numbers they are, and its shape."""

    start: int
    numbers: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many bytes they are."""
        return math.prod(self.shape) * np.dtype(self.numbers).itemsize


class Entry(NamedTuple):
    """An array as a safetensors file names it, and its bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    flat: Flat


class Stored(Mapping[str, NDArray[Any]]):
    """Named arrays within ``flat``; each is read when it is asked for, and not kept."""

    def __init__(self, flat: Flat, places: Mapping[str, Place]) -> None:
        self.flat, self.places = flat, places

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an array, which cannot be written to."""
        place = self.places[name]
        raw = self.flat.read(place.start, place.start + place.size)
        array = np.frombuffer(raw, dtype=place.numbers).reshape(place.shape)
        array.flags.writeable = False
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def bytes_of(self, name: str) -> Flat:
        """Return where an array's bytes lie."""
        place = self.places[name]
        return self.flat.part(place.start, place.start + place.size)


class Spool:
    """A file without a name in ``folder``, or where the system keeps such, that bytes are added to.

    It is closed when nobody can read from it any more.

    Raises:
        OSError: if it cannot be made or written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            self.descriptor = os.dup(file.fileno())
        self.size, self._read = 0, _read_from(self.descriptor)

    def append(self, piece: Buffer) -> Flat:
        """Add ``piece``, and return its bytes in the file."""
        start, view = self.size, memoryview(piece)
        while view:
            written = os.write(self.descriptor, view)
            view, self.size = view[written:], self.size + written
        return self.flat.part(start, self.size)

    @property
    def flat(self) -> Flat:
        """All that has been added so far."""
        return Flat(self.size, self._read)


def schema_of(weights: Mapping[str, NDArray[Any]]) -> Schema:
    """Return names and shapes, sorted by name."""
    if isinstance(weights, Stored):
        return tuple((name, weights.places[name].shape) for name in sorted(weights))
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


def packed(weights: Weights) -> Flat:
    """Return the bytes of the vector that ``flatten`` makes, without making it."""
    if isinstance(weights, Stored) and all(p.numbers == "<f4" for p in weights.places.values()):
        return joined([weights.bytes_of(name) for name in sorted(weights)])
    arrays = (np.ravel(weights[name]).astype(np.float32, copy=False) for name in sorted(weights))
    return joined([flat_of(array) for array in arrays])


def unpacked(flat: Flat, schema: Schema) -> Stored:
    """Return named arrays within ``flat``, the bytes of a float32 vector.

    Raises:
        ValueError: if it is not of the schema's size.
    """
    if flat.size != 4 * size_of(schema):
        raise ValueError(f"expected {4 * size_of(schema)} bytes, got {flat.size}")
    places, start = dict[str, Place](), 0
    for name, shape in schema:
        places[name] = Place(start, "<f4", shape)
        start += places[name].size
    return Stored(flat, places)


def flat_of(vector: NDArray[Any]) -> Flat:
    """Return the little-endian bytes of a vector, which are not copied if they are that already."""
    little = np.ascontiguousarray(vector, dtype=vector.dtype.newbyteorder("<"))
    raw = little.view(np.uint8).data if little.size else memoryview(b"")
    return Flat(len(raw), lambda start, stop: raw[start:stop])


def flat_in(stream: BinaryIO) -> Flat:
    """Return the bytes of an open file; they can be read after it is closed."""
    descriptor = os.dup(stream.fileno())
    return Flat(os.fstat(descriptor).st_size, _read_from(descriptor))


def vector_of(flat: Flat, numbers: str = "<f4") -> NDArray[Any]:
    """Return the vector of which these are the bytes, in memory."""
    return np.frombuffer(flat.read(0, flat.size), dtype=numbers)


def joined(parts: Sequence[Flat]) -> Flat:
    """Return the bytes of ``parts``, one after the other."""
    starts = list(accumulate((part.size for part in parts), initial=0))

    def read(start: int, stop: int) -> Buffer:
        found = list[Buffer]()
        number = bisect_right(starts, start) - 1
        while start < stop:
            begin, last = starts[number], min(stop, starts[number + 1])
            found.append(parts[number].read(start - begin, last - begin))
            start, number = last, number + 1
        return found[0] if len(found) == 1 else b"".join(found)

    return parts[0] if len(parts) == 1 else Flat(starts[-1], read)


def spooled(pieces: Iterable[Buffer], *, folder: Path | None = None) -> Flat:
    """Write ``pieces`` to a spool, and return their bytes there.

    Raises:
        OSError: if they cannot be written.
    """
    spool = Spool(folder)
    for piece in pieces:
        spool.append(piece)
    return spool.flat


def stowed(arrays: Mapping[str, NDArray[Any]], *, folder: Path | None = None) -> Stored:
    """Return the same arrays in a spool.

    Raises:
        OSError: if they cannot be written.
    """
    spool, places = Spool(folder), dict[str, Place]()
    for name, kind, shape, flat in entries(arrays):
        places[name] = Place(spool.size, NUMBERS[kind], shape)
        for piece in flat.stretches():
            spool.append(piece)
    return Stored(spool.flat, places)


def return_what_is_freed() -> None:
    """Have glibc give the system back every large block as soon as this process frees it.

    Left alone it raises its limit to the largest block it ever freed, up to 32 MiB, and keeps
    blocks below that in one heap for each thread: one to two models more, measured at 100 MB.
    """
    with suppress(AttributeError, OSError):  # another system's C library
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BYTES)


def subtract(left: Weights, right: Weights) -> dict[str, Array]:
    """Return ``left - right``, name by name: an update, when ``right`` is where training began."""
    return {name: left[name] - right[name] for name in left}


def is_finite(vector: Array | Flat) -> bool:
    """Tell whether every number (float32) is finite, in one pass without a copy of the vector."""
    if isinstance(vector, Flat):
        return all(is_finite(np.frombuffer(piece, "<f4")) for piece in vector.stretches())
    with np.errstate(over="ignore", invalid="ignore"):
        is_small = bool(np.isfinite(np.dot(vector, vector)))
    return is_small or bool(np.isfinite(vector).all())


def digest(vector: NDArray[Any] | Flat) -> str:
    """Return the SHA-256 of the vector's little-endian bytes, in hexadecimal."""
    found = hashlib.sha256()
    for piece in (vector if isinstance(vector, Flat) else flat_of(vector)).stretches():
        found.update(piece)
    return found.hexdigest()


def save(file: Path, weights: Weights) -> None:
    """Write ``weights`` as safetensors, durably: equal weights, equal bytes."""
    replace(file, serialized(entries(weights)))


def entries(arrays: Mapping[str, NDArray[Any]], *, prefix: str = "") -> list[Entry]:
    """Return what a safetensors file says of ``arrays``, with ``prefix`` before their names."""
    if isinstance(arrays, Stored):
        return [
            Entry(prefix + name, KINDS[place.numbers], place.shape, arrays.bytes_of(name))
            for name, place in arrays.places.items()
        ]
    return [
        Entry(
            prefix + name,
            KINDS[array.dtype.newbyteorder("<").str],
            array.shape,
            flat_of(np.ravel(array)),
        )
        for name, array in arrays.items()
    ]


def serialized(written: Iterable[Entry]) -> Iterator[Buffer]:
    """Yield a safetensors file, piece by piece: the widest numbers first, then by name."""
    ordered = sorted(written, key=lambda e: (-np.dtype(NUMBERS[e.kind]).itemsize, e.kind, e.name))
    offsets = accumulate((entry.flat.size for entry in ordered), initial=0)
    head = {
        entry.name: {"dtype": entry.kind, "shape": entry.shape, "data_offsets": between}
        for entry, between in zip(ordered, pairwise(offsets), strict=True)
    }
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEAD.size)
    yield HEAD.pack(len(text)) + text
    for entry in ordered:
        yield from entry.flat.stretches()


def load(file: Path) -> Stored:
    """Open safetensors: each array is read from the file when it is asked for.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no safetensors file, or holds other than ``NUMBERS``.
    """
    with file.open("rb") as stream:
        flat = flat_in(stream)
    try:
        (size,) = HEAD.unpack(flat.read(0, HEAD.size))
        begin = HEAD.size + int(size)
        if begin > min(flat.size, MOST_HEAD_BYTES):
            raise ValueError("expected a head")
        return Stored(flat, _places(bytes(flat.read(HEAD.size, begin)), begin, flat.size))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a safetensors file") from error


def _places(head: bytes, begin: int, end: int) -> dict[str, Place]:
    """Return what a safetensors head says, once its arrays are found to fill the file."""
    told = {name: said for name, said in json.loads(head).items() if name != "__metadata__"}
    found, at = dict[str, Place](), begin
    for name, said in sorted(told.items(), key=lambda item: item[1]["data_offsets"]):
        place = Place(at, NUMBERS[said["dtype"]], tuple(map(index, said["shape"])))
        stated = [begin + index(offset) for offset in said["data_offsets"]]
        if min(place.shape, default=0) < 0 or stated != [at, at + place.size]:
            raise ValueError("expected arrays that fill the file")
        found[name], at = place, at + place.size
    if at != end:
        raise ValueError("expected arrays that fill the file")
    return found


def _read_from(descriptor: int) -> Read:
    """Return what reads an open file, and closes it when nobody can call it any more."""

    def read(start: int, stop: int) -> bytes:
        found = list[bytes]()
        while start < stop:
            piece = os.pread(descriptor, stop - start, start)
            if not piece:
                raise OSError("a file of weights ended too soon")
            found.append(piece)
            start += len(piece)
        return found[0] if len(found) == 1 else b"".join(found)

    finalize(read, os.close, descriptor)
    return read

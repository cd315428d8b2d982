"""A door: letters in Flower's records and out again, the same for coordinator and site.

A letter's four texts go in a ConfigRecord, its buckets in an ArrayRecord of raw bytes: a few large
objects instead of one or two for each tensor, and nothing that numpy or pickle would have to open.
Small weights go beside the texts: every object is a request to the SuperLink each time it is pushed
or pulled, so that a small model's round is mostly the number of objects.

Guarantees:
    A letter's buckets are read when they are sent, a chunk of Flower's at a time.
    What is received of a message's arrays goes to a file, chunk by chunk, and is read from there.
    A message that holds more than its limit, or says that it does, is not read.

Design: Flower makes all of an array's bytes before it sends them and after it received them, and a
copy of them as chunks. ``_Array`` and ``_Chunk`` stand for its own classes and have the same object
ids, but read what they hold when it is wanted; ``tests/shared_models/test_envelope.py`` fails when
a new Flower would notice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_id,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from shared_models.errors import DocumentError
from shared_models.weights import Flat, Spool, joined
from shared_models.wire import Buckets, Letter, flat_of_bytes, parts_of, sizes_of

#: The app bundle of every run: it names what is installed at each party, and holds no code.
BUNDLE_FILES = {
    "pyproject.toml": """\
[project]
name = "consilia"
version = "1.0.0"
description = "What runs is what is installed at each party: this bundle holds no code."
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "consilia"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
run-dir = ""
""",
    "LICENSE": "The licence of the installed Consilia package applies.\n",
}
#: The SHA-256 of what Flower packs of them, uncompressed, so the same everywhere: a site obeys no
#: order of a run of any other bundle.
BUNDLE_DIGEST = "b24716ac0ca708ed71db6fbfb6cab00f26d216efc7b3e3caff59855f628c805d"

FIELDS = ("kind", "document", "key", "signature")
INLINE = "weights"
INLINE_BYTES = 2**18  # no more, for equal buckets of several letters travel to the SuperLink once
MOST_CHUNKS = 2**16  # of an array: some hundred GB, unless it repeats one to look large
LEAST_PAUSE_S, MOST_PAUSE_S = 0.03, 0.5


class _Chunk(ArrayChunk):
    """One of Flower's chunks, read when it is sent."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat

    @property
    def data(self) -> memoryview:  # type: ignore[override]
        return memoryview(self.flat.read(0, self.flat.size))

    @property
    def object_id(self) -> str:
        if "_object_id" not in self.__dict__:
            self.__dict__["_object_id"] = get_object_id(self.deflate())
        return str(self.__dict__["_object_id"])


class _Array(Array):
    """One of Flower's arrays of raw bytes, which lie in ``flat``."""

    flat: Flat

    def __init__(self, flat: Flat, *, dtype: str, shape: tuple[int, ...], stype: str) -> None:
        self.__dict__.update(flat=flat, dtype=dtype, shape=shape, stype=stype)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return bytes(self.flat.read(0, self.flat.size))

    def slice_array(self) -> list[tuple[str, InflatableObject]]:
        if "_chunks" not in self.__dict__:
            size, most = self.flat.size, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
            parts = [self.flat.part(at, min(at + most, size)) for at in range(0, size, most)]
            self.__dict__["_chunks"] = [(c.object_id, c) for c in map(_Chunk, parts)]
        return list(self.__dict__["_chunks"])


_Chunk.__qualname__ = ArrayChunk.__qualname__  # which stands in what is sent
_Array.__qualname__ = Array.__qualname__


class Parcel:
    """A message on its way here, object by object: its arrays go to a file in ``folder``.

    Raises:
        DocumentError: on ``add`` if an object cannot be read, or all have over ``most_bytes``.
    """

    def __init__(self, tree: ObjectTree, *, most_bytes: int, folder: Path | None = None) -> None:
        self.object_id, self.most_bytes = tree.object_id, most_bytes
        self.wanted = tuple(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        self.size_bytes = 0
        self._contents = dict[str, bytes]()
        self._chunks = dict[str, Flat]()
        self._folder = folder
        self._spool: Spool | None = None
        self._lock = Lock()

    def __contains__(self, object_id: str) -> bool:
        return object_id in self._contents or object_id in self._chunks

    def add(self, object_id: str, content: bytes) -> None:
        """Take an object; several threads may."""
        with self._lock:
            self.size_bytes += len(content)
            if self.size_bytes > self.most_bytes:
                raise DocumentError(f"expected a message of at most {self.most_bytes} bytes")
            if _kind_of(content) != ArrayChunk.__qualname__:
                self._contents[object_id] = content
                return
            self._spool = self._spool or Spool(self._folder)
            self._chunks[object_id] = self._spool.append(get_object_body(content, ArrayChunk))

    def message(self) -> Message:
        """Return the message, once all its objects are here.

        Raises:
            DocumentError: if they make none.
        """
        try:
            arrays = {name: self._array(content) for name, content in self._all_of(Array)}
            objects: dict[str, InflatableObject] = {}
            for object_id, content in self._all_of(ArrayRecord):
                refs = json.loads(get_object_body(content, ArrayRecord))
                record = {str(name): arrays[array_id] for name, array_id in refs.items()}
                if sum(array.flat.size for array in record.values()) > self.most_bytes:
                    raise DocumentError(f"expected a message of at most {self.most_bytes} bytes")
                objects[object_id] = _record(record)
            found = inflate_object_from_contents(
                self.object_id, self._contents, keep_object_contents=True, objects=objects
            )
        except DocumentError:
            raise
        except Exception as error:  # whatever a peer may make of Flower's reader
            raise DocumentError("the message cannot be read") from error
        if not isinstance(found, Message):
            raise DocumentError("expected a message")
        return found

    def _all_of(self, kind: type[InflatableObject]) -> list[tuple[str, bytes]]:
        """Return the ids and contents of all objects of a kind that came."""
        parts = self._contents.items()
        return [(name, part) for name, part in parts if _kind_of(part) == kind.__qualname__]

    def _array(self, content: bytes) -> _Array:
        """Return an array whose chunks are here; equal chunks came once."""
        _, children, _ = get_object_head_values_from_object_content(content)
        told = json.loads(get_object_body(content, Array))
        order, shape = told["arraychunk_ids"], tuple(told["shape"])
        if len(order) > MOST_CHUNKS:
            raise DocumentError(f"expected an array of at most {MOST_CHUNKS} chunks")
        flat = joined([self._chunks[children[number]] for number in order])
        return _Array(flat, dtype=told["dtype"], shape=shape, stype=told["stype"])


def _record(arrays: dict[str, _Array]) -> ArrayRecord:
    """Return a record of these arrays; its own constructor would make copies of them."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def record_from(letter: Letter) -> RecordDict:
    """Pack a letter for Flower."""
    content = RecordDict()
    fields = ConfigRecord({name: getattr(letter, name) for name in FIELDS})
    content["letter"] = fields
    if letter.buckets and sum(sizes_of(letter.buckets)) <= INLINE_BYTES:
        fields[INLINE] = list(letter.buckets)
    elif letter.buckets:
        content["weights"] = _record(
            {
                f"{index:04d}": _Array(flat, dtype="uint8", shape=(flat.size,), stype="raw")
                for index, flat in enumerate(parts_of(letter.buckets))
            }
        )
    return content


def letter_from(record: RecordDict) -> Letter:
    """Unpack a letter that came through Flower.

    Raises:
        DocumentError: if the record is anything but a letter.
    """
    fields = record.get("letter")
    if not isinstance(fields, ConfigRecord) or not set(record) <= {"letter", "weights"}:
        raise DocumentError("expected a record 'letter' and at most a record 'weights'")
    if INLINE in fields and "weights" in record:
        raise DocumentError("expected a letter's weights in one place")
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    if len(texts) + (INLINE in fields) != len(fields) or set(texts) != set(FIELDS):
        raise DocumentError(f"expected a letter of the texts {', '.join(FIELDS)}")
    buckets: Sequence[bytes] = _inline(fields[INLINE]) if INLINE in fields else ()
    buckets = _buckets(record["weights"]) if "weights" in record else buckets
    return Letter(**texts, buckets=buckets)


def pause_s(waited_s: float) -> float:
    """Return how long to wait before asking again: a tenth of the wait so far, within bounds.

    What comes soon is taken soon; what takes long costs few requests.
    """
    return min(max(waited_s / 10, LEAST_PAUSE_S), MOST_PAUSE_S)


def _inline(weights: object) -> tuple[bytes, ...]:
    if not isinstance(weights, list) or not weights:
        raise DocumentError("expected weights beside the texts as buckets of bytes")
    buckets = tuple(bucket for bucket in weights if isinstance(bucket, bytes))
    if len(buckets) != len(weights) or sum(map(len, buckets)) > INLINE_BYTES:
        raise DocumentError(f"expected buckets of at most {INLINE_BYTES} bytes beside the texts")
    return buckets


def _buckets(weights: object) -> Sequence[bytes]:
    if not isinstance(weights, ArrayRecord) or not weights:
        raise DocumentError("expected weights in an array record that is not empty")
    names = [f"{index:04d}" for index in range(len(weights))]
    if set(weights) != set(names):
        raise DocumentError("expected the buckets to be numbered without a gap")
    arrays = [weights[name] for name in names]
    flats = [a.flat if isinstance(a, _Array) else flat_of_bytes(a.data) for a in arrays]
    if not all(
        array.dtype == "uint8" and array.stype == "raw" and array.shape == (flat.size,)
        for array, flat in zip(arrays, flats, strict=True)
    ):
        raise DocumentError("expected buckets of raw bytes")
    return Buckets(joined(flats), [flat.size for flat in flats])


def _kind_of(content: bytes) -> str:
    try:
        return get_object_head_values_from_object_content(content)[0]
    except ValueError as error:
        raise DocumentError("an object of a message cannot be read") from error

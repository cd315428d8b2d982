"""The door between letters and Flower's records: what is large is never all in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from shared_models import envelope, wire
from shared_models.envelope import Parcel, letter_from, record_from
from shared_models.errors import DocumentError
from shared_models.weights import Flat
from shared_models.wire import Buckets, Letter, in_buckets

VECTOR = np.arange(200_000, dtype=np.float32)
CHUNK = 70_000


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(wire, "BUCKET_BYTES", 300_000)
    for name, number in (("_run_id", 7), ("_node_id", 1), ("_task_id", 3)):
        monkeypatch.setattr(TaskIdentity, name, number)


def letter_of(vector: np.ndarray = VECTOR) -> Letter:
    return Letter("order", "text", "k", "s", in_buckets(vector))


def sent(record: RecordDict) -> tuple[Any, dict[str, bytes]]:
    """Return the tree of a message with ``record`` and its objects, as they travel."""
    message = Message(record, 5, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = get_all_nested_objects(message)
    return get_object_tree(message), {name: part.deflate() for name, part in objects.items()}


def received(tree: Any, objects: dict[str, bytes], **terms: Any) -> Letter:
    parcel = Parcel(tree, **({"most_bytes": 2**30} | terms))
    for object_id in parcel.wanted:
        assert object_id not in parcel
        parcel.add(object_id, objects[object_id])
        assert object_id in parcel
    return letter_from(parcel.message().content)


def test_flower_sees_the_arrays_it_would_have_made_itself() -> None:
    letter = letter_of()
    theirs = ArrayRecord(
        {
            f"{index:04d}": Array("uint8", (len(bucket),), "raw", bucket)
            for index, bucket in enumerate(letter.buckets)
        }
    )
    ours = record_from(letter).array_records["weights"]
    assert len(ours) == 3
    assert ours.object_id == theirs.object_id
    found, expected = get_all_nested_objects(ours), get_all_nested_objects(theirs)
    assert list(found) == list(expected)
    assert [part.deflate() for part in found.values()] == [
        part.deflate() for part in expected.values()
    ]


def test_a_letter_arrives_as_it_was_sent_also_at_flowers_own_reader(tmp_path: Path) -> None:
    tree, objects = sent(record_from(letter_of()))
    assert received(tree, objects, folder=tmp_path) == letter_of()
    assert list(tmp_path.iterdir()) == []
    message = inflate_object_from_contents(tree.object_id, dict(objects))
    assert isinstance(message, Message)
    assert letter_from(message.content) == letter_of()


def test_chunks_that_repeat_arrive_once_and_stand_in_each_place() -> None:
    letter = letter_of(np.zeros(200_000, np.float32))
    tree, objects = sent(record_from(letter))
    assert sum(map(len, objects.values())) < letter.size_bytes / 2
    assert received(tree, objects) == letter


def test_buckets_are_read_a_chunk_at_a_time_when_they_are_sent() -> None:
    asked: list[int] = []
    raw = VECTOR.tobytes()

    def read(start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return raw[start:stop]

    letter = letter_of()._replace(buckets=Buckets(Flat(len(raw), read)))
    record = record_from(letter)
    assert asked == []
    sent(record)
    assert max(asked) == CHUNK


def test_what_came_of_a_message_is_in_a_file_and_read_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[int] = []
    real = envelope.Spool.append

    def append(spool: envelope.Spool, piece: bytes) -> Flat:
        held.append(len(piece))
        return real(spool, piece)

    monkeypatch.setattr(envelope.Spool, "append", append)
    found = received(*sent(record_from(letter_of())))
    assert sum(held) == VECTOR.nbytes
    assert max(held) == CHUNK
    assert isinstance(found.buckets, Buckets)


def test_a_message_over_its_limit_is_not_read() -> None:
    tree, objects = sent(record_from(letter_of()))
    with pytest.raises(DocumentError, match="at most 100000 bytes"):
        received(tree, objects, most_bytes=100_000)


def test_a_message_that_says_it_is_larger_than_what_came_is_not_read() -> None:
    """One chunk of zeros can stand for any number of them."""
    tree, objects = sent(record_from(letter_of(np.zeros(200_000, np.float32))))
    most = sum(map(len, objects.values()))
    with pytest.raises(DocumentError, match=f"at most {most} bytes"):
        received(tree, objects, most_bytes=most)


def test_a_message_that_lacks_a_part_is_not_read() -> None:
    tree, objects = sent(record_from(letter_of()))
    parcel = Parcel(tree, most_bytes=2**30)
    for object_id in parcel.wanted[1:]:
        parcel.add(object_id, objects[object_id])
    with pytest.raises(DocumentError, match="cannot be read"):
        parcel.message()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"Array\x1f\x1f3\x00{}"])
def test_objects_that_are_none_are_no_message(content: bytes) -> None:
    tree, objects = sent(RecordDict({"letter": ConfigRecord({})}))
    with pytest.raises(DocumentError, match="cannot be read"):
        received(tree, dict.fromkeys(objects, content))


def test_what_came_is_not_read_until_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    tree, objects = sent(record_from(letter_of()))
    monkeypatch.setattr(envelope._Array, "data", property(lambda _: asked.append(1)))
    assert received(tree, objects) == letter_of()
    assert asked == []

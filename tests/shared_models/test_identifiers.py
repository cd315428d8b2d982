"""The planted identifiers are all there, and the search finds each in many disguises."""

from __future__ import annotations

import base64
import gzip
import io
import zipfile
from collections import Counter

import pytest

from shared_models.phantoms.identifiers import Planted, write_identifiers
from shared_models.phantoms.survivors import search

NAME = Planted("attribute", "PatientName", "PatientName", "PN", "Zorvakmel^Drunibwex")
DAY = Planted("attribute", "StudyDate", "StudyDate", "DA", "19870304")
TEXT = Planted("attribute", "PatientComments", "PatientComments", "LT", "seen by Dr Zun 4482139")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_identifiers(tmp_path_factory.mktemp("identifiers"), seed=3)


def test_everything_planted_is_found_in_the_files_themselves(corpus):
    for file in corpus.files:
        answers = corpus.planted[file.name]
        assert {one.planted for one in search(file.read_bytes(), answers)} == {*answers}


def test_identifiers_are_many_in_every_kind_of_place_and_differ(corpus):
    answers = corpus.planted["1.dcm"]
    kinds = Counter(one.kind for one in answers)
    assert len(answers) >= 650
    assert kinds["nested"] > 1000
    assert {"private", "graphics", "unassigned", "meta", "preamble", "padding"} < kinds.keys()
    assert len({one.value for one in answers}) == len(answers)
    sequences = {one.where.split(">")[0] for one in answers if one.kind == "nested"}
    assert len(sequences) > 60
    assert max(one.where.count(">") for one in answers) == 3


def test_the_same_seed_writes_the_same_bytes(corpus, tmp_path):
    again = write_identifiers(tmp_path, seed=3)
    for one, two in zip(corpus.files, again.files, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "answers.csv").read_text() == (
        corpus.files[0].parent / "answers.csv"
    ).read_text()


@pytest.mark.parametrize(
    ("one", "written"),
    [
        (NAME, "name: zorvakmel"),
        (NAME, "DRUNIBWEX, Z."),
        (DAY, "on 1987-03-04"),
        (DAY, "04.03.1987"),
        (DAY, "03/04/1987"),
        (TEXT, "record 4482139."),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_a_disguise_is_seen_through(one, written, encoding):
    found = ("x" + written).encode(encoding)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("inner.txt", found * 3)
    for disguised in (
        found,
        b"before" + gzip.compress(found * 3),
        archive.getvalue(),
        base64.b64encode(found * 2),
        gzip.compress(base64.b64encode(found * 2)),
    ):
        assert [survivor.planted for survivor in search(disguised, [one])] == [one]


def test_digits_within_a_longer_number_are_no_record_number():
    assert search(b"2.25.99448213955", [TEXT]) == []


def test_what_is_not_there_is_not_found(corpus):
    assert search(b"nothing of it " * 1000, corpus.planted["1.dcm"]) == []
    assert search(b"", corpus.planted["1.dcm"]) == []

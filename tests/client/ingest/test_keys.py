"""Pseudonyms, shifts and UIDs from a key, and the way back."""

from __future__ import annotations

import pickle
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.ingest.keys import SHIFT_DAYS, Key, create_key, load_key, remember, reveal
from shared_models.errors import DocumentError

OTHER = Key(bytes(32))


@given(st.text(min_size=1, max_size=64))
def test_the_same_key_gives_the_same_and_another_key_nothing_of_it(patient):
    key, again = Key(bytes(range(32))), Key(bytes(range(32)))
    assert (key.pseudonym(patient), key.days(patient)) == (
        again.pseudonym(patient),
        again.days(patient),
    )
    assert key.uid(patient) == again.uid(patient)
    assert key.pseudonym(patient) != OTHER.pseudonym(patient)
    assert key.uid(patient) != OTHER.uid(patient)


@given(st.text(min_size=1, max_size=64))
def test_a_shift_goes_back_by_more_than_a_year(patient):
    least, most = SHIFT_DAYS
    assert -most <= Key(bytes(32)).days(patient) <= -least < -365


def test_a_new_uid_is_a_uid(key):
    new = key.uid("1.2.840.113619.2.1")
    assert new.startswith("2.25.")
    assert len(new) <= 64
    assert int(new[5:]) < 2**128


@given(st.text(max_size=200).filter(lambda text: "\0" not in text))
def test_what_is_sealed_opens_with_its_key_only(patient):
    key = Key(bytes(range(32)))
    line = key.seal(patient)
    assert key.unseal(line) == patient
    with pytest.raises(DocumentError):
        OTHER.unseal(line)


def test_a_pseudonym_is_revealed_by_register_and_key_together(tmp_path, key):
    register = tmp_path / "pseudonyms"
    remember(register, ["MRN448213", "MRN99"], key)
    remember(register, ["MRN448213"], key)
    assert len(register.read_text().splitlines()) == 2
    assert stat.S_IMODE(register.stat().st_mode) == 0o600
    assert reveal(key.pseudonym("MRN448213"), key, register=register) == "MRN448213"
    assert reveal(key.pseudonym("nobody"), key, register=register) is None
    with pytest.raises(DocumentError):
        reveal(key.pseudonym("MRN448213"), OTHER, register=register)
    assert "448213" not in register.read_text()


def test_the_register_tells_no_lengths(key):
    assert len(key.seal("A")) == len(key.seal("A" * 60))


def test_a_key_file_is_its_owners_and_is_never_made_twice(tmp_path):
    file = tmp_path / "deid.key"
    made = create_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load_key(file).pseudonym("x") == made.pseudonym("x")
    with pytest.raises(FileExistsError):
        create_key(file)
    file.chmod(0o640)
    with pytest.raises(DocumentError, match="chmod 600"):
        load_key(file)


def test_a_file_that_is_no_key_is_refused(tmp_path):
    file = tmp_path / "deid.key"
    with pytest.raises(DocumentError):
        load_key(file)
    file.touch(mode=0o600)
    file.write_text("abc")
    with pytest.raises(DocumentError, match="64 digits"):
        load_key(file)


def test_a_key_neither_prints_nor_pickles(key):
    assert repr(key) == "Key(...)"
    with pytest.raises(TypeError):
        pickle.dumps(key)

"""The hospitals a hospital trusts: a list of its own that nothing else gets into."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import peers
from shared_models.errors import DocumentError

NORTH, SOUTH, OTHER = ("ab" * 32, "cd" * 32, "ef" * 32)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
keys = st.binary(min_size=32, max_size=32).map(bytes.hex)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "site" / "peers.toml"


def test_without_a_file_nobody_is_trusted(file: Path) -> None:
    assert peers.read(file) == {}
    assert not file.parent.exists()


def test_an_empty_file_trusts_nobody(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"")
    assert peers.read(file) == {}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.dictionaries(names, keys, max_size=5))
def test_those_trusted_are_found_again_each_with_its_key(file: Path, trusted: dict) -> None:
    file.unlink(missing_ok=True)
    for name, key in trusted.items():
        peers.trust(file, name=name, key=key)
    assert peers.read(file) == trusted


def test_trusting_again_changes_that_key_and_no_other(file: Path) -> None:
    peers.trust(file, name="north", key=NORTH)
    peers.trust(file, name="south", key=SOUTH)
    peers.trust(file, name="north", key=OTHER)
    assert peers.read(file) == {"north": OTHER, "south": SOUTH}


def test_a_person_can_read_whom_the_hospital_trusts(file: Path) -> None:
    peers.trust(file, name="south", key=SOUTH)
    peers.trust(file, name="north", key=NORTH)
    assert file.read_text() == f'north = "{NORTH}"\nsouth = "{SOUTH}"\n'


@pytest.mark.parametrize("name", ["", "no rth", "../north", "-north", "x" * 64, "north\n"])
def test_what_is_no_name_of_a_site_is_not_trusted(name: str, file: Path) -> None:
    peers.trust(file, name="south", key=SOUTH)
    with pytest.raises(DocumentError, match="expected a site's name"):
        peers.trust(file, name=name, key=NORTH)
    assert peers.read(file) == {"south": SOUTH}


@pytest.mark.parametrize("key", ["", "ab" * 31, "ab" * 33, "AB" * 32, "zz" * 32, NORTH + "\n"])
def test_what_is_no_key_is_not_trusted(key: str, file: Path) -> None:
    with pytest.raises(DocumentError, match="64 hexadecimal digits"):
        peers.trust(file, name="north", key=key)
    assert not file.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"north",
        b"north = 3",
        b'north = "ab"',
        f'"no rth" = "{NORTH}"'.encode(),
        f'[north]\nkey = "{NORTH}"'.encode(),
        f'north = "{NORTH}"\nnorth = "{SOUTH}"'.encode(),
        f'north = "{NORTH}"\nsouth = ""'.encode(),
    ],
    ids=["bytes", "a word", "a number", "short", "a name", "a table", "twice", "one of two"],
)
def test_a_file_that_is_no_list_of_peers_trusts_nobody_and_is_left_alone(
    content: bytes, file: Path
) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    for act in (peers.read, lambda file: peers.trust(file, name="west", key=OTHER)):
        with pytest.raises(DocumentError, match="as peers; expected lines of the form"):
            act(file)
    assert file.read_bytes() == content


def test_a_folder_in_place_of_the_file_trusts_nobody(file: Path) -> None:
    file.mkdir(parents=True)
    with pytest.raises(DocumentError):
        peers.read(file)

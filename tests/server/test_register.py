"""The register: what it says of a site follows from its lines, and no line changes unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from server import office as offices
from server import register
from server.office import Office
from shared_models.errors import DocumentError
from shared_models.signing import canonical, digest, public_key, sign


@pytest.fixture
def file(office: Office, enrol: Callable[..., object]) -> Path:
    """Return a register of two sites, one of them revoked."""
    enrol("north")
    enrol("south")
    offices.revoke(office, "south")
    return office.folder / register.FILE


def read(office: Office) -> tuple[register.Line, ...]:
    return register.read(office.folder, key=public_key(office.key))


def test_the_sites_are_a_value_of_the_lines(office: Office, file: Path) -> None:
    entries = [line.entry for line in read(office)]
    kinds = ["opened", "invited", "requested", "accepted"]
    assert [entry.kind for entry in entries] == [*kinds, *kinds[1:], "revoked"]
    states = [register.sites(entries[:number]) for number in range(len(entries) + 1)]
    assert [found["north"].state for found in states[2:]] == ["invited", "pending"] + 5 * [
        "enrolled"
    ]
    assert states[-1]["south"].state == "revoked"
    assert states[-1]["south"].issued == ()
    assert states[-2]["north"] == states[-1]["north"]


@pytest.mark.parametrize("change", ["edited", "removed", "doubled", "moved", "not canonical"])
def test_a_line_edited_removed_doubled_or_moved_is_found(
    change: str, office: Office, file: Path
) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    if change == "edited":
        lines[2] = lines[2].replace(b'"kind":"requested"', b'"kind":"refused"')
    elif change == "removed":
        del lines[3]
    elif change == "doubled":
        lines.insert(3, lines[3])
    elif change == "moved":
        lines[4], lines[5] = lines[5], lines[4]
    else:
        lines[2] = json.dumps(json.loads(lines[2])).encode() + b"\n"
    file.write_bytes(b"".join(lines))
    with pytest.raises(DocumentError, match=r"register: entry [2345] "):
        read(office)
    with pytest.raises(DocumentError):
        offices.invite(office, "west")


def test_a_line_signed_by_another_key_is_found(office: Office, file: Path) -> None:
    last = read(office)[-1]
    entry = last.entry.model_copy(update={"index": last.entry.index + 1, "previous": digest(last)})
    forged = register.Line(entry=entry, signature=sign(entry, key=Ed25519PrivateKey.generate()))
    with file.open("ab") as stream:
        stream.write(canonical(forged) + b"\n")
    with pytest.raises(DocumentError, match=f"entry {entry.index} was edited"):
        read(office)


def test_another_coordinators_register_is_not_read(office: Office, file: Path) -> None:
    with pytest.raises(DocumentError, match="entry 0"):
        register.read(office.folder, key="ab" * 32)


def test_a_line_cut_short_by_a_crash_never_counts(office: Office, file: Path) -> None:
    whole = file.read_bytes()
    lines = read(office)
    for cut in (1, 40, len(whole.splitlines()[-1]) - 1):
        file.write_bytes(whole + whole.splitlines()[-1][:cut])
        assert read(office) == lines
    offices.invite(office, "west")
    assert read(office)[:-1] == lines
    assert read(office)[-1].entry.site == "west"


def test_a_head_kept_elsewhere_shows_what_was_cut_off(office: Office, file: Path) -> None:
    head = offices.head(office)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    assert offices.sites(office)["south"].state == "enrolled"
    assert offices.head(office) != head


def test_two_that_write_at_once_keep_the_chain(office: Office) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: offices.invite(office, f"site{number}"), range(12)))
    assert len(read(office)) == 13
    assert len(offices.sites(office)) == 12


def test_what_is_about_a_site_never_invited_is_refused(office: Office) -> None:
    with register.writing(office.folder, office.key) as book:
        book.add("revoked", site="nowhere")
    with pytest.raises(DocumentError, match="never invited"):
        offices.sites(office)


def test_a_line_of_an_earlier_version_has_the_bytes_it_had(office: Office, file: Path) -> None:
    before = file.read_bytes()
    assert b'"study"' not in before
    offices.close(office, "5a" * 32)
    assert file.read_bytes().startswith(before)
    assert [line.entry.schema_version for line in read(office)][-2:] == [1, 2]


def test_a_study_is_closed_once_and_by_a_line_that_says_which(office: Office, file: Path) -> None:
    sites = offices.sites(office)
    for _ in range(2):
        offices.close(office, "5a" * 32)
    assert offices.closed(office) == {"5a" * 32}
    assert offices.sites(office) == sites
    closing = read(office)[-1].entry
    assert (closing.kind, closing.site) == ("closed", None)
    fields = closing.model_dump()
    for wrong in ({"schema_version": 1}, {"study": None}, {"site": "north"}, {"kind": "revoked"}):
        with pytest.raises(ValidationError):
            register.Entry.model_validate(fields | wrong)
    opened = read(office)[0].entry.model_dump()
    with pytest.raises(ValidationError):
        register.Entry.model_validate(opened | {"schema_version": 2})


def test_the_register_holds_no_private_key(office: Office, file: Path) -> None:
    assert b"PRIVATE" not in file.read_bytes()

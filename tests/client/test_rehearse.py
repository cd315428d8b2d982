"""A rehearsal: archives with a key, and verdicts held to it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from pydicom import dcmread
from typer.testing import CliRunner

from client.cli import app
from client.ingest.deid import Refused, deidentify
from client.ingest.keys import Key
from client.ingest.profile import Terms
from client.rehearse import Difference, compare, expected, read_verdicts, write
from shared_models.errors import DocumentError
from shared_models.series import SeriesRefused, read_files


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal") / "archives"
    write(folder, seed=1, num_patients=1, num_slices=4, size=256)
    return folder


def judged(folder: Path) -> str:
    """Return what reading and de-identification say of the series in a folder."""
    files = sorted(folder.iterdir())
    try:
        read_files(files)
    except SeriesRefused as refusal:
        return refusal.reason
    for file in files:
        found = deidentify(dcmread(file, force=True), Terms(), Key(bytes(32)))
        if isinstance(found, Refused):
            return found.reason
    return "accepted"


def test_reading_and_deidentifying_reach_the_verdicts_of_the_key(archives: Path) -> None:
    folders = [f for f in archives.glob("*/dicom/*") if f.is_dir()]
    assert compare(expected(archives), Counter(judged(folder) for folder in folders)) == []
    assert {"accepted", "burned-in", "localizer"} < expected(archives).keys()


def test_a_verdict_given_too_often_and_one_too_seldom_are_told_apart() -> None:
    key = {"accepted": 3, "localizer": 1}
    assert compare(key, key) == []
    assert compare(key, {"accepted": 4}) == [
        Difference("accepted", 3, 4),
        Difference("localizer", 1, 0),
    ]


def test_the_command_writes_once_and_checks_verdicts(tmp_path: Path) -> None:
    run, root = CliRunner(), tmp_path / "made-up"
    arguments = ["rehearse", str(root), "--patients", "1", "--slices", "2", "--size", "32"]
    done = run.invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    counts = json.loads(done.output)
    assert counts == dict(expected(root))
    with pytest.raises(DocumentError, match="already holds"):
        run.invoke(app, arguments, catch_exceptions=False)
    verdicts = tmp_path / "verdicts.json"
    for change, code in ((0, 0), (1, 1)):
        verdicts.write_text(json.dumps(counts | {"accepted": counts["accepted"] + change}))
        checked = run.invoke(app, ["rehearse", str(root), "--check", str(verdicts)])
        assert checked.exit_code == code
        assert ("accepted: expected" in checked.output) is bool(change)


def test_no_key_and_no_counts_are_refused_with_their_cure(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"no answers.json"):
        expected(tmp_path)
    (tmp_path / "answers.json").write_text('{"series": [3]}')
    with pytest.raises(DocumentError, match="write the archives anew"):
        expected(tmp_path)
    for text in ("", "[]", '{"accepted": "many"}'):
        (tmp_path / "v.json").write_text(text)
        with pytest.raises(DocumentError, match=r"JSON|counts by verdict"):
            read_verdicts(tmp_path / "v.json")

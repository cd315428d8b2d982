"""Files are whole or absent, and lines are whole or refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared_models.errors import MachineError
from shared_models.files import append_line, is_locked, locked, read_tail, replace


def test_what_is_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    replace(file, b"old")
    replace(file, b"new")
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_crash_while_replacing_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.json"
    replace(file, b"old")

    def crash(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        replace(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"old")
    file.chmod(0o600)
    replace(file, b"new")
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_new_file_is_its_owners_alone_where_that_is_asked(tmp_path: Path) -> None:
    replace(tmp_path / "secret", b"new", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_lines_are_added_in_order(tmp_path: Path) -> None:
    file = tmp_path / "rounds.jsonl"
    append_line(file, "one")
    append_line(file, "zwei ü")
    assert file.read_text(encoding="utf-8") == "one\nzwei ü\n"


@pytest.mark.parametrize(("before", "after"), [("one\ntw", "one\nthree\n"), ("on", "three\n")])
def test_a_line_cut_short_by_a_crash_is_never_glued_to_the_next_one(
    tmp_path: Path, before: str, after: str
) -> None:
    file = tmp_path / "rounds.jsonl"
    file.write_text(before)
    append_line(file, "three")
    assert file.read_text() == after


def test_a_line_end_inside_a_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one line"):
        append_line(tmp_path / "rounds.jsonl", "one\ntwo")


@pytest.mark.parametrize("length", [1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16])
def test_a_tail_is_read_whole_however_long_it_is(tmp_path: Path, length: int) -> None:
    file = tmp_path / "journal.jsonl"
    file.write_bytes(b"one\n" + b"x" * length + b"\ntorn")
    assert read_tail(file) == (b"x" * length, b"torn")
    append_line(file, "three")
    assert read_tail(file) == (b"three", b"")
    assert file.read_bytes() == b"one\n" + b"x" * length + b"\nthree\n"


def test_what_is_locked_is_refused_to_others_with_the_holders_number(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert not is_locked(file)
    with locked(file, refusal="stop it first"):
        assert is_locked(file)
        with (
            pytest.raises(MachineError, match=rf"stop it first \(process {os.getpid()}\)"),
            locked(file, refusal="stop it first", patience_s=0.1),
        ):
            pytest.fail("it was held twice")
    assert not is_locked(file)


def test_what_a_killed_process_had_locked_is_free(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    script = (
        "import sys, time; from pathlib import Path; from shared_models.files import locked\n"
        "with locked(Path(sys.argv[1]), refusal=''): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert is_locked(file)
        holder.send_signal(signal.SIGKILL)
        holder.wait(20)
    with locked(file, refusal="held"):
        assert file.read_text() == str(os.getpid())

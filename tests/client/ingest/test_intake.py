"""What a source holds is in the store once, de-identified and whole, whatever happens meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from client import config as configs
from client.ingest import catalogue, shelves, sources
from client.ingest.desk import Report, Source, opened
from client.ingest.intake import take_in
from client.ingest.keys import load_key, reveal
from client.ingest.terms import Clearance, Terms
from shared_models.errors import MachineError
from shared_models.journal import parse
from shared_models.phantoms.hard import CASES, write_hard_cases
from shared_models.phantoms.identifiers import Planted
from shared_models.phantoms.seeds import make_uid
from shared_models.phantoms.survivors import SHORTEST, search
from shared_models.volume import read_volume


def command(site_dir: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "client.cli", *map(str, arguments)],
        cwd=site_dir,
        capture_output=True,
        text=True,
        timeout=120,
    )


def expected(answers: list[dict[str, Any]]) -> tuple[int, dict[str, int]]:
    """Return how many series are to be accepted, and refused by reason.

    The key judges folders, an intake series: two in a folder are two, and a file that was copied
    is one image.
    """
    refused = Counter(answer["reason"] for answer in answers)
    accepted = refused.pop(None, 0)
    accepted += 2 * refused.pop("several-series", 0)
    copied = sum(answer.get("case") == "copied-file" for answer in answers)
    refused["same-position"] -= copied
    return accepted + copied, {reason: n for reason, n in sorted(refused.items()) if n}


def planted(answers: list[dict[str, Any]]) -> list[Planted]:
    names = {"PatientBirthDate": "DA", "StudyDate": "DA"}
    found = {
        (keyword, value)
        for answer in answers
        for keyword, value in answer.get("identifiers", {}).items()
        if len(value) >= SHORTEST
    }
    found |= {
        (keyword, answer[keyword])
        for answer in answers
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID")
        if keyword in answer
    }
    vrs = {key: names.get(key, "PN" if "Name" in key else "LO") for key, _ in found}
    vrs["InstitutionName"] = vrs["StationName"] = "LO"
    return [Planted("attribute", key, key, vrs[key], value) for key, value in sorted(found)]


def snapshot(site_dir: Path) -> dict[str, Any]:
    """Return all that a run leaves: the store's files, what waits, and the catalogue's rows."""
    ingest = site_dir / "ingest"
    files = {
        str(file.relative_to(ingest)): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in (ingest / "store", ingest / "private" / "pending")
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    rows = {}
    with catalogue.opened(ingest / "private" / shelves.CATALOGUE) as connection:
        for table, columns in (
            ("patients", "*"),
            ("volumes", "*"),
            ("instances", "*"),
            ("flags", "*"),
            ("maps", "*"),
            ("series", "uid, patient, modality, state, reason, label"),
            ("provenance", "series, digest, source, num_files"),
            ("seen", "state, series"),
        ):
            found = connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2")
            rows[table] = found.fetchall()
    return {"files": files, **rows}


def test_the_real_command_reaches_every_verdict_and_leaves_no_identifier(
    site_dir: Path, archive: Any
) -> None:
    done = command(site_dir, "ingest", archive.dicom, "--json", "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((site_dir / "report.json").read_text())
    accepted, refused = expected(archive.answers)
    assert (report["accepted"], report["refused"]) == (accepted, refused)
    assert "accepted" in done.stdout
    assert done.stderr == ""
    looked_for = planted(archive.answers)
    assert len(looked_for) > 30
    files = [file for file in site_dir.rglob("*") if file.is_file()]
    files.remove(site_dir / "ingest" / "private" / "key")
    assert sum(file.suffix == ".dcm" for file in files) > 20
    left = b"\0".join(file.read_bytes() + str(file).encode() for file in files)
    assert search(left + done.stdout.encode(), looked_for) == []
    (original, *_) = sorted((archive.dicom).rglob("*.dcm"))
    assert search(original.read_bytes(), looked_for) != []  # the search can find them
    journal = parse((site_dir / "state" / "journal.jsonl").read_bytes())
    assert [line.entry.kind for line in journal] == ["opened", "ingested", "config"]


def test_every_hard_series_is_kept_exactly_or_refused(
    take: Callable[..., Report], site_dir: Path, tmp_path: Path
) -> None:
    cases = write_hard_cases(tmp_path / "hard", 5)
    report = take(tmp_path / "hard")
    wanted = Counter(reason for reason, _ in CASES.values())
    # beside good series lie a localizer, a capture, a report and an index, each set aside
    assert report.accepted == wanted.pop(None) + 2 + 1  # two-series, copied-file
    wanted -= Counter({"several-series": 1, "same-position": 1})
    wanted += Counter({"not-image": 1})  # the report is of another series
    assert report.refused == {reason: n for reason, n in sorted(wanted.items()) if n}
    truths = {
        (case.expected.data.tobytes(), case.expected.modality)
        for case in cases
        if case.expected is not None
    }
    stored = [read_volume(file.parent) for file in first_files(site_dir)]
    assert len(stored) == report.accepted
    unknown = [one for one in stored if (one.data.tobytes(), one.modality) not in truths]
    assert len(unknown) == 3  # of the folders that are refused as folders


def first_files(site_dir: Path) -> list[Path]:
    folders = {file.parent for file in (site_dir / "ingest" / "store").rglob("*.dcm")}
    return [sorted(folder.glob("*.dcm"))[0] for folder in sorted(folders)]


def test_the_same_images_taken_in_twice_change_nothing(
    take: Callable[..., Report], site_dir: Path, archive: Any, tmp_path: Path
) -> None:
    first = take(archive.dicom)
    before = snapshot(site_dir)
    again = take(archive.dicom)
    assert (again.known, again.new, again.changed) == (again.files, 0, 0)
    assert (again.accepted, again.refused) == (first.accepted, first.refused)
    assert snapshot(site_dir) == before
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(archive.dicom, elsewhere)  # other files, the same images
    moved = take(elsewhere)
    assert (moved.known, moved.new, moved.changed) == (0, 0, 0)
    assert moved.accepted == first.accepted
    after = snapshot(site_dir)
    assert {k: v for k, v in after.items() if k != "seen"} == {
        k: v for k, v in before.items() if k != "seen"
    }


def good_series(archive: Any) -> Path:
    return archive.dicom.parent / next(a["folder"] for a in archive.answers if not a["reason"])


def rising(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: float(dcmread(file).SliceLocation))


def test_a_series_that_has_grown_is_replaced_as_a_whole(
    take: Callable[..., Report], site_dir: Path, archive: Any, tmp_path: Path
) -> None:
    files = rising(good_series(archive))
    source = tmp_path / "source"
    source.mkdir()
    for file in files[:4]:
        shutil.copy(file, source)
    assert take(source).new == 1
    (before,) = {file.parent for file in first_files(site_dir)}
    for file in files[4:]:
        shutil.copy(file, source)
    assert take(source).changed == 1
    (after,) = {file.parent for file in first_files(site_dir)}
    assert after != before
    assert not before.exists()
    assert read_volume(after).data.shape[0] == len(files)
    assert [row[3] for row in sorted(snapshot(site_dir)["provenance"])] in ([4, 6], [6, 4])


def test_a_series_that_grew_into_no_volume_is_withdrawn(
    take: Callable[..., Report], site_dir: Path, archive: Any, tmp_path: Path
) -> None:
    files = rising(good_series(archive))
    source = tmp_path / "source"
    source.mkdir()
    for file in files[:3]:
        shutil.copy(file, source)
    assert take(source).new == 1
    shutil.copy(files[5], source)
    report = take(source)
    assert (report.withdrawn, report.accepted, report.refused) == (1, 0, {"missing-slice": 1})
    assert first_files(site_dir) == []
    shutil.copy(files[3], source)
    shutil.copy(files[4], source)
    assert take(source).new == 1
    assert len(first_files(site_dir)) == 1


def test_a_file_that_is_no_object_spoils_its_neighbours_until_it_is_gone(
    take: Callable[..., Report], archive: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(good_series(archive), source)
    (source / "notes.txt").write_text("a list of what is here spoils nothing")
    assert take(source).accepted == 1
    (source / "IM000099").write_bytes(b"a slice, perhaps")
    report = take(source)
    assert (report.accepted, report.refused) == (0, {"not-dicom": 1})
    (source / "IM000099").unlink()
    report = take(source)
    assert (report.accepted, report.refused) == (1, {})


def test_two_images_under_one_uid_are_refused(
    take: Callable[..., Report], archive: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(good_series(archive), source)
    (one, *_) = sorted(source.iterdir())
    other = dcmread(one)
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(source / "other.dcm")
    assert take(source).refused == {"conflicting": 1}


def test_other_terms_mean_that_images_are_de_identified_again(
    take: Callable[..., Report], site_dir: Path, archive: Any
) -> None:
    folder = good_series(archive)
    take(folder)
    (before,) = first_files(site_dir)
    assert dcmread(before).LongitudinalTemporalInformationModified == "MODIFIED"
    assert take(folder, terms=Terms(dates="remove")).changed == 1
    (after,) = first_files(site_dir)
    assert dcmread(after).LongitudinalTemporalInformationModified == "REMOVED"
    assert not before.exists()


def test_what_was_refused_for_good_is_not_kept_and_judged_again_under_other_terms_only(
    take: Callable[..., Report], site_dir: Path, archive: Any, tmp_path: Path
) -> None:
    source, files = tmp_path / "source", rising(good_series(archive))
    source.mkdir()
    for number, file in enumerate(files):
        dataset = dcmread(file)
        dataset.BurnedInAnnotation = "YES"
        dataset.save_as(source / f"{number}")
    one = dcmread(files[0])
    assert take(source).refused == {"burned-in": 1}
    (source / "0").touch()
    assert take(source).refused == {"burned-in": 1}
    assert not snapshot(site_dir)["files"].keys() - {"store/manifest.csv"}
    cleared = Clearance(
        modality=one.Modality,
        manufacturer=one.Manufacturer,
        model=one.ManufacturerModelName,
        rows=one.Rows,
        columns=one.Columns,
    )
    report = take(source, terms=Terms(cleared=(cleared,)))
    assert (report.new, report.refused) == (1, {})


def test_an_arrival_is_done_only_once_it_is_kept(
    site_dir: Path, archive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = configs.read(site_dir / "site.toml").ingest
    inbox = shelves.inbox(settings)
    shelves.make_folders(settings)
    for file in good_series(archive).iterdir():
        sources.put(inbox, file.read_bytes())
    written, write = [], shelves.write

    def full(file: Path, content: bytes) -> int:
        written.append(file)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write(file, content)

    with opened(settings) as (connection, key):
        with monkeypatch.context() as patch, pytest.raises(MachineError):
            patch.setattr(shelves, "write", full)
            take_in(settings, connection, key, Source("dimse", sources.inbox(inbox)))
        assert len(list(inbox.iterdir())) == len(list(good_series(archive).iterdir())) - 2
        report = take_in(settings, connection, key, Source("dimse", sources.inbox(inbox)))
    assert (report.new, report.refused) == (1, {})
    assert list(inbox.iterdir()) == []


def test_only_the_sites_key_leads_back_to_a_patient(
    take: Callable[..., Report], site_dir: Path, archive: Any
) -> None:
    take(good_series(archive))
    (file, *_) = first_files(site_dir)
    original = dcmread(next(good_series(archive).iterdir()))
    private = site_dir / "ingest" / "private"
    pseudonym = str(dcmread(file).PatientID)
    assert file.parent.parent.name == pseudonym
    key = load_key(private / "key")
    assert reveal(pseudonym, key, register=private / "register") == original.PatientID


# --- killed at any point

KILLER = """\
import json, os, signal, sys
from pathlib import Path
from client import config
from client.ingest import acquire, catalogue, intake, receive, settle, shelves
site_dir, dicom, points = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

def run():
    settings = config.read(site_dir / "site.toml").ingest
    with intake.opened(settings) as (connection, key):
        intake.take_in(settings, connection, key, acquire.from_folder(dicom))

def killing(module, name, times, is_after):
    call, calls = getattr(module, name), []
    def wrapped(*arguments, **given):
        calls.append(1)
        if is_after:
            found = call(*arguments, **given)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return found if is_after else call(*arguments, **given)
    setattr(module, name, wrapped)

rooms = {"intake": intake, "receive": receive, "shelves": shelves}
rooms |= {"settle": settle, "catalogue": catalogue}
ends = []
for room, name, times, is_after in points:
    child = os.fork()
    if not child:
        killing(rooms[room], name, times, is_after)
        run()
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
run()
ends.append(0)
print(json.dumps(ends))
"""
POINTS = [
    ("shelves", "write", 40, True),  # a file written, the catalogue not told
    ("receive", "_flush", 1, False),
    ("receive", "_flush", 2, True),
    ("shelves", "publish", 2, False),
    ("shelves", "_link", 9, True),  # half a folder
    ("shelves", "publish", 3, True),  # a folder the catalogue does not know
    ("settle", "_accept", 2, True),  # what waited is still there
    ("catalogue", "drop_volume", 1, False),
    ("catalogue", "drop_files", 1, True),
    ("settle", "_refuse", 1, True),
    ("intake", "reported", 1, False),
]


def test_a_run_killed_at_any_point_is_completed_by_the_next_as_if_undisturbed(
    site_dir: Path, archive: Any, tmp_path: Path
) -> None:
    calm = tmp_path / "calm"
    shutil.copytree(site_dir, calm)
    killed(calm, archive.dicom, [])
    ends = killed(site_dir, archive.dicom, POINTS)
    assert ends == [-9] * len(POINTS) + [0]
    assert snapshot(site_dir) == snapshot(calm)


def killed(site_dir: Path, dicom: Path, points: list[Any]) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(site_dir), str(dicom), json.dumps(points)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


# --- while it is watched


def test_a_watched_folder_is_taken_in_once_it_is_quiet_until_the_watch_ends(
    site_dir: Path, archive: Any, tmp_path: Path
) -> None:
    text = (site_dir / "site.toml").read_text()
    text = text.replace("poll_s = 10.0", "poll_s = 0.1").replace(
        "settle_s = 60.0", "settle_s = 2.0"
    )
    (site_dir / "site.toml").write_text(text)
    files, source = rising(good_series(archive)), tmp_path / "source"
    source.mkdir()
    arrive(files[:3], source)
    with subprocess.Popen(
        [sys.executable, "-m", "client.cli", "ingest", str(source), "--watch"],
        cwd=site_dir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as watch:
        assert watch.stdout is not None
        while not list((site_dir / "ingest" / "private").glob("pending/2.*/*")):
            assert watch.poll() is None
            time.sleep(0.05)
        arrive(files[3:], source)  # before it was quiet for so long
        assert watch.stdout.readline() == "1 new, 0 changed, 0 withdrawn\n"
        watch.send_signal(signal.SIGTERM)
        rest, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0, rest
    (stored,) = first_files(site_dir)
    assert len(list(stored.parent.iterdir())) == len(files)


def arrive(files: list[Path], folder: Path) -> None:
    """Put files there as if they had come a while ago."""
    for file in files:
        shutil.copy(file, folder)
        os.utime(folder / file.name, (1, 1))


# --- without keeping anything


def test_a_dry_run_keeps_nothing_and_shows_no_value(site_dir: Path, archive: Any) -> None:
    shutil.rmtree(site_dir / "ingest")
    done = command(site_dir, "ingest", archive.dicom, "--dry-run", "--json", "plan.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((site_dir / "plan.json").read_text())
    assert found["changes"]["PatientName: replaced by a pseudonym"] > 0
    assert search(done.stdout.encode() + done.stderr.encode(), planted(archive.answers)) == []
    assert not (site_dir / "ingest").exists()
    assert not (site_dir / "state").exists()


def test_the_catalogue_of_a_later_version_is_refused(
    take: Callable[..., Report], site_dir: Path, archive: Any
) -> None:
    take(good_series(archive))
    file = site_dir / "ingest" / "private" / shelves.CATALOGUE
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    done = command(site_dir, "data")
    assert done.returncode == 12
    assert "install the program that made it" in done.stderr


def test_a_store_that_cannot_be_written_is_told_with_its_cure(
    site_dir: Path, archive: Any, take: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shelves, "write", full)
        with pytest.raises(MachineError, match=r"No space left on device.*run the same command"):
            take(good_series(archive))
    assert take(good_series(archive)).new == 1


def test_memory_does_not_grow_with_the_number_of_series(
    take: Callable[..., Report], archive: Any, tmp_path: Path
) -> None:
    """What is held after a run is no more than after one of a third of it."""
    series = [a["folder"] for a in archive.answers if not a["reason"]]
    peaks = []
    for number in (3, 9):
        source = tmp_path / str(number)
        for n in range(number):
            copied(archive.folder / series[n % len(series)], source / str(n), salt=f"{number}.{n}")
        tracemalloc.start()
        assert take(source).new == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def copied(series: Path, folder: Path, *, salt: str) -> None:
    """Copy a series as another one."""
    folder.mkdir(parents=True)
    for file in series.iterdir():
        dataset = dcmread(file)
        for keyword in ("SeriesInstanceUID", "SOPInstanceUID"):
            setattr(dataset, keyword, make_uid(str(dataset[keyword].value), salt))
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(folder / file.name)

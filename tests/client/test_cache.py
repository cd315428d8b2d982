"""The cache gives what was prepared before, and nothing else, whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client import cache as caches
from client.cache import Cache, open_cache, preparer, trim
from shared_models import cohort
from shared_models.errors import DataError, DocumentError

RESIZE = ("resize", {"size": [8, 8]})
Z_SCORE = ("standardize", {})
STEPS = [("median", {"radius": 1}), RESIZE, Z_SCORE]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return open_cache(tmp_path / "cache", most_gb=1.0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return picture(tmp_path / "MARKED-7731.png", seed=0)


def picture(file: Path, *, seed: int) -> Path:
    values = np.random.default_rng(seed).integers(0, 255, (24, 24)).astype(np.uint8)
    Image.fromarray(values).save(file)
    return file


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count what is really done: readings, and steps by name; every state is worth keeping."""
    done: list[str] = []
    read, made = caches.read_pair, caches.made

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            done.append(name)
            return call(*arguments)

        return run

    def made_counted(steps: Any, **rest: Any) -> Any:
        runs = made(steps, **rest)
        return [counted(name, run) for (name, _), run in zip(steps, runs, strict=True)]

    monkeypatch.setattr(caches, "read_pair", counted("read", read))
    monkeypatch.setattr(caches, "made", made_counted)
    monkeypatch.setattr(caches, "WORTH_KEEPING_S", -1.0)
    return done


def entries(cache: Cache) -> list[Path]:
    return sorted(cache.folder.glob("??/*"))


def test_the_same_volumes_come_out_with_the_cache_as_without_it(cache: Cache, image: Path) -> None:
    plain, _ = cohort.preparer(STEPS)(image, None)
    for _ in range(2):
        kept, _ = preparer(cache, STEPS)(image, None)
        assert np.array_equal(kept.data, plain.data)
        assert np.array_equal(kept.affine, plain.affine)
        assert kept.modality == plain.modality


def test_a_label_map_is_kept_beside_its_image(cache: Cache, image: Path, tmp_path: Path) -> None:
    label = picture(tmp_path / "label.png", seed=1)
    plain = cohort.preparer(STEPS)(image, label)[1]
    for _ in range(2):
        kept = preparer(cache, STEPS)(image, label)[1]
        assert plain is not None
        assert kept is not None
        assert np.array_equal(kept.data, plain.data)


def test_a_second_time_costs_no_preparation(cache: Cache, image: Path, taken: list[str]) -> None:
    preparer(cache, STEPS)(image, None)
    assert taken == ["read", "median", "resize", "standardize"]
    preparer(cache, STEPS)(image, None)
    assert taken == ["read", "median", "resize", "standardize"]


def test_changing_one_step_computes_only_what_follows(
    cache: Cache, image: Path, taken: list[str]
) -> None:
    preparer(cache, STEPS)(image, None)
    taken.clear()
    preparer(cache, [STEPS[0], RESIZE, ("min-max", {})])(image, None)
    assert taken == ["min-max"]
    taken.clear()
    preparer(cache, [STEPS[0], ("resize", {"size": [6, 6]}), Z_SCORE])(image, None)
    assert taken == ["resize", "standardize"]
    taken.clear()
    preparer(cache, [("median", {"radius": 2}), RESIZE, Z_SCORE])(image, None)
    assert taken == ["median", "resize", "standardize"]


def test_other_content_under_the_same_name_is_noticed(
    cache: Cache, image: Path, taken: list[str]
) -> None:
    before, _ = preparer(cache, STEPS)(image, None)
    picture(image, seed=1)
    taken.clear()
    after, _ = preparer(cache, STEPS)(image, None)
    assert taken[0] == "read"
    assert not np.array_equal(before.data, after.data)


def test_the_same_content_under_another_name_is_known(
    cache: Cache, image: Path, taken: list[str], tmp_path: Path
) -> None:
    preparer(cache, STEPS)(image, None)
    taken.clear()
    moved = image.rename(tmp_path / "other.png")
    preparer(cache, STEPS)(moved, None)
    assert taken == []


def test_a_folder_is_its_files_whatever_they_are_called(cache: Cache, tmp_path: Path) -> None:
    for name, order in (("a", "12"), ("b", "21")):
        (tmp_path / name).mkdir()
        for file, content in zip("xy", order, strict=True):
            (tmp_path / name / f"{file}.dcm").write_bytes(content.encode())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.dcm").write_bytes(b"1")
    first, second, third = (caches._source(cache, tmp_path / name, None) for name in "abc")
    assert first == second != third


def test_new_software_makes_new_entries(
    cache: Cache, image: Path, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preparer(cache, STEPS)(image, None)
    taken.clear()
    monkeypatch.setattr(caches, "version", lambda name: "99")
    preparer(cache, STEPS)(image, None)
    assert taken == ["read", "median", "resize", "standardize"]


@pytest.mark.parametrize("victim", ["about.json", "image.npy"])
@pytest.mark.parametrize("harm", ["cut", "gone", "other"])
def test_a_broken_entry_is_made_anew(cache: Cache, image: Path, victim: str, harm: str) -> None:
    plain, _ = preparer(cache, [RESIZE])(image, None)
    expected = plain.data.copy()
    (entry,) = entries(cache)
    file = entry / victim
    content = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if harm == "cut" else b"[]")
    again, _ = preparer(cache, [RESIZE])(image, None)
    assert np.array_equal(again.data, expected)


def test_what_is_done_to_a_volume_does_not_reach_the_cache(cache: Cache, image: Path) -> None:
    first, _ = preparer(cache, [RESIZE])(image, None)
    first, _ = preparer(cache, [RESIZE])(image, None)
    expected = first.data.copy()
    first.data[:] = 0
    second, _ = preparer(cache, [RESIZE])(image, None)
    assert np.array_equal(second.data, expected)


def test_a_kept_volume_is_mapped_not_read(cache: Cache, image: Path) -> None:
    preparer(cache, [RESIZE])(image, None)
    kept, _ = preparer(cache, [RESIZE])(image, None)
    assert isinstance(kept.data, np.memmap)


def test_the_folder_is_the_owners_and_no_name_in_it_tells_a_files_name(
    cache: Cache, image: Path
) -> None:
    preparer(cache, STEPS)(image, None)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    for file in cache.folder.rglob("*"):
        assert "MARKED" not in str(file.relative_to(cache.folder))
        assert file.is_dir() or b"MARKED" not in file.read_bytes()


def test_the_index_tells_nothing_without_the_folders_key(image: Path, tmp_path: Path) -> None:
    states = {
        caches._state(open_cache(tmp_path / name, most_gb=1.0), image) for name in ("one", "two")
    }
    assert len(states) == 2


def test_a_bad_image_is_refused_as_without_a_cache(cache: Cache, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(DataError, match="cannot read the image"):
            preparer(cache, STEPS)(broken, None)
    assert entries(cache) == []


def test_the_longest_unused_go_first(cache: Cache, tmp_path: Path) -> None:
    prepare = preparer(cache, [RESIZE])
    images = [picture(tmp_path / f"{seed}.png", seed=seed) for seed in range(4)]
    for number, file in enumerate(images):
        prepare(file, None)
        for about in cache.folder.glob("??/*/about.json"):
            if about.stat().st_mtime > time.time() - 1000:
                os.utime(about, (10_000 + number, 10_000 + number))
    prepare(images[0], None)  # used again just now
    size = sum(size for _, size, _ in caches._entries(cache))
    assert trim(cache._replace(most_bytes=size)) == 0
    assert trim(cache._replace(most_bytes=size // 2)) == 2
    prepared = []
    for file in images:
        before = len(entries(cache))
        prepare(file, None)
        prepared.append(len(entries(cache)) > before)
    assert prepared == [False, True, True, False]


def test_a_full_disk_costs_time_only(
    cache: Cache, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches.np, "save", full)
    plain, _ = cohort.preparer(STEPS)(image, None)
    kept, _ = preparer(cache, STEPS)(image, None)
    assert np.array_equal(kept.data, plain.data)
    assert entries(cache) == []
    assert list(cache.folder.glob(".new-*")) == []


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(DocumentError, match="cannot use the cache"):
        open_cache(tmp_path / "file", most_gb=1.0)


FILLING = """\
import sys
from pathlib import Path
from client.cache import open_cache, preparer
cache = open_cache(Path(sys.argv[1]), most_gb=1.0)
size = 2000
print("ready", flush=True)
while True:
    size += 1
    preparer(cache, [("resize", {"size": [size, size]})])(Path(sys.argv[2]), None)
"""


@pytest.mark.parametrize("pause_s", [0.05, 0.11, 0.17, 0.23])
def test_a_killed_process_leaves_no_broken_entry(cache: Cache, image: Path, pause_s: float) -> None:
    filling = subprocess.Popen(
        [sys.executable, "-c", FILLING, str(cache.folder), str(image)], stdout=subprocess.PIPE
    )
    assert filling.stdout is not None
    filling.stdout.readline()
    deadline = time.monotonic() + 60
    while not list(cache.folder.glob("??/*")) and time.monotonic() < deadline:
        assert filling.poll() is None
        time.sleep(0.01)
    time.sleep(pause_s)  # somewhere in the middle of a later entry
    filling.send_signal(signal.SIGKILL)
    filling.wait()
    filling.stdout.close()
    found = entries(cache)
    assert found
    for entry in found:
        about = json.loads((entry / "about.json").read_text())
        assert list(np.load(entry / "image.npy").shape) == about["image"]["shape"]

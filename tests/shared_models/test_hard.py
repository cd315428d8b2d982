"""Every hard series is read exactly, or refused for the reason it was made for."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from shared_models.errors import DataError
from shared_models.phantoms.hard import CASES, Case, write_hard_cases
from shared_models.series import SeriesRefused, read_files, scan, verdict
from shared_models.volume import read_volume

SEED = 5


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    written = write_hard_cases(tmp_path_factory.mktemp("hard"), SEED)
    return {case.name: case for case in written}


@pytest.mark.parametrize("name", [name for name, (reason, _) in CASES.items() if reason is None])
def test_a_series_that_can_be_read_is_read_exactly(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    volume = read_files(case.files)
    assert case.expected is not None
    assert volume.data.dtype == np.float32
    assert np.array_equal(volume.data, case.expected.data)
    assert np.allclose(volume.affine, case.expected.affine, atol=0.01)
    assert volume.modality == case.expected.modality


@pytest.mark.parametrize("name", [name for name, (reason, _) in CASES.items() if reason])
def test_a_series_that_cannot_be_read_is_refused_for_its_reason(
    cases: dict[str, Case], name: str
) -> None:
    with pytest.raises(SeriesRefused) as caught:
        read_files(cases[name].files)
    assert caught.value.reason == cases[name].reason
    assert "hard" not in str(caught.value).lower()


def test_the_order_in_which_files_are_named_changes_nothing(cases: dict[str, Case]) -> None:
    for name in ("plain", "oblique", "slope-per-slice", "localizer-inside"):
        forward, backward = (read_files(cases[name].files[::way]) for way in (1, -1))
        assert np.array_equal(forward.data, backward.data)
        assert np.array_equal(forward.affine, backward.affine)


def test_headers_alone_tell_all_but_broken_streams_and_stray_bits(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        judged = {verdict(s).reason for s in scan(case.files)} - {None}
        if case.reason in ("damaged", "stray-bits"):
            assert not judged, name
        elif case.reason not in (None, "several-series"):
            assert case.reason in judged, name


def test_a_folder_is_read_as_its_files_are(cases: dict[str, Case]) -> None:
    for name in ("plain", "run-length", "film-inverted", "missing", "foreign-file"):
        folder = cases[name].files[0].parent
        if cases[name].expected is not None:
            assert np.array_equal(read_volume(folder).data, cases[name].expected.data)
        else:
            with pytest.raises(DataError):
                read_volume(folder)


def test_every_file_is_in_exactly_one_series(cases: dict[str, Case]) -> None:
    for case in cases.values():
        sorted_in = [file for series in scan(case.files) for file in series.files]
        assert sorted(sorted_in) == sorted(case.files)


def test_there_are_hard_cases_enough_of_both_kinds() -> None:
    refused = [reason for reason, _ in CASES.values() if reason]
    assert len(refused) >= 28
    assert len(CASES) - len(refused) >= 28


def test_the_same_seed_writes_the_same_hard_cases(tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        content = b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)
        return hashlib.sha256(content).hexdigest()

    found = []
    for name, seed in (("once", 1), ("again", 1), ("other", 2)):
        write_hard_cases(tmp_path / name, seed, names=list(CASES)[::9])
        found.append(digest(tmp_path / name))
        shutil.rmtree(tmp_path / name)
    assert found[0] == found[1] != found[2]


def test_a_case_is_not_written_twice(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(FileExistsError):
        write_hard_cases(tmp_path, SEED, names=["plain"])

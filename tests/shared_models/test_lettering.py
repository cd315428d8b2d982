"""Pictures with text and their twins without, each as its line of the answer key says."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from shared_models.phantoms.lettering import (
    FONTS,
    KINDS,
    PLACES,
    STYLES,
    Lettered,
    Lettering,
    cover,
    letter,
    write_lettered,
)


@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lettered, ...]:
    return write_lettered(tmp_path_factory.mktemp("lettered"), seed=3, size=160)


def test_every_font_style_place_and_kind_of_picture_is_there(
    lettered: tuple[Lettered, ...],
) -> None:
    fonts = {(one.lettering.font, one.lettering.height, one.lettering.style) for one in lettered}
    assert fonts == {(*font, style) for font in FONTS for style in STYLES}
    assert {one.kind for one in lettered} == {*KINDS}
    assert {one.lettering.place for one in lettered} == {*PLACES}
    with (lettered[0].file.parent / "answers.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == [one.file.name for one in lettered]
    assert [row["text"] for row in rows] == [one.text for one in lettered]


def test_a_picture_and_its_twin_differ_where_the_text_is(lettered: tuple[Lettered, ...]) -> None:
    for one in lettered:
        with_text, without = (dcmread(f) for f in (one.file, one.twin))
        shape = (with_text.Rows, with_text.Columns)
        differs = np.asarray(with_text.pixel_array != without.pixel_array)
        if one.kind == "one frame of several":
            assert not differs[:-1].any()
            differs = differs[-1]
        elif one.kind == "screen":
            differs = differs.any(axis=-1)
        letters, around = cover(one.text, one.lettering, shape)
        assert not differs[(letters == 0) & (around == 0)].any()
        assert differs.sum() > 100


def test_letters_have_their_shade_and_their_rim() -> None:
    frame = np.random.default_rng(0).integers(0, 1001, (64, 256)).astype(np.int16)
    frame[0, :2] = 0, 1000
    for style, inside, outside in (("white", 1000, None), ("grey", 600, None), ("box", 1000, 0)):
        lettering = Lettering("sharp", 16, style, "top left")
        found = letter(frame, "ADA OKAFOR", lettering)
        letters, around = cover("ADA OKAFOR", lettering, (64, 256))
        assert (found[letters == 1] == inside).all()
        if outside is not None:
            assert (found[(around == 1) & (letters == 0)] == outside).all()


def test_the_same_seed_writes_the_same_bytes(
    lettered: tuple[Lettered, ...], tmp_path: Path
) -> None:
    again = write_lettered(tmp_path, seed=3, size=160, fonts=FONTS[:2])
    assert len(again) == 2 * len(STYLES)
    for one, two in zip(lettered, again, strict=False):
        assert one.file.read_bytes() == two.file.read_bytes()
        assert one.twin.read_bytes() == two.twin.read_bytes()


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy of dicom3tools")
def test_dciodvfy_finds_no_errors(lettered: tuple[Lettered, ...]) -> None:
    for kind in KINDS:
        for modality in ("CT", "MR"):
            some = [one for one in lettered if (one.kind, one.modality) == (kind, modality)][:1]
            for one in some:
                done = subprocess.run(
                    ["dciodvfy", "-new", str(one.file)], capture_output=True, text=True, check=False
                )
                assert "Error" not in done.stderr + done.stdout, (kind, done.stderr)

"""Whether text drawn into pixels is found, and codestreams lose their comments only."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from pydicom import dcmread

from client.ingest.pixels import NoDecoder, has_lettering, shows_text, without_comments
from shared_models.phantoms.lettering import write_lettered

TEXT = "OKAFOR ADA 1961-04-12 MRN 448213"


def anatomy(seed: int, dtype: str = "<i2", size: int = 512) -> np.ndarray:
    """Return a disc with smaller discs in it, under noise, on a constant background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - size / 2
    frame = np.full((size, size), -1000.0)
    frame[x**2 + y**2 < (0.4 * size) ** 2] = 40
    for _ in range(12):
        cy, cx = rng.uniform(-0.25, 0.25, 2) * size
        inside = (x - cx) ** 2 + (y - cy) ** 2 < (rng.uniform(0.01, 0.08) * size) ** 2
        frame[inside] = rng.uniform(-200, 1500)
    frame = np.maximum(frame + rng.normal(0, 20, frame.shape), -1000)
    return (frame + 1000 if "u" in dtype else frame).astype(dtype)


def lettered(frame: np.ndarray, value: int, size: int, where: tuple[int, int]) -> np.ndarray:
    picture = Image.new("1", frame.shape[::-1])
    draw = ImageDraw.Draw(picture)
    draw.fontmode = "1"
    draw.text(where, TEXT, fill=1, font=ImageFont.load_default(size))
    found = frame.copy()
    found[np.array(picture)] = value
    return found


@pytest.mark.parametrize("value", [3000, 600], ids=["saturated", "grey"])
@pytest.mark.parametrize("size", [14, 20, 32])
def test_saturated_and_grey_text_is_found(value, size):
    for seed in range(3):
        for where in ((5, 5), (120, 250)):
            assert has_lettering(lettered(anatomy(seed), value, size, where))


def test_anatomy_is_not_taken_for_text():
    for seed in range(8):
        for dtype in ("<i2", "<u2", ">i2"):
            assert not has_lettering(anatomy(seed, dtype))


@pytest.fixture(scope="module")
def answer_key(tmp_path_factory):
    """Return pictures of every kind with text and without, from 16 pixels of height."""
    fonts = (("sharp", 16), ("smooth", 24), ("dots", 22))
    return write_lettered(tmp_path_factory.mktemp("lettered"), seed=5, size=384, fonts=fonts)


def test_text_of_the_answer_key_is_found_in_solid_soft_and_transparent_letters(answer_key):
    at_borders = [one for one in answer_key if one.lettering.place != "body"]
    missed = [one.lettering for one in at_borders if not shows_text(dcmread(one.file))]
    assert len(at_borders) > 12
    assert not [one for one in missed if one.style != "transparent"]
    assert len(missed) <= 1


def test_the_same_pictures_without_text_pass(answer_key):
    assert not [one for one in answer_key if shows_text(dcmread(one.twin))]


def test_text_in_wide_values_is_found():
    frame = anatomy(0).astype(np.int32) * 40000
    assert has_lettering(lettered(frame, 2**30, 20, (120, 250)))
    assert not has_lettering(frame)


def test_constant_and_tiny_frames_hold_no_text():
    assert not has_lettering(np.zeros((512, 512), np.uint8))
    assert not has_lettering(np.arange(16, dtype=np.int16).reshape(4, 4))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["u1", "<u2", "<i2"]))
def test_noise_holds_no_text(seed, dtype):
    frame = np.random.default_rng(seed).integers(0, 200, (96, 96)).astype(dtype)
    assert not has_lettering(frame)


def test_real_images_without_text_pass(dicom_dir):
    folders = ("ct_siemens", "ct_philips_ing", "mr_ge", "mr_toshiba", "mr_uih", "mr_siemens")
    num_seen = 0
    for folder in sorted(dicom_dir.iterdir()):
        if folder.name.startswith(folders):
            files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
            for file in [f for f in files if f.read_bytes()[128:132] == b"DICM"][::5]:
                try:
                    assert not shows_text(dcmread(file)), folder.name
                except NoDecoder:
                    continue
                num_seen += 1
    assert num_seen > 50


def encapsulated(codestream: bytes) -> bytes:
    codestream += b"\0" * (len(codestream) % 2)
    head = b"\xfe\xff\x00\xe0"
    return head + bytes(4) + head + len(codestream).to_bytes(4, "little") + codestream


def test_comments_of_a_jpeg_are_blanked_and_its_pixels_stay():
    stream = io.BytesIO()
    exif = b"Exif\0\0OKAFOR"
    picture = Image.fromarray(anatomy(1, "<u2", 64).astype(np.uint8))
    picture.save(stream, "JPEG", comment=b"seen OKAFOR", exif=exif)
    plain = encapsulated(stream.getvalue() + b"OKAFOR")
    cleaned = without_comments(plain)
    assert plain.count(b"OKAFOR") == 3
    assert b"OKAFOR" not in cleaned
    assert len(cleaned) == len(plain)
    before, after = (Image.open(io.BytesIO(found[16:])) for found in (plain, cleaned))
    assert np.array_equal(np.array(before), np.array(after))


def test_comments_of_a_jpeg_2000_are_blanked_and_its_pixels_stay():
    stream = io.BytesIO()
    picture = Image.fromarray(anatomy(1, "<u2", 64).astype(np.uint8))
    picture.save(stream, "JPEG2000", no_jp2=True, comment="seen OKAFOR")
    plain = encapsulated(stream.getvalue())
    cleaned = without_comments(plain)
    assert b"OKAFOR" in plain
    assert b"OKAFOR" not in cleaned
    before, after = (Image.open(io.BytesIO(found[16:])) for found in (plain, cleaned))
    assert np.array_equal(np.array(before), np.array(after))


def test_items_that_cannot_be_followed_are_an_error():
    with pytest.raises(ValueError, match="whole items"):
        without_comments(b"\xfe\xff\x00\xe0\xff\0\0\0abc")

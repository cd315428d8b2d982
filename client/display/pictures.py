"""Pictures of slices: sheets for the page, and key images with what they are written into them.

For the page every value becomes one of 256 levels, so that the page can choose its window. In CT
most levels lie where soft tissue is (one in about 3 HU), few where only air and metal are.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.display.base import Result
from client.display.prediction import Legend, Preset, Sheets
from client.display.study import Study
from shared_models.plan import StudyPlan

Pixels = NDArray[np.uint8]
WARNING = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"
#: HU of some of the 256 levels; straight in between.
CT_LEVELS = {0: -1024.0, 62: -200.0, 212: 300.0, 245: 1500.0, 255: 3071.0}
#: Windows in HU, as radiologists know them: name, centre, width.
CT_WINDOWS = (
    ("Soft tissue", 40, 400),
    ("Lung", -600, 1500),
    ("Bone", 400, 1800),
    ("Liver", 60, 160),
    ("Brain", 40, 80),
)
MOST_PIXELS = 16_000_000
MOST_LOSSLESS_PIXELS = 2_000_000
MOST_SHEET = 4096
BLOCK = 8  # JPEG's; no block may hold two tiles
JPEG_QUALITY = 92
KEY_WIDTH = 640
OPACITY = 0.45


def sheets(study: Study, result: Result, *, plan: StudyPlan) -> Sheets:
    """Return all slices as the page shows them, smaller where the whole would be too large."""
    data = study.shown.data
    levels, unit = _levels(study)
    rows, columns = _shown_size(data.shape)
    places = _tiling(data.shape[0], rows, columns)
    is_small = data.shape[0] * rows * columns <= MOST_LOSSLESS_PIXELS
    encode = _png if is_small else _jpeg
    images = [_resized(_encoded(plane, levels), rows, columns) for plane in data]
    _, y, x = study.shown.spacing_mm
    labels = result.labels
    return Sheets(
        image_type="png" if is_small else "jpeg",
        images=tuple(_base64(encode(s)) for s in _sheets(images, places)),
        overlays=()
        if labels is None
        else tuple(
            _base64(_png(s))
            for s in _sheets([_nearest(plane, rows, columns) for plane in labels], places)
        ),
        rows=rows,
        columns=columns,
        tile_rows=places[0],
        tile_columns=places[1],
        across=places[2],
        down=places[3],
        levels=tuple(round(float(level), 4) for level in levels),
        unit=unit,
        presets=_presets(study, plan),
        height_per_width=round(data.shape[1] * y / (data.shape[2] * x), 6),
        first_shown=result.key_slices[0],
    )


def plain_picture(study: Study, result: Result) -> str:
    """Return the first key slice with what is painted over it, as a JPEG in base64."""
    return _base64(_jpeg(np.asarray(_painted(study, result, result.key_slices[0]))))


def key_image(study: Study, result: Result, slice_: int, *, lines: Sequence[str]) -> Pixels:
    """Return one slice as a picture, uint8 (y, x, 3), with a warning above and ``lines`` below.

    No identifier is written into it.
    """
    return _captioned(_painted(study, result, slice_), lines, result.legend)


def _painted(study: Study, result: Result, slice_: int) -> Any:
    """Return a slice through the first window, tinted, as a picture with square pixels."""
    from PIL import Image

    window = _windows(study)[0]
    plane = study.shown.data[slice_]
    grey = np.clip((plane - window.centre) / window.width + 0.5, 0, 1) * 255
    colours = np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)
    if result.labels is not None:
        _tint(colours, result.labels[slice_], result.legend)
    _, y, x = study.shown.spacing_mm
    height = max(1, round(KEY_WIDTH * plane.shape[0] * y / (plane.shape[1] * x)))
    picture = Image.fromarray(colours.round().astype(np.uint8))
    return picture.resize((KEY_WIDTH, height), Image.Resampling.BICUBIC)


def _captioned(picture: Any, lines: Sequence[str], legend: Sequence[Legend]) -> Pixels:
    from PIL import Image, ImageDraw, ImageFont

    bold, small = ImageFont.load_default(size=22), ImageFont.load_default(size=15)
    top, line = 36, 22
    rows = [*lines, *(one.name for one in legend)]
    whole = Image.new("RGB", (picture.width, picture.height + 2 * top + line * len(rows) + 14))
    whole.paste(picture, (0, top))
    draw = ImageDraw.Draw(whole)
    for place in (top / 2, top * 1.5 + picture.height):
        draw.text((picture.width / 2, place), WARNING, "#ffd54a", font=bold, anchor="mm")
    for number, text in enumerate(rows):
        y = picture.height + 2 * top + 4 + number * line
        indent = 14
        if number >= len(lines):
            draw.rectangle((14, y + 3, 28, y + 15), fill=legend[number - len(lines)].colour)
            indent = 38
        draw.text((indent, y), _plain(text), "#e8edf1", font=small)
    return np.asarray(whole, np.uint8)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:80]


def _tint(
    colours: NDArray[np.float32], labels: NDArray[np.uint8], legend: Sequence[Legend]
) -> None:
    for number, one in enumerate(legend, 1):
        is_here = labels == number
        colour = np.array([int(one.colour[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
        colours[is_here] = (1 - OPACITY) * colours[is_here] + OPACITY * colour


def _levels(study: Study) -> tuple[NDArray[np.float64], str]:
    if study.shown.modality == "CT":
        return np.interp(np.arange(256), list(CT_LEVELS), list(CT_LEVELS.values())), "HU"
    low, high = _percentiles(study, (0.05, 99.95))
    return np.linspace(low, high, 256), ""


def _percentiles(study: Study, percents: tuple[float, float]) -> tuple[float, float]:
    data = study.shown.data
    some = data.ravel()[:: max(1, data.size // 1_000_000)]
    low, high = (float(value) for value in np.percentile(some, percents))
    return low, max(high, low + 1e-3 * max(1.0, abs(low)))


def _windows(study: Study) -> tuple[Preset, ...]:
    if study.shown.modality == "CT":
        return tuple(Preset(name=n, centre=c, width=w) for n, c, w in CT_WINDOWS)
    chosen = (("Usual", (1.0, 99.0)), ("More contrast", (5.0, 95.0)), ("Everything", (0.05, 99.95)))
    return tuple(_between(name, *_percentiles(study, percents)) for name, percents in chosen)


def _presets(study: Study, plan: StudyPlan) -> tuple[Preset, ...]:
    """Return the windows to choose from, among them the one through which the model looks."""
    steps = [step for step in plan.imaging if step.name == "window"]
    model = [
        _between("As the model sees it", *(float(str(step.params[k])) for k in ("low", "high")))
        for step in steps[:1]
    ]
    return (*_windows(study), *model)


def _between(name: str, low: float, high: float) -> Preset:
    return Preset(
        name=name, centre=round((low + high) / 2, 4), width=round(max(high - low, 1e-4), 4)
    )


def _encoded(plane: NDArray[np.float32], levels: NDArray[np.float64]) -> Pixels:
    return np.rint(np.interp(plane, levels, np.arange(256))).astype(np.uint8)


def _shown_size(shape: tuple[int, ...]) -> tuple[int, int]:
    scale = min(1.0, (MOST_PIXELS / float(np.prod(shape))) ** 0.5)
    return max(1, round(shape[1] * scale)), max(1, round(shape[2] * scale))


def _tiling(num_slices: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return a tile's rows and columns, and how many of them lie across and down a sheet."""
    tall, wide = (-(-n // BLOCK) * BLOCK for n in (rows, columns))
    across = max(1, min(MOST_SHEET // wide, round(num_slices**0.5) or 1))
    down = max(1, min(MOST_SHEET // tall, -(-num_slices // across)))
    return tall, wide, across, down


def _sheets(tiles: Sequence[Pixels], places: tuple[int, int, int, int]) -> list[Pixels]:
    tall, wide, across, down = places
    found = []
    for start in range(0, len(tiles), across * down):
        sheet = np.zeros((down * tall, across * wide), np.uint8)
        for number, tile in enumerate(tiles[start : start + across * down]):
            y, x = number // across * tall, number % across * wide
            border = ((0, tall - tile.shape[0]), (0, wide - tile.shape[1]))
            sheet[y : y + tall, x : x + wide] = np.pad(tile, border, mode="edge")
        found.append(sheet)
    return found


def _resized(plane: Pixels, rows: int, columns: int) -> Pixels:
    from PIL import Image

    if plane.shape == (rows, columns):
        return plane
    picture = Image.fromarray(plane).resize((columns, rows), Image.Resampling.BOX)
    return np.asarray(picture, np.uint8)


def _nearest(plane: Pixels, rows: int, columns: int) -> Pixels:
    from PIL import Image

    picture = Image.fromarray(plane).resize((columns, rows), Image.Resampling.NEAREST)
    return np.asarray(picture, np.uint8)


def _png(pixels: Pixels) -> bytes:
    return _saved(pixels, "PNG", optimize=True)


def _jpeg(pixels: Pixels) -> bytes:
    return _saved(pixels, "JPEG", quality=JPEG_QUALITY)


def _saved(pixels: Pixels, format_: str, **options: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format_, **options)
    return buffer.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()

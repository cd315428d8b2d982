"""Draw every imaging step before and after, on a phantom: docs/imaging-steps.png.

    python tests/bench/steps.py [--out docs/imaging-steps.png]

The phantom is a CT slice of a made-up abdomen. Where a step is for another kind of image, the slice
is spoilt first in the way the step is for: noise, a coil's uneven gain, too little contrast, or the
wrong one.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shared_models import phantoms
from shared_models.imaging import pipeline
from shared_models.volume import Volume, read_volume

TILE, GAP, WORDS, COLUMNS = 150, 12, 34, 4
NOISY, UNEVEN, FAINT, NEGATIVE = "noisy", "uneven", "faint", "negative"

STEPS = [
    ("orient", {"axes": "RAS"}, ""),
    ("crop-box", {"low": [0.15, 0.1], "high": [0.85, 0.6]}, ""),
    ("crop-foreground", {}, ""),
    ("crop-or-pad", {"size": [64, 128]}, ""),
    ("resample", {"spacing_mm": [8.0, 8.0]}, ""),
    ("resize", {"size": [96, 48]}, ""),
    ("window", {"low": -50.0, "high": 200.0}, ""),
    ("percentiles", {"low": 30.0, "high": 99.5}, ""),
    ("min-max", {}, ""),
    ("standardize", {}, ""),
    ("landmarks", {"percents": [1, 50, 75, 99], "values": [0, 10, 70, 100]}, FAINT),
    ("bright-foreground", {}, NEGATIVE),
    ("gamma", {"gamma": 2.0}, ""),
    ("equalize", {}, FAINT),
    ("clahe", {"tiles": 4, "clip": 0.02}, FAINT),
    ("gaussian", {"sigma_mm": 3.0}, NOISY),
    ("median", {"radius": 1}, NOISY),
    ("bilateral", {"sigma_mm": 6.0, "strength": 3.0}, NOISY),
    ("non-local-means", {}, NOISY),
    ("bias-field", {}, UNEVEN),
]


#: Steps after which values have another scale: shown from the least to the greatest.
RESCALING = {"window", "percentiles", "min-max", "standardize", "landmarks"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/imaging-steps.png"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (site, *_) = phantoms.write_hospitals(Path(folder), seed=3, num_patients=20)
        series = sorted({file.parent for file in site.rglob("*.dcm")})[0]
        whole = read_volume(series)
    middle = whole.data.shape[0] // 2
    drawn = [pair(whole, middle, *step) for step in STEPS]
    width, height = 2 * TILE + 3 * GAP, TILE + WORDS
    rows = -(-len(drawn) // COLUMNS)
    sheet = Image.new("L", (COLUMNS * width + GAP, rows * height + GAP), 255)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, ((name, _, _), tiles) in enumerate(zip(STEPS, drawn, strict=True)):
        x, y = GAP + number % COLUMNS * width, GAP + number // COLUMNS * height
        pen.text((x, y), name, fill=30, font=font)
        for part, tile in enumerate(tiles):
            sheet.paste(tile, (x + part * (TILE + GAP // 2), y + 18))
    sheet.save(args.out, optimize=True)
    print(args.out)


def pair(
    whole: Volume, middle: int, name: str, params: dict, kind: str
) -> tuple[Image.Image, Image.Image]:
    """Return the middle slice before and after."""
    image = whole._replace(data=spoilt(whole.data, kind))
    after, _ = pipeline([(name, params)])(image)
    low, high = shown_range(image.data, kind)
    is_rescaled = name in RESCALING
    low_after, high_after = (after.data.min(), after.data.max()) if is_rescaled else (low, high)
    depth = min(middle, after.data.shape[0] - 1)
    return tile(image.data[middle], low, high), tile(after.data[depth], low_after, high_after)


def spoilt(data: np.ndarray, kind: str) -> np.ndarray:
    draw = np.random.default_rng(0)
    if kind == NOISY:
        return (data + draw.normal(0, 60, data.shape)).astype(np.float32)
    if kind == NEGATIVE:
        return np.clip(50 - data, -300, 350).astype(np.float32)
    bright = np.clip(data + 1000, 0, None)
    x = np.linspace(-1, 1, data.shape[2])
    if kind == UNEVEN:
        return (bright * np.exp(0.9 * x)[None, None, :]).astype(np.float32)
    return data


def shown_range(data: np.ndarray, kind: str) -> tuple[float, float]:
    if kind == FAINT:
        return float(data.min()), float(data.max()) * 2.5
    if kind == UNEVEN:
        return 0.0, float(np.percentile(data, 99.8))
    return -300.0, 350.0


def tile(plane: np.ndarray, low: float, high: float) -> Image.Image:
    grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1) * 255
    picture = Image.fromarray(grey.astype(np.uint8))
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    square = Image.new("L", (TILE, TILE), 235)
    square.paste(picture.resize(size, Image.Resampling.NEAREST))
    return square


if __name__ == "__main__":
    main()

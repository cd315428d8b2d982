"""Draws an abdomen in Hounsfield units, with its label map.

Every structure is an ellipse in each slice, with a soft edge of one pixel, painted over the
earlier ones. Lengths are mm in a body of reference, x to the patient's left and y to the back.

Design: arrays see arithmetic and square roots only, whose results are the same on every processor.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared_models.phantoms.profiles import HospitalProfile

BACKGROUND, ORGAN, LESION = 0, 1, 2
AIR_HU = -1000.0
VESSEL_HU = 45.0  # above the organ
LESION_HU = 140.0  # above the organ
LESION_RADIUS_MM = (10.0, 15.0)
NUM_VESSELS = 6
TEXTURE_HU = 6.0

Volume = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Box = tuple[slice, slice, slice]


class Grid(NamedTuple):
    """The voxels of a series; `origin_mm` is the centre of the first voxel (x, y, z), LPS."""

    num_slices: int
    size: int
    spacing_mm: float
    thickness_mm: float
    origin_mm: tuple[float, float, float]


class Ellipse(NamedTuple):
    """An ellipse in every slice; at height u in [-1, 1] it has moved and grown.

    Its centre is `centre_mm + u * drift_mm`,
    its half axes are `half_mm * (1 + slope * u - taper * u**2)`.
    """

    centre_mm: tuple[float, float]
    half_mm: tuple[float, float]
    hu: float
    slope: float = 0.0
    taper: float = 0.0
    drift_mm: tuple[float, float] = (0.0, 0.0)


RIBS = tuple(
    Ellipse((105 * math.cos(math.radians(angle)), 74 * math.sin(math.radians(angle))), (5, 4), 200)
    for angle in (-150, -115, -65, -30, 5, 40, 140, 175)
)
BODY = (
    Ellipse((0, 0), (128, 95), -95),  # skin and fat
    Ellipse((0, 0), (111, 80), 55),  # muscle
    Ellipse((0, -4), (98, 65), -85),  # fat around the organs
    *RIBS,
    Ellipse((-58, 36), (36, 24), -850, slope=0.25),  # right lung
    Ellipse((58, 30), (38, 30), -850, slope=0.25),  # left lung
    Ellipse((-26, 66), (20, 13), 60),  # muscles of the back
    Ellipse((26, 66), (20, 13), 60),
    Ellipse((50, -24), (30, 24), 25, taper=0.2),  # stomach
    Ellipse((48, -36), (15, 7), -800, taper=0.3),  # its gas
    Ellipse((74, 24), (17, 26), 100, taper=0.2),  # spleen
    Ellipse((0, 78), (4, 10), 190),  # spine, canal
    Ellipse((0, 46), (19, 15), 170),
    Ellipse((0, 65), (8, 7), 35),
    Ellipse((14, 24), (9, 9), 150, drift_mm=(2, 0)),  # aorta
    Ellipse((-14, 20), (10, 8), 120),  # vena cava
)
RIGHT_LOBE = Ellipse((-45, -8), (51, 50), 0, slope=0.04, taper=0.08)
LEFT_LOBE = Ellipse((4, -34), (46, 23), 0, slope=0.08, taper=0.12)


class Scan(NamedTuple):
    """hu: float32 (z, y, x), HU, LPS; labels: uint8, the same voxels, 0 / 1 organ / 2 lesion."""

    hu: Volume
    labels: Labels


class Build(NamedTuple):
    """How much bodies differ: the range of their size, and how far off the centre they lie."""

    scale: tuple[float, float]
    shift_mm: tuple[float, float]


USUAL = Build((0.9, 1.06), (8.0, 6.0))
#: Bodies that lie anywhere: where an organ is cannot be guessed from where it usually is.
ANYWHERE = Build((0.72, 1.0), (32.0, 28.0))


def draw_scan(
    profile: HospitalProfile,
    grid: Grid,
    *,
    has_lesion: bool,
    rng: np.random.Generator,
    lesion_rng: np.random.Generator,
) -> Scan:
    """Return the picture one patient gets at one hospital.

    The lesion has a generator of its own, so that a patient is the same person with and without.
    """
    scan = draw_body(profile, grid, has_lesion=has_lesion, rng=rng, lesion_rng=lesion_rng)
    return scan._replace(hu=_acquire(scan.hu, profile, rng=rng))


def draw_body(
    profile: HospitalProfile,
    grid: Grid,
    *,
    has_lesion: bool,
    rng: np.random.Generator,
    lesion_rng: np.random.Generator,
    build: Build = USUAL,
    lesion_growth: float = 1.0,
) -> Scan:
    """Return the patient as no scanner sees one: without noise."""
    scale = rng.uniform(*build.scale)
    x_mm, y_mm = build.shift_mm
    shift_mm = (rng.uniform(-x_mm, x_mm), rng.uniform(-y_mm, y_mm))

    def place(ellipse: Ellipse) -> Ellipse:
        return _place(_vary(ellipse, rng), scale=scale, shift_mm=shift_mm)

    hu = np.full((grid.num_slices, grid.size, grid.size), AIR_HU, np.float32)
    for ellipse in BODY:
        _paint(hu, *_cover(grid, place(ellipse)), hu=ellipse.hu)
    lobe = place(RIGHT_LOBE)
    organ = np.zeros_like(hu)
    for part in (lobe, place(LEFT_LOBE)):
        box, covered = _cover(grid, part)
        np.maximum(organ[box], covered, out=organ[box])
    organ_hu = profile.organ_hu + rng.uniform(-10, 10)
    inside = _box(organ)
    texture = _texture(grid, rng, inside)
    _paint(hu, inside, organ[inside], hu=organ_hu + TEXTURE_HU * texture)
    for _ in range(NUM_VESSELS):
        vessel = _draw_blob(lobe, rng, radius_mm=rng.uniform(2.5, 4.5))
        box, covered = _cover(grid, vessel)
        _paint(hu, box, covered * organ[box], hu=organ_hu + VESSEL_HU)
    labels = np.where(organ >= 0.5, ORGAN, BACKGROUND).astype(np.uint8)
    if has_lesion:
        radius_mm = lesion_growth * lesion_rng.uniform(*LESION_RADIUS_MM)
        lesion = _draw_blob(lobe, lesion_rng, radius_mm=radius_mm)
        box, covered = _cover(grid, lesion)
        covered = covered * organ[box]
        _paint(hu, box, covered, hu=organ_hu + LESION_HU)
        labels[box][covered >= 0.5] = LESION
    return Scan(hu, labels)


def _vary(ellipse: Ellipse, rng: np.random.Generator) -> Ellipse:
    x, y = ellipse.centre_mm
    growth = rng.uniform(0.95, 1.05)
    return ellipse._replace(
        centre_mm=(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)),
        half_mm=(ellipse.half_mm[0] * growth, ellipse.half_mm[1] * growth),
    )


def _place(ellipse: Ellipse, *, scale: float, shift_mm: tuple[float, float]) -> Ellipse:
    (x, y), (a, b) = ellipse.centre_mm, ellipse.half_mm
    centre_mm = (x * scale + shift_mm[0], y * scale + shift_mm[1])
    return ellipse._replace(centre_mm=centre_mm, half_mm=(a * scale, b * scale))


def _draw_blob(host: Ellipse, rng: np.random.Generator, *, radius_mm: float) -> Ellipse:
    """Return a blob through all slices, anywhere inside the host."""
    angle, distance = rng.uniform(0, 2 * math.pi), math.sqrt(rng.uniform(0, 1))
    room_mm = [0.88 * half - radius_mm - 2 for half in host.half_mm]
    x = host.centre_mm[0] + room_mm[0] * distance * math.cos(angle)
    y = host.centre_mm[1] + room_mm[1] * distance * math.sin(angle)
    stretch = rng.uniform(0.9, 1.1)
    return Ellipse(
        (x, y),
        (radius_mm * stretch, radius_mm / stretch),
        0,
        taper=0.25,
        drift_mm=(rng.uniform(-2, 2), rng.uniform(-2, 2)),
    )


def _cover(grid: Grid, ellipse: Ellipse) -> tuple[Box, Volume]:
    """Return a box and how much of each voxel in it lies inside, 0 to 1; outside it none does."""
    at_mm = (np.arange(grid.size) - (grid.size - 1) / 2) * grid.spacing_mm
    u = np.linspace(-1, 1, grid.num_slices)[:, None]
    growth = 1 + ellipse.slope * u - ellipse.taper * u * u
    a, b = ellipse.half_mm[0] * growth, ellipse.half_mm[1] * growth
    x_mm, y_mm = (c + u * d for c, d in zip(ellipse.centre_mm, ellipse.drift_mm, strict=True))
    columns = _reach(at_mm, x_mm, a * (1 + grid.spacing_mm / np.minimum(a, b)))
    rows = _reach(at_mm, y_mm, b * (1 + grid.spacing_mm / np.minimum(a, b)))
    x = (at_mm[columns] - ellipse.centre_mm[0] - u * ellipse.drift_mm[0]) / a  # (z, x)
    y = (at_mm[rows] - ellipse.centre_mm[1] - u * ellipse.drift_mm[1]) / b  # (z, y)
    radius = (x * x).astype(np.float32)[:, None] + (y * y).astype(np.float32)[:, :, None]
    np.sqrt(radius, out=radius)
    edge = (np.minimum(a, b) / grid.spacing_mm).astype(np.float32)[:, :, None]
    covered: Volume = np.subtract(1, radius, out=radius)
    covered *= edge
    covered += np.float32(0.5)
    return (slice(None), rows, columns), np.clip(covered, 0, 1, out=covered)


def _reach(at_mm: Any, centre_mm: Any, half_mm: Any) -> slice:
    """Return the indices between the lowest and the highest point of an ellipse, in any slice."""
    lowest, highest = (centre_mm - half_mm).min(), (centre_mm + half_mm).max()
    return slice(*np.searchsorted(at_mm, (lowest, highest)))


def _box(covered: Volume) -> Box:
    """Return the rows and columns in which anything is covered."""
    rows, columns = (np.flatnonzero(covered.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    if not rows.size:
        return slice(None), slice(0, 0), slice(0, 0)
    return slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _paint(volume: Volume, box: Box, covered: Volume, *, hu: float | Volume) -> None:
    part = volume[box]
    change = np.float32(hu) - part
    change *= covered
    part += change


def _texture(grid: Grid, rng: np.random.Generator, box: Box) -> Volume:
    """Return smooth blotches of about four pixels, mean 0 and standard deviation about 1."""
    coarse = -(-grid.size // 4)
    blotches = rng.standard_normal((grid.num_slices, coarse, coarse), np.float32)
    rows, columns = (np.arange(s.start - 1, s.stop + 1).clip(0, grid.size - 1) for s in box[1:])
    fine = blotches[:, (rows // 4)[:, None], columns // 4]
    return _filter(fine, 0.25)[:, 1:-1, 1:-1]


def _acquire(hu: Volume, profile: HospitalProfile, *, rng: np.random.Generator) -> Volume:
    """Return the picture as the scanner sees it: filtered, with noise of the profile's strength."""
    return _filter(hu + _noise(hu.shape, profile, rng), profile.kernel_weight)


def draw_noise(
    shape: tuple[int, ...], profile: HospitalProfile, rng: np.random.Generator
) -> Volume:
    """Return noise as the scanner's kernel leaves it, in HU."""
    return _filter(_noise(shape, profile, rng), profile.kernel_weight)


def _noise(shape: tuple[int, ...], profile: HospitalProfile, rng: np.random.Generator) -> Volume:
    weight = profile.kernel_weight
    gain = (1 - 2 * weight) ** 2 + 2 * weight**2  # of white noise filtered along two axes
    return rng.standard_normal(shape, np.float32) * np.float32(profile.noise_hu / gain)


def _filter(volume: Volume, weight: float) -> Volume:
    """Filter y and x with (weight, 1 - 2 weight, weight)."""
    side, middle = np.float32(weight), np.float32(1.0 - 2.0 * weight)
    wide = np.pad(volume, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows: Volume = side * (wide[:, :-2] + wide[:, 2:]) + middle * wide[:, 1:-1]
    filtered: Volume = side * (rows[:, :, :-2] + rows[:, :, 2:]) + middle * rows[:, :, 1:-1]
    return filtered

"""Steps that change an image's values, voxel by voxel or by the image's own histogram."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared_models.imaging import Step, on_values

Array = NDArray[np.float32]


def window(*, low: float, high: float) -> Step:
    """Map ``low`` to -1 and ``high`` to 1, clipping outside; for CT in HU."""
    if not low < high:
        raise ValueError(f"expected low < high, got {low} and {high}")
    return on_values(lambda data: _windowed(data, low, high))


def standardize(*, mean: float | None = None, deviation: float | None = None) -> Step:
    """Subtract a mean and divide by a standard deviation: each volume's own, or the plan's."""
    if (mean is None) != (deviation is None):
        raise ValueError("expected mean and deviation together, or neither")
    if deviation is not None and not deviation > 0:
        raise ValueError(f"expected a deviation over 0, got {deviation}")

    def change(data: Array) -> Array:
        centre = data.mean() if mean is None else np.float32(mean)
        spread = data.std() if deviation is None else deviation
        return (data - np.float32(centre)) / np.float32(max(float(spread), 1e-6))

    return on_values(change)


def min_max() -> Step:
    """Map each volume's least value to -1 and its greatest to 1."""
    return on_values(lambda data: _windowed(data, *_range_of(data)))


def percentiles(*, low: float = 1.0, high: float = 99.0) -> Step:
    """Map each volume's ``low`` and ``high`` percentile to -1 and 1, clipping outside."""
    if not 0 <= low < high <= 100:
        raise ValueError(f"expected 0 <= low < high <= 100, got {low} and {high}")

    def change(data: Array) -> Array:
        bottom, top = (float(v) for v in np.percentile(data, (low, high)))
        return _windowed(data, bottom, max(top, bottom + 1e-6))

    return on_values(change)


def landmarks(*, percents: Sequence[float], values: Sequence[float]) -> Step:
    """Map each volume's percentiles ``percents`` to the plan's ``values``, straight in between.

    Values beyond the first and last landmark are clipped. For MR, whose units are each scanner's
    own; the values are those of a standard histogram agreed on beforehand.

    References:
        Nyul, Udupa and Zhang 2000, New variants of a method of MRI scale standardization.
    """
    if len(percents) != len(values) or len(percents) < 2:
        raise ValueError("expected as many percents as values, at least two of each")
    if not (_is_rising(percents) and _is_rising(values)) or percents[0] < 0 or percents[-1] > 100:
        raise ValueError("expected rising percents from 0 to 100, and rising values")

    def change(data: Array) -> Array:
        found = np.percentile(data, percents)
        # a volume that is constant between two landmarks must still map somewhere
        found = np.maximum.accumulate(found + 1e-6 * np.arange(len(found)))
        return np.interp(data, found, values).astype(np.float32)

    return on_values(change)


def bright_foreground() -> Step:
    """Turn each volume bright on dark: one most of which is bright is inverted, its range kept.

    Most of it is bright where the median is over the middle of the range. For sites of one contrast
    among sites of the other, such as stained tissue among fluorescence: an average of networks that
    learned both fits neither.
    """

    def change(data: Array) -> Array:
        low, high = _range_of(data)
        is_dark_on_bright = float(np.median(data)) > (low + high) / 2
        return np.float32(low) + (np.float32(high) - data) if is_dark_on_bright else data

    return on_values(change)


def gamma(*, gamma: float) -> Step:
    """Raise values to the power ``gamma``, each volume's range taken as 0 to 1 and kept.

    Under 1 brightens what is dark, over 1 darkens it.
    """
    if not gamma > 0:
        raise ValueError(f"expected a gamma over 0, got {gamma}")

    def change(data: Array) -> Array:
        low, high = _range_of(data)
        return low + (high - low) * _unit(data) ** np.float32(gamma)

    return on_values(change)


def equalize(*, bins: int = 256) -> Step:
    """Spread each volume's histogram evenly over its own range."""
    if bins < 2:
        raise ValueError(f"expected at least 2 bins, got {bins}")

    def change(data: Array) -> Array:
        from skimage.exposure import equalize_hist

        low, high = _range_of(data)
        even: Array = equalize_hist(_unit(data), nbins=bins).astype(np.float32)
        return low + (high - low) * even

    return on_values(change)


def clahe(*, tiles: int = 8, clip: float = 0.01) -> Step:
    """Equalize each slice locally, in ``tiles`` by ``tiles`` parts, contrast limited by ``clip``.

    The volume's own range is kept. ``clip`` is a part of a tile's pixels, in (0, 1]: the more, the
    more contrast and noise.

    References:
        Zuiderveld 1994, Contrast limited adaptive histogram equalization.
    """
    if tiles < 1 or not 0 < clip <= 1:
        raise ValueError(f"expected tiles of at least 1 and 0 < clip <= 1, got {tiles} and {clip}")

    def change(data: Array) -> Array:
        from skimage.exposure import equalize_adapthist

        low, high = _range_of(data)
        kernel = [max(1, n // tiles) for n in data.shape[1:]]
        slices = [
            equalize_adapthist(plane, kernel_size=kernel, clip_limit=clip) for plane in _unit(data)
        ]
        return low + (high - low) * np.stack(slices).astype(np.float32)

    return on_values(change)


def _windowed(data: Array, low: float, high: float) -> Array:
    return (np.clip(data, low, high) - np.float32(low)) * np.float32(2 / (high - low)) - 1


def _range_of(data: Array) -> tuple[float, float]:
    """Return the least and the greatest value, apart even where the image is of one value."""
    low, high = float(data.min()), float(data.max())
    return low, max(high, low + 1e-6)


def _unit(data: Array) -> Array:
    low, high = _range_of(data)
    unit: Array = np.clip((data - np.float32(low)) / np.float32(high - low), 0, 1)
    return unit


def _is_rising(numbers: Sequence[float]) -> bool:
    return bool(np.all(np.diff(numbers) > 0))

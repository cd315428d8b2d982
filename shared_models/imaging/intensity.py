"""Steps that change intensities; labels pass through untouched."""

from __future__ import annotations

import numpy as np

from shared_models.imaging import Step
from shared_models.volume import Volume


def window(*, low: float, high: float) -> Step:
    """Map ``low`` to -1 and ``high`` to 1, clipping outside; for CT in HU."""
    if not low < high:
        raise ValueError(f"expected low < high, got {low} and {high}")

    def step(volume: Volume, *, is_label: bool) -> Volume:
        if is_label:
            return volume
        data = (np.clip(volume.data, low, high) - low) * np.float32(2 / (high - low)) - 1
        return volume._replace(data=data.astype(np.float32, copy=False))

    return step


def standardize() -> Step:
    """Subtract each volume's mean and divide by its standard deviation (z-score)."""

    def step(volume: Volume, *, is_label: bool) -> Volume:
        if is_label:
            return volume
        spread = max(float(volume.data.std()), 1e-6)
        data = (volume.data - volume.data.mean()) / np.float32(spread)
        return volume._replace(data=data.astype(np.float32, copy=False))

    return step


def percentiles(*, low: float = 1.0, high: float = 99.0) -> Step:
    """Map each volume's ``low`` and ``high`` percentile to -1 and 1, clipping outside."""
    if not 0 <= low < high <= 100:
        raise ValueError(f"expected 0 <= low < high <= 100, got {low} and {high}")

    def step(volume: Volume, *, is_label: bool) -> Volume:
        if is_label:
            return volume
        bottom, top = (float(v) for v in np.percentile(volume.data, (low, high)))
        return window(low=bottom, high=max(top, bottom + 1e-6))(volume, is_label=False)

    return step

"""Pure functions from volume to volume, chosen by name in the plan and run in its order.

A step is made from its parameters and then called with a volume; ``is_label`` says that the volume
holds class numbers, for which geometry uses the nearest voxel and intensities are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from shared_models.registry import find
from shared_models.volume import Volume


class Step(Protocol):
    """One preprocessing step."""

    def __call__(self, volume: Volume, *, is_label: bool) -> Volume:
        """Return a new volume; ``volume`` is left alone."""


BUILTIN = {
    "crop-or-pad": "shared_models.imaging.geometry:crop_or_pad",
    "resample": "shared_models.imaging.geometry:resample",
    "resize": "shared_models.imaging.geometry:resize",
    "window": "shared_models.imaging.intensity:window",
    "standardize": "shared_models.imaging.intensity:standardize",
    "percentiles": "shared_models.imaging.intensity:percentiles",
}


def pipeline(
    steps: Sequence[tuple[str, dict[str, Any]]], *, plugins: Collection[str] = ()
) -> Callable[..., Volume]:
    """Return one step that runs ``(name, params)`` pairs in order.

    Raises:
        ValueError: if a name or a parameter is unknown.
    """
    made: list[Step] = [
        find("steps", name, builtin=BUILTIN, plugins=plugins)(**params) for name, params in steps
    ]

    def run(volume: Volume, *, is_label: bool = False) -> Volume:
        for step in made:
            volume = step(volume, is_label=is_label)
        return volume

    return run

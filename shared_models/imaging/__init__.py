"""Pure functions from volume to volume, chosen by name in the plan and run in its order.

A step is made from its parameters, then called with an image and, if there is one, the label map on
the same grid, and returns both: what moves one moves the other, what changes values leaves labels
alone. Steps take each volume by itself. None looks at other patients' images, so that a patient's
gradient stays that patient's own; a mean over a site's patients is therefore no step, and a fixed
one stands in the plan.

Guarantees:
    The arguments are left alone.
    Image and label map stay on one grid; a label map keeps its classes.
    What becomes of a volume does not depend on those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_models.registry import find
from shared_models.volume import Volume

#: An image and its label map, on one grid.
Pair = tuple[Volume, Volume | None]
Step = Callable[..., Pair]

BUILTIN = {
    "crop-box": "shared_models.imaging.geometry:crop_box",
    "crop-foreground": "shared_models.imaging.geometry:crop_foreground",
    "crop-lungs": "shared_models.imaging.geometry:crop_lungs",
    "crop-or-pad": "shared_models.imaging.geometry:crop_or_pad",
    "orient": "shared_models.imaging.geometry:orient",
    "resample": "shared_models.imaging.geometry:resample",
    "resize": "shared_models.imaging.geometry:resize",
    "bias-field": "shared_models.imaging.denoising:bias_field",
    "bilateral": "shared_models.imaging.denoising:bilateral",
    "gaussian": "shared_models.imaging.denoising:gaussian",
    "median": "shared_models.imaging.denoising:median",
    "non-local-means": "shared_models.imaging.denoising:non_local_means",
    "bright-foreground": "shared_models.imaging.intensity:bright_foreground",
    "clahe": "shared_models.imaging.intensity:clahe",
    "equalize": "shared_models.imaging.intensity:equalize",
    "gamma": "shared_models.imaging.intensity:gamma",
    "landmarks": "shared_models.imaging.intensity:landmarks",
    "min-max": "shared_models.imaging.intensity:min_max",
    "percentiles": "shared_models.imaging.intensity:percentiles",
    "standardize": "shared_models.imaging.intensity:standardize",
    "window": "shared_models.imaging.intensity:window",
}


def on_values(change: Callable[[NDArray[np.float32]], NDArray[Any]]) -> Step:
    """Return the step that changes an image's values (z, y, x) and leaves its label map alone."""
    return on_image(lambda image: change(image.data))


def on_image(change: Callable[[Volume], NDArray[Any]]) -> Step:
    """Return the step that gives an image new values (z, y, x), which may depend on its spacing."""

    def step(image: Volume, label: Volume | None = None) -> Pair:
        return image._replace(data=np.ascontiguousarray(change(image), dtype=np.float32)), label

    return step


def made(
    steps: Sequence[tuple[str, dict[str, Any]]], *, plugins: Collection[str] = ()
) -> list[Step]:
    """Return the steps that ``(name, params)`` pairs mean.

    Raises:
        ValueError: if a name or a parameter is unknown.
    """
    return [
        find("steps", name, builtin=BUILTIN, plugins=plugins)(**params) for name, params in steps
    ]


def pipeline(steps: Sequence[tuple[str, dict[str, Any]]], *, plugins: Collection[str] = ()) -> Step:
    """Return one step that takes those of ``(name, params)`` in order.

    Raises:
        ValueError: if a name or a parameter is unknown.
    """
    each = made(steps, plugins=plugins)

    def run(image: Volume, label: Volume | None = None) -> Pair:
        for step in each:
            image, label = step(image, label)
        return image, label

    return run

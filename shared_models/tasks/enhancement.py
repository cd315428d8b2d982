"""Contrast enhancement: a badly exposed film as the same film well exposed.

The site's images are taken as well exposed. What the net sees is made from them: another tone curve
(gamma), less contrast, a grey level that is off, a veil of scattered light, and noise.

References:
    Zuiderveld 1994, Contrast limited adaptive histogram equalization. Otsu 1979, A threshold
    selection method from gray-level histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models.imaging import Step
from shared_models.imaging.intensity import clahe, equalize, gamma, percentiles
from shared_models.randomness import Randomness
from shared_models.tasks.base import Pixels, Scores, Task
from shared_models.tasks.restoring import (
    Array,
    check_levels,
    each,
    generator_of,
    in_range,
    likeness,
    log_error,
    made_up,
    means,
    panels,
    ratio,
    share_of,
)
from shared_models.volume import Volume

#: The veil is the image seen through a blur of this part of its width.
_VEIL_WIDTH = 0.15


def make(
    *,
    gammas: Sequence[float] = (0.5, 2.0),
    contrasts: Sequence[float] = (0.3, 0.7),
    veils: Sequence[float] = (0.0, 0.5),
    noise: float = 0.01,
) -> Task:
    """Return the task of giving films their contrast back.

    Each image's fault is drawn: a tone curve between ``gammas`` (on a logarithmic scale), a
    part between ``veils`` of its light scattered, its range narrowed to a part between
    ``contrasts`` of what there is, somewhere in it, and Gaussian noise of the deviation ``noise``.

    Metrics: ``ssim`` and ``psnr`` in dB (MONAI) against the film as it was, and ``cnr``, the
    contrast-to-noise ratio: how far apart the means of what is bright and what is dark in the film
    as it was (Otsu's threshold) are, in deviations within the two.

    Raises:
        ValueError: if a range is none.
    """
    curves = check_levels("gammas", gammas, most=10.0)
    if curves[0] == 0:
        raise ValueError("expected gammas over 0")
    kept = check_levels("contrasts", contrasts, most=1.0)
    scattered = check_levels("veils", veils, most=1.0)
    deviation, _ = check_levels("noise", (noise, noise), most=1.0)

    def view(
        image: Tensor, target: Tensor, randomness: Randomness, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        from scipy import ndimage

        unit = (in_range(image).double().cpu().numpy().clip(-1, 1) + 1) / 2
        curve = exp(share_of(log(curves[0]), log(curves[1]), randomness))
        veil, contrast = (share_of(*ends, randomness) for ends in (scattered, kept))
        dark = unit**curve
        width = [0.0] * (unit.ndim - 2) + [_VEIL_WIDTH * n for n in unit.shape[-2:]]
        dark += veil * (ndimage.gaussian_filter(dark, width, mode="nearest") - dark)
        grey = contrast * dark + share_of(0.0, 1 - contrast, randomness)
        grey += deviation * generator_of(randomness).standard_normal(grey.shape)
        return torch.from_numpy((2 * grey - 1).astype(np.float32)), image

    return Task(
        name="enhancement",
        headline="ssim",
        label_kind="none",
        num_outputs=1,
        loss=log_error,
        score=_score,
        metrics=lambda scores: means(scores, ("psnr", "ssim", "cnr")),
        picture=_picture,
        view=view,
        baselines=BASELINES,
        made_up=made_up(1),
        covers=(
            "All that is trained: each patient's gradient is clipped, and their sum noised. The "
            "faults that are put on the images to train on protect nobody."
        ),
    )


def _score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
    """Return (batch, 3): PSNR, SSIM, and the contrast-to-noise ratio or NaN."""
    pairs = zip(outputs.double().cpu().numpy(), targets.double().cpu().numpy(), strict=True)
    ratios = [contrast_to_noise(output, target) for output, target in pairs]
    return np.column_stack([likeness(outputs, targets), ratios])


def contrast_to_noise(output: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """Return how far apart in ``output`` is what is bright and dark in ``target``, in deviations.

    NaN where ``target`` is of one grey, and at most 1000.
    """
    from skimage.filters import threshold_otsu

    if target.max() - target.min() < 1e-6:
        return float("nan")
    is_bright = target > threshold_otsu(target)
    bright, dark = output[is_bright], output[~is_bright]
    deviation = np.sqrt((bright.var() + dark.var()) / 2)
    return float(min(abs(bright.mean() - dark.mean()) / max(deviation, 1e-9), 1000.0))


def _picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
    caption = (
        f"badly exposed left ({ratio(image, target)}), enhanced middle "
        f"({ratio(output, target)}), as it was right"
    )
    return panels(image[0], output[0], target[0]), caption


#: Before a step that keeps an image's own range: the range it should have.
_WHOLE = percentiles(low=0.5, high=99.5)


def _through(image: Array, *steps: Step) -> Array:
    """Take imaging steps, the first of which gives the image the whole range of greys."""
    volume = Volume(image if image.ndim == 3 else image[None], np.eye(4))
    for step in (_WHOLE, *steps):
        volume, _ = step(volume)
    return volume.data.reshape(image.shape)


def _evened(image: Array) -> Array:
    """Take the gamma that makes the mean of the image's range its middle."""
    mean = (float(_through(image).mean()) + 1) / 2
    return _through(image, gamma(gamma=log(0.5) / log(min(max(mean, 0.01), 0.99))))


#: ``as it came`` is the badly exposed film.
BASELINES = MappingProxyType(
    {
        "as it came": lambda inputs: inputs,
        "stretched": each(_through),
        "gamma": each(_evened),
        "equalized": each(lambda image: _through(image, equalize())),
        "clahe": each(lambda image: _through(image, clahe())),
    }
)

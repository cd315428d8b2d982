"""Denoising: the image without its noise, in two or three dimensions.

The site's images are taken as clean; noise of a known kind is added to what the net sees. Rician
noise is that of MR magnitude images, Poisson noise that of films: photons behind the body are
counted and the film shows the logarithm of how many are missing, so what is dense is noisy.

References:
    Zhang et al. 2017, Beyond a Gaussian denoiser, https://arxiv.org/abs/1608.03981. Lehtinen et al.
    2018, Noise2Noise, https://arxiv.org/abs/1803.04189. Gudbjartsson and Patz 1995, The Rician
    distribution of noisy MRI data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models.imaging.denoising import noise_of
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

Kind = Literal["gaussian", "rician", "poisson"]
#: A film goes from white to black as the photons grow tenfold.
_DENSITY = np.log(10.0)

#: Of the filters in two and three dimensions: what did best on real films and hippocampi.
_WIDTH, _STRENGTH = {2: 1.0, 3: 0.6}, {2: 1.3, 3: 0.6}

Unit = NDArray[np.float64]


def make(
    *,
    noise: Kind = "gaussian",
    levels: Sequence[float] = (0.05, 0.15),
    noise_to_noise: bool = False,
) -> Task:
    """Return the task of taking ``noise`` away.

    Args:
        noise: ``gaussian``, ``rician`` for MR, ``poisson`` for films.
        levels: each image's noise is drawn from between them: its deviation as a part of the range
            from black to white; that of Poisson noise is where the film is black.
        noise_to_noise: train on a second noisy copy instead of the clean image, as if there were
            none. What is learned is the mean over copies, and the mean of Rician noise is brighter
            than the image where there is little signal.

    Metrics: ``psnr`` in dB and ``ssim`` (MONAI), against the image without the noise.

    Raises:
        ValueError: if the noise or its levels are none that there are.
    """
    if noise not in get_args(Kind):
        raise ValueError(f"expected noise as one of {', '.join(get_args(Kind))}, got '{noise}'")
    low, high = check_levels("levels", levels, most=1.0)
    spoil = _SPOILS[noise]

    def view(
        image: Tensor, target: Tensor, randomness: Randomness, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        unit = (in_range(image).double().cpu().numpy() + 1) / 2
        level, generator = share_of(low, high, randomness), generator_of(randomness)
        noisy = _image(spoil(unit, level, generator))
        if noise_to_noise and is_training:
            return noisy, _image(spoil(unit, level, generator))
        return noisy, image

    return Task(
        name="denoising",
        headline="psnr",
        label_kind="none",
        num_outputs=1,
        loss=log_error,
        score=_score,
        metrics=lambda scores: means(scores, ("psnr", "ssim")),
        picture=_picture,
        view=view,
        baselines=BASELINES,
        made_up=made_up(1),
        covers=(
            "All that is trained: each patient's gradient is clipped, and their sum noised. The "
            "noise that is put on the images to train on protects nobody."
        ),
    )


def _score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
    return likeness(outputs, targets)


def _picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
    caption = (
        f"noisy left ({ratio(image, target)}), denoised middle ({ratio(output, target)}), "
        "without noise right"
    )
    return panels(image[0], output[0], target[0]), caption


def _gaussian(unit: Unit, level: float, generator: np.random.Generator) -> Unit:
    return unit + level * generator.standard_normal(unit.shape)


def _rician(unit: Unit, level: float, generator: np.random.Generator) -> Unit:
    real, imaginary = level * generator.standard_normal((2, *unit.shape))
    return np.asarray(np.hypot(unit + real, imaginary))


def _poisson(unit: Unit, level: float, generator: np.random.Generator) -> Unit:
    photons = (_DENSITY * max(level, 1e-6)) ** -2  # where the film is black
    counted = generator.poisson(photons * np.exp(-_DENSITY * unit))
    return np.asarray(-np.log(np.maximum(counted, 0.5) / photons) / _DENSITY)


_SPOILS: dict[str, Callable[[Unit, float, np.random.Generator], Unit]] = {
    "gaussian": _gaussian,
    "rician": _rician,
    "poisson": _poisson,
}


def _image(unit: Unit) -> Tensor:
    return torch.from_numpy((2 * unit - 1).astype(np.float32))


def _blurred(image: Array) -> Array:
    from scipy import ndimage

    found: Array = ndimage.gaussian_filter(image, sigma=_WIDTH[image.ndim], mode="nearest")
    return found


def _median(image: Array) -> Array:
    from scipy import ndimage

    found: Array = ndimage.median_filter(image, size=3, mode="nearest")
    return found


def _non_local_means(image: Array) -> Array:
    """Average patches that look alike, by the noise that the image itself tells of."""
    from skimage.restoration import denoise_nl_means

    planes = image if image.ndim == 3 else image[None]
    deviation = float(np.mean([noise_of(plane) for plane in planes]))
    found: Array = denoise_nl_means(
        image,
        patch_size=3,
        patch_distance=3,
        h=max(_STRENGTH[image.ndim] * deviation, 1e-6),
        sigma=deviation,
        fast_mode=True,
    )
    return found


#: ``noisy`` is the image as it came.
BASELINES = MappingProxyType(
    {
        "noisy": lambda inputs: inputs,
        "gaussian": each(_blurred),
        "median": each(_median),
        "non-local means": each(_non_local_means),
    }
)

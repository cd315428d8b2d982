"""What the tasks share that give an image back: its range, how like another it is, pictures.

An image is float32 (1, [z,] y, x) from -1, black, to 1, white, which the imaging steps 'window',
'percentiles' and 'min-max' give; what is worse than it is made from it in the task's ``view``.

References:
    Wang et al. 2004, Image quality assessment: from error visibility to structural similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from shared_models.errors import DataError
from shared_models.randomness import Randomness
from shared_models.tasks.base import Pixels, Scores

RANGE = 2.0
#: A mean squared error this small is as good as none to the loss.
_LEAST_ERROR = 1e-7
#: Of an image that came back exactly; any less would be infinite.
MOST_PSNR = 100.0
#: MONAI's and scikit-image's window; smaller images are seen through the largest that fits.
WINDOW, WINDOW_SIGMA = 11, 1.5
_GAP = 2

Array = NDArray[np.float32]


def in_range(image: Tensor) -> Tensor:
    """Return ``image`` if its values are from -1 to 1.

    Raises:
        DataError: if not.
    """
    if not (image.min() >= -1.001 and image.max() <= 1.001):  # so that NaN is refused too
        raise DataError(
            "expected image values from -1 to 1; let the plan's imaging steps bring them there by "
            "'window', 'percentiles' or 'min-max'"
        )
    return image


def share_of(low: float, high: float, randomness: Randomness) -> float:
    """Draw a number from ``low`` to ``high``."""
    return low + (high - low) * float(randomness.uniform(1)[0])


def generator_of(randomness: Randomness) -> np.random.Generator:
    """Return a generator that ``randomness`` seeds: what spoils an image protects nobody."""
    words = (randomness.uniform(4) * 2.0**32).astype(np.uint32).tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def check_levels(name: str, levels: Sequence[float], *, most: float) -> tuple[float, float]:
    """Return the two ends of a range that is drawn from.

    Raises:
        ValueError: if they are not two rising numbers from 0 to ``most``.
    """
    if len(levels) != 2 or not 0 <= levels[0] <= levels[1] <= most:
        raise ValueError(f"expected {name} as two numbers, 0 <= low <= high <= {most:g}")
    return float(levels[0]), float(levels[1])


def log_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the logarithm of each image's mean squared error: (batch,).

    It is the peak signal-to-noise ratio turned round, and an image that was spoiled a lot weighs
    no more than one that was spoiled a little.
    """
    errors = (outputs - targets).square().flatten(1).mean(dim=1)
    return (errors + _LEAST_ERROR).log()


def likeness(outputs: Tensor, targets: Tensor) -> Scores:
    """Return (batch, 2): peak signal-to-noise ratio in dB, and structural similarity.

    That of a volume is the mean over its slices, as they are looked at.
    """
    from monai.metrics import PSNRMetric
    from monai.metrics.regression import compute_ssim_and_cs

    outputs, targets = outputs.float(), targets.float()
    made, whole = (image.flatten(0, -3)[:, None] for image in (outputs, targets))
    size = [min(WINDOW, n - 1 + n % 2) for n in outputs.shape[-2:]]  # odd, as a window must be
    similarity, _ = compute_ssim_and_cs(made, whole, 2, size, [WINDOW_SIGMA] * 2, data_range=RANGE)
    ratio = PSNRMetric(max_val=RANGE)._compute_metric(outputs, targets).flatten()
    columns = [ratio.clamp(max=MOST_PSNR), similarity.reshape(len(outputs), -1).mean(dim=1)]
    return np.asarray(torch.stack(columns, dim=1).double().cpu().numpy())


def means(scores: Scores, names: Sequence[str]) -> dict[str, float]:
    """Return each column's mean under its name; what no image tells is absent."""
    return {
        name: float(np.nanmean(column))
        for name, column in zip(names, scores.T, strict=True)
        if np.isfinite(column).any()
    }


def each(change: Callable[[Array], Array]) -> Callable[[Tensor], Tensor]:
    """Return what changes each image of a batch (n, 1, [z,] y, x), given as ([z,] y, x)."""

    def run(inputs: Tensor) -> Tensor:
        changed = [np.asarray(change(image), np.float32) for image in inputs[:, 0].cpu().numpy()]
        return torch.from_numpy(np.stack(changed))[:, None].to(inputs)

    return run


def panels(*images: Tensor) -> Pixels:
    """Draw images ([z,] y, x) side by side, -1 black and 1 white: uint8 (y, x, 3)."""
    planes = [image[image.shape[0] // 2] if image.ndim == 3 else image for image in images]
    shown = [((p.float().cpu() + 1) / 2 * 255).round().clamp(0, 255).byte().numpy() for p in planes]
    gap = np.full((len(shown[0]), _GAP), 255, np.uint8)
    parts = [part for plane in shown for part in (plane, gap)][:-1]
    return np.repeat(np.concatenate(parts, axis=1)[..., None], 3, axis=-1)


def ratio(output: Tensor, target: Tensor) -> str:
    """Write how like one image (1, [z,] y, x) is another: ``31.4 dB``."""
    return f"{likeness(output[None], target[None])[0, 0]:.1f} dB"


def made_up(channels: int) -> Callable[[Generator, int], tuple[Tensor, Tensor]]:
    """Return what makes up four small outputs and targets of so many channels."""

    def make(generator: Generator, spatial_dims: int) -> tuple[Tensor, Tensor]:
        pair = torch.randn((2, 4, channels, *(8,) * spatial_dims), generator=generator)
        return pair[0], pair[1]

    return make

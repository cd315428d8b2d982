"""Reconstruction: an MR image from part of its k-space, slice by slice.

K-space is made from the site's images: their values as magnitudes, a smooth phase, noise, and then
only some of the lines along y. That is easier than what a scanner measures with many coils and
figures on it say nothing of a scanner's (Shimron et al.); they compare methods.

References:
    Zbontar et al. 2018, fastMRI, https://arxiv.org/abs/1811.08839: masks of random lines with a
    full centre. Lustig, Donoho and Pauly 2007, Sparse MRI: total variation. Shimron et al. 2022,
    Implicit data crimes, https://doi.org/10.1073/pnas.2117203119.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from shared_models.errors import DataError
from shared_models.kspace import consistent, imaged, magnitude, measured
from shared_models.randomness import Randomness
from shared_models.tasks.base import Pixels, Scores, Task
from shared_models.tasks.restoring import (
    check_levels,
    generator_of,
    in_range,
    likeness,
    log_error,
    made_up,
    means,
    panels,
    ratio,
)

#: How far the phase may bend from the middle to an edge, in radians, for each of its terms.
_BEND = 0.5
#: Of the search for the image of least total variation.
_STEPS, _FIRST_STEP, _ROUNDING = 100, 0.05, 1e-3


def make(*, acceleration: float = 4.0, centre: float = 0.1, noise: float = 0.01) -> Task:
    """Return the task of imaging from one in ``acceleration`` lines of k-space.

    Args:
        acceleration: how many times fewer lines are measured.
        centre: the part of all lines, around the middle, that is always measured.
        noise: its deviation, as a part of the range of magnitudes.

    Metrics: ``psnr`` in dB and ``ssim`` (MONAI) of magnitudes.

    Raises:
        ValueError: if there are more lines in the centre than measured.
    """
    if not (acceleration >= 1 and 0 < centre <= 1 / acceleration):
        raise ValueError("expected an acceleration of at least 1, and 0 < centre <= 1/acceleration")
    deviation, _ = check_levels("noise", (noise, noise), most=1.0)

    def view(
        image: Tensor, target: Tensor, randomness: Randomness, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        generator = generator_of(randomness)
        whole = _with_phase((in_range(image)[0] + 1) / 2, generator)
        lines = lines_of(image.shape[-2], acceleration, centre, generator)
        mask = torch.from_numpy(lines)[:, None].expand(image.shape[1:]).to(image)
        spoiled = whole + deviation * torch.from_numpy(
            generator.standard_normal(whole.shape, np.float32)
        ).to(image)
        zero_filled = imaged(measured(spoiled[None]) * mask)[0]
        return torch.cat([zero_filled, mask[None]]), whole

    return Task(
        name="reconstruction",
        headline="psnr",
        label_kind="none",
        num_outputs=2,
        loss=_loss,
        score=_score,
        metrics=lambda scores: means(scores, ("psnr", "ssim")),
        picture=_picture,
        view=view,
        baselines=BASELINES,
        made_up=made_up(2),
        covers=(
            "All that is trained: each patient's gradient is clipped, and their sum noised. The "
            "noise that is put on k-space protects nobody."
        ),
    )


def lines_of(
    number: int, acceleration: float, centre: float, generator: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Draw which of ``number`` lines are measured: the middle ones, the others at random.

    Raises:
        DataError: if so few lines cannot be thinned out.
    """
    wanted, middle = round(number / acceleration), max(1, round(number * centre))
    if wanted < middle:
        raise DataError(
            f"expected images of more lines than {number}, to measure one in {acceleration:g}"
        )
    is_measured = np.zeros(number, bool)
    first = (number - middle + 1) // 2
    is_measured[first : first + middle] = True
    others = np.flatnonzero(~is_measured)
    is_measured[generator.choice(others, wanted - middle, replace=False)] = True
    return is_measured


def _with_phase(values: Tensor, generator: np.random.Generator) -> Tensor:
    """Return magnitudes ([z,] y, x) with a smooth phase, real and imaginary: (2, [z,] y, x).

    Without one, half of k-space would tell the other half.
    """
    y, x = (torch.linspace(-1, 1, n).to(values) for n in values.shape[-2:])
    shapes = (y[:, None], x, y[:, None] * x, y[:, None] ** 2, x**2)
    weights = generator.uniform(-_BEND, _BEND, len(shapes)).tolist()
    phase = torch.zeros_like(values)
    for weight, shape in zip(weights, shapes, strict=True):
        phase = phase + weight * shape
    return torch.stack([values * torch.cos(phase), values * torch.sin(phase)])


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return log_error(2 * outputs, 2 * targets)


def _shown(image: Tensor) -> Tensor:
    """Return the magnitude of a complex image (batch, 2, ...) from -1 to 1."""
    return 2 * magnitude(image.float()) - 1


def _score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
    return likeness(_shown(outputs), _shown(targets))


def _picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
    came, made, whole = (_shown(each[None, :2])[0] for each in (image, output, target))
    share = float(image[2].mean())
    caption = (
        f"zero-filled left ({ratio(came, whole)}), reconstructed middle ({ratio(made, whole)}), "
        f"whole right; {share:.0%} of k-space measured"
    )
    return panels(came[0], made[0], whole[0]), caption


def _zero_filled(inputs: Tensor) -> Tensor:
    return inputs[:, :2]


def _least_variation(inputs: Tensor) -> Tensor:
    """Return the image of least total variation among those that fit what was measured."""
    image, mask = inputs[:, :2], inputs[:, 2]
    known = measured(image)
    for step in range(_STEPS):
        with torch.enable_grad():
            free = image.detach().requires_grad_()
            (slope,) = torch.autograd.grad(_variation(free), free)
        image = consistent(image - _FIRST_STEP * (1 - step / _STEPS) * slope, known, mask)
    return image


def _variation(image: Tensor) -> Tensor:
    """Return the sum over voxels of the length of the gradient of a complex image."""
    squares = torch.zeros_like(image[:, 0])
    for axis in range(2, image.ndim):
        last = image.narrow(axis, image.shape[axis] - 1, 1)
        squares = squares + image.diff(dim=axis, append=last).square().sum(dim=1)
    return (squares + _ROUNDING**2).sqrt().sum()


BASELINES = MappingProxyType(
    {"zero-filled": _zero_filled, "total variation": _least_variation},
)

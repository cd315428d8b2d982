"""The noise that is put on images, and what takes it away without training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared_models.randomness import seeded
from shared_models.tasks.denoising import make

SHAPE = (1, 64, 64)


def noisy(noise: str, value: float, *, level: float = 0.1) -> np.ndarray:
    """Return an even image, 0 black and 1 white, with its noise."""
    task = make(noise=noise, levels=[level, level])  # type: ignore[arg-type]
    image, target = task.view(torch.full(SHAPE, 2 * value - 1), torch.zeros(()), seeded(1), False)
    assert torch.equal(target, torch.full(SHAPE, 2 * value - 1))
    return (image.double().numpy() + 1) / 2


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gaussian_noise_has_its_mean_and_deviation(value: float) -> None:
    found = noisy("gaussian", value)
    assert found.mean() == pytest.approx(value, abs=0.005)
    assert found.std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_second_moment_of_a_rician_magnitude_is_the_signals_and_twice_the_noises(
    value: float,
) -> None:
    found = noisy("rician", value)
    assert found.min() >= 0
    assert (found**2).mean() == pytest.approx(value**2 + 2 * 0.1**2, rel=0.03)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_noise_of_photons_is_the_level_at_black_and_more_where_few_come(value: float) -> None:
    found = noisy("poisson", value, level=0.02)
    assert found.mean() == pytest.approx(value, abs=0.01)
    assert found.std() == pytest.approx(0.02 * 10 ** (value / 2), rel=0.05)


def test_no_photon_at_all_is_still_a_number() -> None:
    assert np.isfinite(noisy("poisson", 1.0, level=1.0)).all()


@pytest.mark.parametrize("noise", ["gaussian", "rician", "poisson"])
def test_no_noise_leaves_the_image(noise: str) -> None:
    assert noisy(noise, 0.5, level=0.0) == pytest.approx(0.5, abs=1e-4)


def test_noise_to_noise_trains_on_a_second_copy_and_tests_on_the_image() -> None:
    task = make(levels=[0.1, 0.1], noise_to_noise=True)
    image = torch.zeros(SHAPE)
    first, second = task.view(image, torch.zeros(()), seeded(1), True)
    noises = [each.numpy().ravel() for each in (first, second)]
    assert [noise.std() for noise in noises] == pytest.approx([0.2, 0.2], rel=0.05)
    assert abs(np.corrcoef(*noises)[0, 1]) < 0.05
    assert torch.equal(task.view(image, torch.zeros(()), seeded(1), False)[1], image)


def test_other_noise_and_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="one of gaussian, rician, poisson, got 'salt'"):
        make(noise="salt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected levels as two numbers"):
        make(levels=[0.2, 0.1])


@pytest.mark.parametrize("shape", [(48, 48), (12, 24, 24)])
def test_each_filter_takes_noise_off_two_even_halves(shape: tuple[int, ...]) -> None:
    task = make(levels=[0.05, 0.05])
    image = torch.full((1, *shape), -0.5)
    image[..., shape[-1] // 2 :] = 0.5
    inputs, target = task.view(image, torch.zeros(()), seeded(1), False)
    ratios = {
        name: task.score(run(inputs[None]), target[None], ())[0, 0]
        for name, run in task.baselines.items()
    }
    assert ratios.pop("noisy") == pytest.approx(20 * np.log10(1 / 0.05), abs=0.3)
    assert set(ratios) == {"gaussian", "median", "non-local means"}
    assert min(ratios.values()) > 28
    assert max(ratios, key=lambda name: ratios[name]) == "non-local means"

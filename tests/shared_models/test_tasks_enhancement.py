"""Faults put on films, the contrast-to-noise ratio, and what mends them without training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared_models.imaging.intensity import clahe, percentiles
from shared_models.randomness import seeded
from shared_models.tasks.enhancement import contrast_to_noise, make
from shared_models.volume import Volume

HALVES = np.repeat([[-0.5, 0.7]], 8, axis=1).repeat(8, axis=0)


def ramp() -> torch.Tensor:
    return torch.linspace(-1, 1, 40).expand(1, 24, 40).clone()


def test_without_a_fault_the_film_is_as_it_was() -> None:
    task = make(gammas=[1, 1], contrasts=[1, 1], veils=[0, 0], noise=0)
    image, target = task.view(ramp(), torch.zeros(()), seeded(0), True)
    assert torch.allclose(image, ramp(), atol=1e-6)
    assert torch.equal(target, ramp())


def test_a_fault_narrows_the_range_somewhere_in_it() -> None:
    task = make(gammas=[1, 1], contrasts=[0.4, 0.4], veils=[0, 0], noise=0)
    views = [task.view(ramp(), torch.zeros(()), seeded(n), True)[0] for n in range(20)]
    assert [float(v.max() - v.min()) for v in views] == pytest.approx([0.8] * 20, abs=1e-5)
    assert all(v.min() >= -1 and v.max() <= 1 for v in views)
    assert max(float(v.min()) for v in views) - min(float(v.min()) for v in views) > 0.6


def test_a_tone_curve_bends_and_a_veil_flattens() -> None:
    curved = make(gammas=[2, 2], contrasts=[1, 1], veils=[0, 0], noise=0)
    image, _ = curved.view(ramp(), torch.zeros(()), seeded(0), True)
    assert torch.allclose((image + 1) / 2, ((ramp() + 1) / 2) ** 2, atol=1e-6)
    veiled = make(gammas=[1, 1], contrasts=[1, 1], veils=[1, 1], noise=0)
    image, _ = veiled.view(ramp(), torch.zeros(()), seeded(0), True)
    assert image.std() < 0.97 * ramp().std()
    assert float(image.mean()) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "params",
    [{"gammas": [0, 1]}, {"contrasts": [0.5, 1.5]}, {"veils": [0.4, 0.2]}, {"noise": -0.1}],
)
def test_faults_that_are_none_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        make(**params)  # type: ignore[arg-type]


def test_contrast_to_noise_is_the_distance_of_means_in_deviations() -> None:
    output = HALVES + np.resize([0.1, -0.1], HALVES.shape)
    assert contrast_to_noise(output, HALVES) == pytest.approx(1.2 / 0.1)
    assert contrast_to_noise(3 * output - 1, HALVES) == pytest.approx(1.2 / 0.1)
    assert contrast_to_noise(HALVES, HALVES) == 1000.0
    assert contrast_to_noise(np.zeros_like(HALVES), HALVES) == 0.0
    assert np.isnan(contrast_to_noise(HALVES, np.zeros_like(HALVES)))


def test_films_of_one_grey_leave_the_ratio_out() -> None:
    task, even = make(), torch.zeros((2, 1, 16, 16))
    assert set(task.metrics(task.score(even, even, ()))) == {"psnr", "ssim"}


def test_stretching_mends_what_is_only_narrow() -> None:
    task = make(gammas=[1, 1], contrasts=[0.4, 0.4], veils=[0, 0], noise=0)
    image, _ = task.view(ramp(), torch.zeros(()), seeded(0), True)
    mended = task.baselines["stretched"](image[None])[0]
    assert torch.allclose(mended, percentiles_of(ramp()), atol=1e-5)


def test_gamma_brings_the_mean_of_a_dark_film_to_the_middle() -> None:
    task = make(gammas=[2, 2], contrasts=[1, 1], veils=[0, 0], noise=0)
    dark, _ = task.view(ramp(), torch.zeros(()), seeded(0), True)
    mended = task.baselines["gamma"](dark[None])
    assert abs(float(mended.mean())) < 0.5 * abs(float(dark.mean()))


def test_clahe_is_the_imaging_step() -> None:
    image = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 24, 40))).float()
    expected, _ = clahe()(Volume(percentiles_of(image).numpy(), np.eye(4)))
    assert make().baselines["clahe"](image[None])[0].numpy() == pytest.approx(expected.data)


def percentiles_of(image: torch.Tensor) -> torch.Tensor:
    found, _ = percentiles(low=0.5, high=99.5)(Volume(image.numpy(), np.eye(4)))
    return torch.from_numpy(found.data)

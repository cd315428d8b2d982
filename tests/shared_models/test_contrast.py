"""Denoising and contrast against plain implementations and images whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shared_models.errors import DataError
from shared_models.imaging import pipeline
from shared_models.imaging.denoising import bias_field, gaussian, median, noise_of
from shared_models.imaging.intensity import (
    bright_foreground,
    clahe,
    equalize,
    gamma,
    landmarks,
    min_max,
    standardize,
)
from shared_models.volume import Volume

DENOISERS: dict[str, dict[str, Any]] = {
    "gaussian": {"sigma_mm": 1.0},
    "median": {},
    "bilateral": {"sigma_mm": 2.0},
    "non-local-means": {},
}
every_denoiser = pytest.mark.parametrize("name", DENOISERS)


def volume(data: np.ndarray, *, spacing: float = 1.0) -> Volume:
    return Volume(data.astype(np.float32), np.diag([spacing, spacing, 3.0, 1.0]), "MR")


def squares() -> np.ndarray:
    """Return two slices with bright squares on a dark ground."""
    data = np.full((2, 64, 64), 100.0)
    data[:, 16:48, 16:48] = 200
    data[1, 24:32, 24:40] = 300
    return data


def noisy(sigma: float, *, seed: int = 0) -> np.ndarray:
    return squares() + np.random.default_rng(seed).normal(0, sigma, squares().shape)


def error(data: np.ndarray) -> float:
    return float(np.sqrt(np.mean((data - squares()) ** 2)))


# --- denoising


@every_denoiser
def test_a_denoiser_comes_nearer_to_the_truth(name: str) -> None:
    given_ = noisy(20.0)
    done, _ = pipeline([(name, DENOISERS[name])])(volume(given_))
    assert error(done.data) < 0.75 * error(given_)


@every_denoiser
def test_a_denoiser_works_slice_by_slice(name: str) -> None:
    step = pipeline([(name, DENOISERS[name])])
    given_ = noisy(20.0)
    both = step(volume(given_))[0].data
    alone = step(volume(given_[1:]))[0].data
    assert np.allclose(both[1:], alone, atol=1e-3)


@every_denoiser
def test_an_image_of_one_value_is_left_as_it_is(name: str) -> None:
    flat = np.full((2, 9, 9), 7.0)
    assert np.allclose(pipeline([(name, DENOISERS[name])])(volume(flat))[0].data, flat)


def test_the_gaussian_is_a_sum_with_gaussian_weights() -> None:
    given_ = noisy(20.0)
    reach = np.arange(-16, 17)
    weights = np.exp(-(reach**2) / (2 * 2.0**2))
    weights /= weights.sum()
    padded = np.pad(given_, ((0, 0), (16, 16), (16, 16)), mode="edge")
    rows = sum(w * padded[:, 16 + k : 80 + k, :] for w, k in zip(weights, reach, strict=True))
    plain = sum(w * rows[:, :, 16 + k : 80 + k] for w, k in zip(weights, reach, strict=True))
    done, _ = gaussian(sigma_mm=1.0)(volume(given_, spacing=0.5))
    assert np.allclose(done.data, plain, atol=0.1)


def test_the_median_is_numpys_over_each_square() -> None:
    given_ = noisy(20.0)
    windows = np.lib.stride_tricks.sliding_window_view(given_, (5, 5), axis=(1, 2))
    done, _ = median(radius=2)(volume(given_))
    assert np.allclose(done.data[:, 2:-2, 2:-2], np.median(windows, axis=(3, 4)), atol=1e-4)


@given(sigma=st.floats(2, 50), seed=st.integers(0, 9))
def test_the_noise_is_told_to_within_a_fifth(sigma: float, seed: int) -> None:
    found = noise_of(noisy(sigma, seed=seed)[0].astype(np.float32))
    assert found == pytest.approx(sigma, rel=0.2, abs=1.0)


def test_the_bias_field_is_found_and_taken_out() -> None:
    _, y, x = np.meshgrid(np.arange(12), np.arange(64), np.arange(64), indexing="ij")
    tissue = np.where((y - 32) ** 2 + (x - 32) ** 2 < 26**2, 500.0, 5.0)
    tissue += np.random.default_rng(0).normal(0, 5, tissue.shape)
    gain = np.exp(0.6 * (x - 32) / 32 + 0.3 * (y - 32) / 32)
    inside = tissue > 250
    done, _ = bias_field()(volume(np.abs(tissue * gain)))

    def spread(data: np.ndarray) -> float:
        return float(data[inside].std() / data[inside].mean())

    assert spread(tissue * gain) > 0.25
    assert spread(done.data) < 0.06


def test_the_same_image_gives_the_same_bits() -> None:
    given_ = volume(np.abs(noisy(20.0)))
    first, second = (bias_field(iterations=10)(given_)[0].data for _ in range(2))
    assert np.array_equal(first, second)


def test_negative_values_have_no_bias_field() -> None:
    with pytest.raises(DataError, match="no negative values"):
        bias_field()(volume(noisy(20.0) - 500))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("gaussian", {"sigma_mm": 0.0}),
        ("median", {"radius": 0}),
        ("bilateral", {"strength": -1.0}),
        ("non-local-means", {"patch": 0}),
        ("bias-field", {"shrink": 0}),
        ("gamma", {"gamma": 0.0}),
        ("equalize", {"bins": 1}),
        ("clahe", {"tiles": 0}),
        ("clahe", {"clip": 2.0}),
        ("standardize", {"mean": 1.0}),
        ("standardize", {"mean": 1.0, "deviation": 0.0}),
        ("landmarks", {"percents": [1, 99], "values": [1]}),
        ("landmarks", {"percents": [99, 1], "values": [0, 1]}),
        ("landmarks", {"percents": [0, 101], "values": [0, 1]}),
        ("crop-box", {"low": [0.5, 0.5], "high": [0.5, 1.0]}),
        ("crop-foreground", {"margin_mm": -1.0}),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        pipeline([(name, params)])


# --- contrast


def test_min_max_reaches_from_minus_one_to_one() -> None:
    done, _ = min_max()(volume(noisy(20.0)))
    assert done.data.min() == pytest.approx(-1, abs=1e-5)
    assert done.data.max() == pytest.approx(1, abs=1e-5)


def test_a_stated_mean_and_deviation_are_used() -> None:
    done, _ = standardize(mean=100.0, deviation=50.0)(volume(squares()))
    assert np.allclose(done.data, (squares() - 100) / 50)


@given(seed=st.integers(0, 9), shift=st.floats(-500, 500), factor=st.floats(0.1, 10))
def test_both_contrasts_become_bright_on_dark(seed: int, shift: float, factor: float) -> None:
    bright = (noisy(5.0, seed=seed) * factor + shift).astype(np.float32)
    dark = bright.min() + (bright.max() - bright)
    done, turned = (bright_foreground()(volume(given_))[0].data for given_ in (bright, dark))
    assert np.array_equal(done, bright)
    assert np.allclose(turned, bright, atol=1e-2)


def test_an_inverted_image_is_pillows_and_keeps_its_range() -> None:
    picture = Image.fromarray((255 - squares()[1] / 2).astype(np.uint8))
    grey = np.asarray(picture, np.float32)[None]
    done, _ = bright_foreground()(volume(grey))
    assert (done.data.min(), done.data.max()) == (grey.min(), grey.max())
    plain = np.asarray(ImageOps.invert(picture), np.float32)
    assert np.array_equal(done.data[0] - done.data.min(), plain - plain.min())


def test_an_image_already_bright_on_dark_is_left_alone() -> None:
    step = bright_foreground()
    once, _ = step(volume(400 - squares()))
    assert np.array_equal(step(once)[0].data, once.data)
    flat = volume(np.full((1, 4, 4), 7.0))
    assert np.array_equal(step(flat)[0].data, flat.data)


@given(power=st.floats(0.2, 5))
def test_gamma_is_a_power_of_the_range(power: float) -> None:
    given_ = noisy(20.0)
    low, high = given_.min(), given_.max()
    plain = low + (high - low) * ((given_ - low) / (high - low)) ** power
    assert np.allclose(gamma(gamma=power)(volume(given_))[0].data, plain, atol=0.1)


def test_equalizing_gives_every_grey_as_often() -> None:
    skewed = np.random.default_rng(0).gamma(1.0, 50.0, (2, 64, 64))
    done, _ = equalize()(volume(skewed))
    low, high = skewed.min(), skewed.max()
    counts, _ = np.histogram(done.data, bins=8, range=(low, high))
    assert counts.min() > 0.5 * skewed.size / 8
    assert counts.max() < 1.5 * skewed.size / 8


def test_landmarks_land_on_the_plans_values() -> None:
    percents, values = [1, 25, 50, 75, 99], [-1.0, -0.4, 0.0, 0.3, 1.0]
    for factor, shift in ((1.0, 0.0), (37.0, -900.0)):
        given_ = np.random.default_rng(0).gamma(2.0, 50.0, (4, 64, 64)) * factor + shift
        done, _ = landmarks(percents=percents, values=values)(volume(given_))
        assert np.allclose(np.percentile(done.data, percents), values, atol=0.01)
        assert done.data.min() >= -1
        assert done.data.max() <= 1


def test_clahe_shows_a_faint_pattern_in_the_dark_and_keeps_the_range() -> None:
    ground = np.linspace(0, 1000, 64)[None, None, :] * np.ones((1, 64, 64))
    faint = ground + 10 * (np.indices((64, 64)).sum(axis=0) // 4 % 2)
    done, _ = clahe(tiles=8, clip=0.05)(volume(faint))

    def contrast(data: np.ndarray) -> float:
        return float(np.abs(np.diff(data[0, :, 4:12], axis=0)).mean())

    assert contrast(done.data) > 2 * contrast(faint)
    assert done.data.min() >= faint.min() - 1e-3
    assert done.data.max() <= faint.max() + 1e-3


def test_an_equalized_image_keeps_its_order() -> None:
    """Global equalization never swaps two greys; local does, which is why it is another step."""
    given_ = np.random.default_rng(0).gamma(1.0, 50.0, (1, 32, 32))
    done, _ = equalize()(volume(given_))
    order = np.argsort(given_.ravel())
    assert (np.diff(done.data.ravel()[order]) >= -1e-3).all()

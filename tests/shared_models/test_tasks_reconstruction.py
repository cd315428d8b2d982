"""K-space against numpy, masks, and that what was measured stays as it was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shared_models import nets
from shared_models.errors import DataError
from shared_models.kspace import channels_of, complex_of, consistent, imaged, magnitude, measured
from shared_models.randomness import seeded
from shared_models.tasks.reconstruction import lines_of, make

#: Odd and even sizes, for the centre.
SHAPES = [(2, 2, 9, 12), (2, 2, 3, 8, 7)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks() -> torch.Tensor:
    image = torch.full((1, 32, 32), -1.0)
    image[0, 4:20, 6:26], image[0, 10:28, 14:22] = 0.2, 0.9
    return image


@pytest.mark.parametrize("shape", SHAPES)
def test_kspace_is_numpys_with_its_centre_in_the_middle(shape: tuple[int, ...]) -> None:
    image = drawn(*shape)
    values = image[:, 0].double().numpy() + 1j * image[:, 1].double().numpy()
    axes = (-2, -1)
    shifted = np.fft.ifftshift(values, axes=axes)
    expected = np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=axes)
    assert np.allclose(measured(image).numpy(), expected, atol=1e-5)
    assert torch.allclose(imaged(measured(image)), image, atol=1e-5)
    assert torch.allclose(channels_of(complex_of(image)), image)
    assert np.allclose(magnitude(image)[:, 0].numpy(), np.abs(values), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_consistent_changes_what_was_measured_and_nothing_else(shape: tuple[int, ...]) -> None:
    image, truth = drawn(*shape), drawn(*shape, seed=1)
    mask = (drawn(shape[0], *shape[2:], seed=2) > 0).float()
    found = measured(consistent(image, measured(truth), mask))
    expected = torch.where(mask > 0, measured(truth), measured(image))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("number", "middle"), [(40, 4), (41, 4), (24, 2)])
def test_so_many_lines_are_measured_and_the_middle_ones_always(number: int, middle: int) -> None:
    draws = [lines_of(number, 4.0, 0.1, np.random.default_rng(n)) for n in range(30)]
    assert {int(lines.sum()) for lines in draws} == {round(number / 4)}
    centre = np.flatnonzero(np.all(draws, axis=0)).tolist()
    assert len(centre) == middle
    assert abs(np.mean(centre) - number // 2) <= 0.5
    assert np.any(draws, axis=0).all()


def test_images_of_too_few_lines_are_refused() -> None:
    with pytest.raises(DataError, match="expected images of more lines than 1"):
        make().view(torch.zeros((1, 1, 8)), torch.zeros(()), seeded(0), True)


@pytest.mark.parametrize(
    "params", [{"acceleration": 0.5}, {"centre": 0.0}, {"centre": 0.3}, {"noise": -1.0}]
)
def test_masks_and_noise_that_are_none_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        make(**params)


@pytest.mark.parametrize("shape", [(24, 20), (3, 24, 20)])
def test_what_the_net_sees_is_zero_where_nothing_was_measured(shape: tuple[int, ...]) -> None:
    image = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs, whole = make(noise=0.0).view(image, torch.zeros(()), seeded(0), True)
    known, mask = measured(inputs[None, :2])[0], inputs[2]
    assert torch.allclose(magnitude(whole[None])[0], (image + 1) / 2, atol=1e-6)
    assert torch.allclose(known, measured(whole[None])[0] * mask, atol=1e-5)
    assert (mask == mask[..., :1]).all()  # whole lines
    assert float(mask.mean()) == pytest.approx(6 / 24)


def test_half_of_kspace_does_not_tell_the_other_half() -> None:
    whole = make().view(blocks(), torch.zeros(()), seeded(0), True)[1]
    kspace = measured(whole[None])[0, 1:, 1:]  # without the first line, which has no partner
    mirrored = kspace.flip(0, 1).conj()
    assert float((kspace - mirrored).abs().mean()) > 0.3 * float(kspace.abs().mean())


def test_the_noise_of_kspace_is_that_of_the_image() -> None:
    black = torch.full((1, 64, 64), -1.0)
    inputs, _ = make(noise=0.05).view(black, torch.zeros(()), seeded(0), True)
    values = measured(inputs[None, :2])[0][inputs[2] > 0]
    assert float(values.real.std()) == pytest.approx(0.05, rel=0.1)
    assert float(values.imag.std()) == pytest.approx(0.05, rel=0.1)


def test_least_total_variation_beats_zero_filling_on_blocks() -> None:
    task = make(acceleration=2.0)
    inputs, target = task.view(blocks(), torch.zeros(()), seeded(0), False)
    zero_filled, variation = (
        task.score(task.baselines[name](inputs[None]), target[None], ())[0, 0]
        for name in ("zero-filled", "total variation")
    )
    assert variation > zero_filled + 2


@pytest.mark.parametrize("shape", [(16, 12), (4, 16, 12)])
def test_what_was_measured_stays_whatever_the_weights(shape: tuple[int, ...]) -> None:
    image = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs, _ = make().view(image, torch.zeros(()), seeded(0), True)
    net = shaken({"spatial_dims": len(shape), "cascades": 2, "channels": 4, "depth": 2})
    with torch.no_grad():
        found = measured(net(inputs[None]))[0]
    mask = inputs[2] > 0
    known = measured(inputs[None, :2])[0]
    assert torch.allclose(found[mask], known[mask], atol=1e-4)
    assert float((found - known)[~mask].abs().mean()) > 0.01


def test_an_untrained_net_gives_back_the_zero_filled_image() -> None:
    inputs, _ = make().view(blocks(), torch.zeros(()), seeded(0), True)
    net = nets.make("unrolled", {}, seed=0, num_outputs=2)
    assert torch.allclose(net(inputs[None])[0], inputs[:2], atol=1e-5)


def test_a_net_of_other_outputs_or_of_no_cascade_is_refused() -> None:
    with pytest.raises(ValueError, match="two outputs, real and imaginary, got 1"):
        nets.make("unrolled", {}, seed=0, num_outputs=1)
    with pytest.raises(ValueError, match="at least one cascade, got 0"):
        nets.make("unrolled", {"cascades": 0}, seed=0, num_outputs=2)


def test_the_coils_of_a_real_scanner_keep_what_they_measured(data_dir: Path) -> None:
    """There is no whole k-space to compare with: this shows that real coils go through."""
    coils = torch.from_numpy(np.load(data_dir / "mr_kspace" / "cartesian_ksp.npy"))[:2]
    known = coils / coils.abs().max()
    mask = (known.abs() > 0).any(dim=0).float()
    assert 0.1 < float(mask.mean()) < 0.15
    inputs = torch.cat([imaged(known), mask.expand(2, 1, *mask.shape)], dim=1)
    with torch.no_grad():
        found = shaken({"cascades": 2, "channels": 4, "depth": 2})(inputs)
    assert torch.isfinite(found).all()
    assert torch.allclose(measured(found)[:, mask > 0], known[:, mask > 0], atol=1e-4)
    assert not torch.allclose(found, inputs[:, :2], atol=1e-3)


def shaken(params: dict[str, object]) -> torch.nn.Module:
    """Return an unrolled net whose every weight is off zero."""
    net = nets.make("unrolled", params, seed=0, num_outputs=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return net

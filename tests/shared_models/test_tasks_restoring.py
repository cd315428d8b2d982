"""Tasks that give an image back: figures against scikit-image, and that they learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from shared_models import nets
from shared_models.cohort import Patient
from shared_models.contracts import BaselineName
from shared_models.errors import DataError
from shared_models.evaluation import evaluate, evaluate_baselines
from shared_models.randomness import seeded
from shared_models.tasks import Task, objection_to_loss
from shared_models.tasks.denoising import make as make_denoising
from shared_models.tasks.enhancement import make as make_enhancement
from shared_models.tasks.reconstruction import make as make_reconstruction
from shared_models.tasks.restoring import (
    MOST_PSNR,
    check_levels,
    generator_of,
    in_range,
    likeness,
    means,
    panels,
    share_of,
)

TASKS = {
    "denoising": make_denoising(noise="rician"),
    "enhancement": make_enhancement(),
    "reconstruction": make_reconstruction(acceleration=2.5),
}
NETS = {
    "denoising": ("dncnn", {"channels": 8, "depth": 3}),
    "enhancement": ("unet", {"channels": [8, 16, 16], "strides": [1, 2]}),
    "reconstruction": ("unrolled", {"channels": 8, "depth": 4, "cascades": 2}),
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return an image (1, [z,] y, x) of soft shapes, from -1 to 1."""
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    low, high = values.min(), values.max()
    return torch.from_numpy((2 * (values - low) / (high - low) - 1).astype(np.float32))[None]


def patients(number: int, *, first: int = 0) -> list[Patient]:
    return [
        Patient(smooth(24, 32, seed=first + n)[None], torch.zeros(1), ((1.0, 1.0),))
        for n in range(number)
    ]


@pytest.mark.parametrize("shape", [(24, 32), (12, 16, 13)])
def test_likeness_is_scikit_images(shape: tuple[int, ...]) -> None:
    targets = torch.stack([smooth(*shape, seed=1), smooth(*shape, seed=2)])
    outputs = targets + 0.2 * torch.randn(
        targets.shape, generator=torch.Generator().manual_seed(0)
    ) * torch.tensor([1.0, 0.2]).view(2, *[1] * len(shape), 1)
    found = likeness(outputs, targets)
    for image in range(2):
        pair = (targets[image, 0].double().numpy(), outputs[image, 0].double().numpy())
        similarity = np.mean(
            [
                structural_similarity(
                    *planes, data_range=2.0, gaussian_weights=True, use_sample_covariance=False
                )
                for planes in zip(
                    *(volume.reshape(-1, *shape[-2:]) for volume in pair), strict=True
                )
            ]
        )
        assert found[image, 0] == pytest.approx(peak_signal_noise_ratio(*pair, data_range=2.0))
        assert found[image, 1] == pytest.approx(similarity, abs=1e-4)


def test_an_image_given_back_exactly_has_a_finite_ratio() -> None:
    image = smooth(8, 9)[None]  # smaller than the usual window
    assert likeness(image, image).tolist() == [[MOST_PSNR, pytest.approx(1.0)]]


@pytest.mark.parametrize("value", [1.5, -1.5, 300.0, float("nan"), float("inf")])
def test_values_out_of_range_are_refused_with_the_cure(value: float) -> None:
    image = smooth(8, 8)
    image[0, 3, 3] = value
    with pytest.raises(DataError, match=r"from -1 to 1; let the plan's imaging steps bring them"):
        in_range(image)
    for task in TASKS.values():
        with pytest.raises(DataError):
            task.view(image, torch.zeros(()), seeded(0), True)


@pytest.mark.parametrize("levels", [(0.1,), (0.2, 0.1), (-0.1, 0.1), (0.0, 1.1), (0.1, np.nan)])
def test_a_range_to_draw_from_is_two_rising_numbers(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected levels as two numbers"):
        check_levels("levels", levels, most=1.0)


def test_draws_are_between_their_ends_and_the_randomness_decides_them() -> None:
    drawn = [share_of(0.2, 0.5, seeded(n)) for n in range(50)]
    assert 0.2 <= min(drawn) < 0.25
    assert 0.45 < max(drawn) < 0.5
    first, again, other = (generator_of(seeded(n)).random() for n in (1, 1, 2))
    assert first == again != other


def test_a_mean_is_over_the_images_that_tell() -> None:
    scores = np.array([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]])
    assert means(scores, ("a", "b", "c")) == {"a": 2.0, "b": 4.0}
    assert means(np.repeat(scores, 3, axis=0), ("a", "b", "c")) == {"a": 2.0, "b": 4.0}
    assert means(np.zeros((0, 1)), ("a",)) == {}


def test_panels_share_one_scale_of_greys() -> None:
    pixels = panels(torch.full((3, 4), -1.0), torch.full((5, 3, 4), 0.0), torch.full((3, 4), 7.0))
    assert pixels.shape == (3, 16, 3)
    assert pixels[0, :, 0].tolist() == [0] * 4 + [255] * 2 + [128] * 4 + [255] * 6


@each_task
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_losses_keep_their_contract(task: Task, spatial_dims: int) -> None:
    assert objection_to_loss(task, spatial_dims=spatial_dims) is None


@each_task
@pytest.mark.parametrize("shape", [(16, 20), (6, 16, 20)])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_view_spoils_the_image_and_the_randomness_decides_how(
    task: Task, shape: tuple[int, ...], is_training: bool
) -> None:
    image = smooth(*shape)
    before = image.clone()
    first, again, other = (
        task.view(image, torch.zeros(()), seeded(n), is_training) for n in (1, 1, 2)
    )
    assert torch.equal(image, before)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert all(each.dtype == torch.float32 for each in (*first, *other))
    assert first[0].shape == other[0].shape
    assert first[1].shape == (task.num_outputs, *shape)


@each_task
@pytest.mark.parametrize("shape", [(16, 20), (6, 16, 20)])
def test_baselines_and_pictures_are_of_the_targets_shape(
    task: Task, shape: tuple[int, ...]
) -> None:
    views = [task.view(smooth(*shape, seed=n), torch.zeros(()), seeded(n), False) for n in range(3)]
    inputs, targets = (torch.stack(part) for part in zip(*views, strict=True))
    for run in task.baselines.values():
        outputs = run(inputs)
        assert outputs.shape == targets.shape
        assert torch.allclose(run(inputs[1:2])[0], outputs[1], atol=1e-5)
        assert np.isfinite(task.score(outputs, targets, (1.0,) * len(shape))).all()
    pixels, caption = task.picture(inputs[0], targets[0], targets[1])
    assert pixels.shape == (16, 3 * 20 + 4, 3)
    assert " dB" in caption


@each_task
def test_baselines_have_names_that_a_report_can_hold(task: Task) -> None:
    TypeAdapter(dict[BaselineName, object]).validate_python(dict(task.baselines))


@each_task
def test_every_image_of_one_grey_is_scored(task: Task) -> None:
    black = Patient(torch.full((1, 1, 16, 16), -1.0), torch.zeros(1), ((1.0, 1.0),))
    net = nets.make(NETS[task.name][0], NETS[task.name][1], seed=0, num_outputs=task.num_outputs)
    assert {"psnr", "ssim"} <= set(evaluate(net, [black], task=task).metrics)
    assert all("psnr" in e.metrics for e in evaluate_baselines([black], task=task).values())


@pytest.mark.parametrize("name", TASKS)
def test_training_on_a_few_images_improves_the_headline(name: str) -> None:
    task, (family, params) = TASKS[name], NETS[name]
    net = nets.make(family, params, seed=1, num_outputs=task.num_outputs)
    shown, held_out = patients(6), patients(3, first=50)
    before = evaluate(net, held_out, task=task).metrics[task.headline]
    optimizer, randomness = torch.optim.AdamW(net.parameters(), lr=5e-3), seeded(3)
    for _ in range(25):
        views = [task.view(p.images[0], p.targets[0], randomness, True) for p in shown]
        inputs, targets = (torch.stack(part) for part in zip(*views, strict=True))
        optimizer.zero_grad()
        task.loss(net(inputs), targets).mean().backward()
        optimizer.step()
    after = evaluate(net, held_out, task=task).metrics[task.headline]
    assert after > before + {"psnr": 0.4, "ssim": 0.1}[task.headline]

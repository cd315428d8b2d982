"""Only the discriminator sees patients; the generator alone is released."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.fid import get_fid_score
from torch import nn

from shared_models import nets
from shared_models.cohort import Patient
from shared_models.evaluation import evaluate
from shared_models.randomness import seeded
from shared_models.tasks import generation, objection_to_loss
from shared_models.tasks.generation import features_of, frechet

TASK = generation.make(classes=("dark", "bright"), num_generated=16)
PARAMS = {"size": 16, "channels": 4, "latent": 8}


def pair() -> nn.Module:
    return nets.make("gan", PARAMS, seed=0, num_outputs=2)


def patients(count: int, *, seed: int = 0) -> list[Patient]:
    """Return pictures with a light half: the upper one, or the lower one in the second class."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        image = 0.2 + 0.1 * torch.rand((1, 1, 16, 16), generator=generator)
        image[..., 8 * (n % 2) : 8 * (n % 2) + 8, :] += 0.6
        made.append(Patient(image, torch.tensor([n % 2]), ((1.0, 1.0),)))
    return made


def test_the_generators_loss_leaves_the_discriminator_alone_and_the_other_way_round() -> None:
    net = pair()
    assert TASK.free is not None
    value = TASK.free.loss(net, seeded(0))
    value.backward()
    alone = net.generator[0].weight.grad.clone()
    net.zero_grad()
    with torch.no_grad():
        for parameter in net.discriminator.parameters():
            parameter.mul_(1.0)
    TASK.free.loss(net, seeded(0)).backward()
    assert torch.equal(alone, net.generator[0].weight.grad)
    assert all(p.grad is not None for p in net.discriminator.parameters())


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_the_frechet_distance_is_monais() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(200, 6)), random.normal(size=(150, 6)) * 1.5 + 0.3
    expected = float(get_fid_score(torch.from_numpy(x), torch.from_numpy(y)))
    assert frechet(x, y) == pytest.approx(expected, rel=1e-5)
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-9)


def test_features_are_means_and_deviations_of_regions() -> None:
    picture = torch.arange(64.0).view(1, 8, 8)
    found = features_of(picture)[0]
    corner = np.array([0.0, 1, 8, 9])
    assert found[0] == pytest.approx(corner.mean())
    assert found[16] == pytest.approx(corner.std())
    assert found.shape == (32,)


def test_real_pictures_cover_themselves_and_noise_does_not() -> None:
    real = torch.cat([p.images[0] for p in patients(30)])
    again = torch.cat([p.images[0] for p in patients(30, seed=5)])
    labels = torch.arange(30) % 2
    targets = torch.stack([labels, labels], dim=1)
    same = TASK.metrics(TASK.score(torch.stack([real, again], dim=1), targets, (1.0, 1.0)))
    flat = torch.full_like(real, 0.5)
    other = TASK.metrics(TASK.score(torch.stack([real, flat], dim=1), targets, (1.0, 1.0)))
    assert same["coverage"] > 0.8 > other["coverage"]
    assert same["auc_synthetic"] == 1.0
    assert other["frechet"] > same["frechet"]


def test_the_loss_keeps_its_contract() -> None:
    assert objection_to_loss(TASK, spatial_dims=2) is None
    with pytest.raises(ValueError, match="expected a net of spatial_dims = 2"):
        objection_to_loss(TASK, spatial_dims=3)


def test_a_test_shows_the_same_made_picture_each_time() -> None:
    net, test = pair(), patients(12)
    assert evaluate(net, test, task=TASK) == evaluate(net, test, task=TASK)


def test_only_the_generator_is_released() -> None:
    assert TASK.released == ("generator.",)
    names = [name for name, _ in pair().named_parameters()]
    assert any(name.startswith(TASK.released) for name in names)
    assert any(not name.startswith(TASK.released) for name in names)

"""What a patient tells of a clustering is their gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared_models import nets
from shared_models.cohort import Patient
from shared_models.evaluation import evaluate, evaluate_baselines
from shared_models.tasks import clustering, objection_to_loss

TASK = clustering.make(classes=("dark", "bright"), num_clusters=3)


def net_of() -> torch.nn.Module:
    return nets.make("centres", {"size": 16, "latent": 4}, seed=0, num_outputs=3)


def images(count: int) -> torch.Tensor:
    return torch.randn((count, 1, 16, 16), generator=torch.Generator().manual_seed(0))


def test_the_gradient_is_the_offset_from_the_nearest_centre_and_a_count_of_one() -> None:
    net, shown = net_of(), images(5)
    outputs = net(shown)
    embedded, centres = outputs[:, 5:].detach(), net.centres
    for n in range(5):
        net.zero_grad()
        TASK.loss(net(shown[n : n + 1]), torch.zeros(1)).sum().backward()
        apart = (embedded[n] - centres).square().sum(dim=1)
        nearest = int(apart.argmin())
        expected = torch.zeros((3, 4))
        expected[nearest] = embedded[n] - centres[nearest]
        assert torch.allclose(-net.sums.weight.grad, expected, atol=1e-6)
        assert (-net.counts.weight.grad).tolist() == [[float(k == nearest) for k in range(3)]]
        assert net.encoder[0].weight.grad is None
        assert int(outputs[n, 1]) == nearest


def test_metrics_are_scikit_learns_and_need_two_clusters() -> None:
    scores = np.array([[0, 2, 0.0, 1.0], [0, 2, 0.1, 1.0], [1, 0, 1.0, 0.0], [1, 0, 1.0, 0.1]])
    found = TASK.metrics(scores)
    assert found["adjusted_rand"] == 1.0
    assert found["silhouette"] > 0.9
    scores[:, 1] = 0
    assert TASK.metrics(scores) == {"adjusted_rand": 0.0}


def test_a_test_sorts_every_picture_and_so_does_the_baseline() -> None:
    patients = [
        Patient(image[None], torch.tensor([n % 2]), ((1.0, 1.0),))
        for n, image in enumerate(images(12))
    ]
    assert "adjusted_rand" in evaluate(net_of(), patients, task=TASK).metrics
    assert "adjusted_rand" in evaluate_baselines(patients, task=TASK)["by brightness"].metrics


def test_the_loss_keeps_its_contract() -> None:
    assert objection_to_loss(TASK, spatial_dims=2) is None


def test_one_cluster_sorts_nothing() -> None:
    with pytest.raises(ValueError, match="expected two or more clusters"):
        clustering.make(classes=("a", "b"), num_clusters=1)


def test_a_warm_start_learns_to_give_pictures_back() -> None:
    assert TASK.warm is not None
    net, shown = net_of(), images(4)
    losses = TASK.warm(net, shown, torch.zeros(4))
    assert losses.shape == (4,)
    expected = (net.reconstructed(shown) - shown).square().flatten(1).mean(dim=1)
    assert torch.allclose(losses, expected)

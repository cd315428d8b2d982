"""Pictures in few numbers, and what an autoencoder of normal ones finds odd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from shared_models import nets
from shared_models.cohort import Patient
from shared_models.evaluation import evaluate, evaluate_baselines, seen
from shared_models.randomness import seeded
from shared_models.tasks import Task, anomaly, embedding, objection_to_loss

CLASSES = ("normal", "odd", "odder")
EMBEDDING, ANOMALY = embedding.make(classes=CLASSES), anomaly.make(classes=CLASSES)
VARIATIONAL = embedding.make(classes=CLASSES, divergence_weight=0.5)
both = pytest.mark.parametrize("make", [embedding.make, anomaly.make])


def net_of(*, variational: bool = False) -> nn.Module:
    params = {"size": 16, "channels": [4, 8], "latent": 3, "variational": variational}
    return nets.make("autoencoder", params, seed=0, num_outputs=1)


def images(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, 1, 16, 16), generator=torch.Generator().manual_seed(seed))


def patients(count: int) -> list[Patient]:
    return [
        Patient(image[None], torch.tensor([n % 3]), ((1.0, 1.0),))
        for n, image in enumerate(images(count))
    ]


def target_of(image: torch.Tensor, number: int, task: Task = EMBEDDING) -> torch.Tensor:
    return task.view(image, torch.tensor(number), seeded(0), False)[1]


# --- the net


def test_a_variational_net_decodes_its_mean_and_the_noise_it_is_given() -> None:
    net, shown = net_of(variational=True), images(2)
    noise = torch.randn((2, 1, 16, 16), generator=torch.Generator().manual_seed(1))
    mean, logs = net.encoder(shown).chunk(2, dim=1)
    drawn = mean + (logs / 2).exp() * noise.flatten(1)[:, :3]
    quiet, noisy = net(shown), net(torch.cat([shown, noise], dim=1))
    assert torch.equal(quiet[:, 1:4], noisy[:, 1:4])
    assert torch.allclose(quiet[:, 4:], net.decoder(mean).flatten(1))
    assert torch.allclose(noisy[:, 4:], net.decoder(drawn).flatten(1))
    assert torch.equal(noisy, net(torch.cat([shown, noise], dim=1))), "noise of its own"


def test_the_divergence_is_torchs() -> None:
    net, shown = net_of(variational=True), images(3)
    mean, logs = net.encoder(shown).chunk(2, dim=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logs / 2).exp()), normal(0.0, 1.0))
    assert torch.allclose(net(shown)[:, 0], expected.sum(dim=1), atol=1e-5)
    assert net_of()(shown)[:, 0].tolist() == [0.0] * 3


def test_a_picture_that_cannot_be_halved_so_often_is_refused() -> None:
    with pytest.raises(ValueError, match="a size that can be halved once for each of channels"):
        nets.make("autoencoder", {"size": 20}, seed=0, num_outputs=1)


# --- views and losses


@both
def test_noise_comes_with_the_picture_in_training_only(make) -> None:
    task, image = make(classes=CLASSES, divergence_weight=0.5), images(1)[0]
    views = [task.view(image, torch.tensor(2), seeded(0), True) for _ in range(2)]
    assert torch.equal(views[0][0], views[1][0])
    assert views[0][0].shape == (2, 16, 16)
    assert torch.equal(views[0][0][:1], image)
    tested, target = task.view(image, torch.tensor(2), seeded(0), False)
    assert torch.equal(tested, image)
    assert torch.equal(target, torch.cat([image, torch.full_like(image, 2.0)]))
    plain = make(classes=CLASSES).view(image, torch.tensor(2), seeded(0), True)[0]
    assert torch.equal(plain, image)


@both
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 10, 16), (1, 16, 16, 16)])
def test_pictures_that_are_not_for_it_are_refused_with_the_reason(
    make, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="expected pictures of one channel and 11 pixels or more"):
        make(classes=CLASSES).view(torch.zeros(shape), torch.tensor(0), seeded(0), True)


def test_the_loss_is_the_squared_error_and_the_weighted_divergence() -> None:
    net, shown = net_of(variational=True), images(2)
    outputs = net(shown)
    targets = torch.stack([target_of(image, 1) for image in shown])
    apart = (outputs[:, 4:] - shown.flatten(1)).square().mean(dim=1)
    assert torch.allclose(EMBEDDING.loss(outputs, targets), apart)
    expected = apart + 0.5 * outputs[:, 0] / 256
    assert torch.allclose(VARIATIONAL.loss(outputs, targets), expected)


def test_only_normal_pictures_teach_what_is_normal() -> None:
    net, shown = net_of(), images(3)
    losses = ANOMALY.loss(net(shown), torch.stack([target_of(i, n) for n, i in enumerate(shown)]))
    assert float(losses[0].detach()) > 0
    assert losses[1:].tolist() == [0.0, 0.0]
    losses[1:].sum().backward()
    assert not any(parameter.grad.any() for parameter in net.parameters())


@both
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_keeps_its_contract(make, weight: float) -> None:
    task = make(classes=CLASSES, divergence_weight=weight)
    assert objection_to_loss(task, spatial_dims=2) is None
    with pytest.raises(ValueError, match="pictures are embedded, no volumes"):
        objection_to_loss(task, spatial_dims=3)


@both
def test_a_weight_below_0_is_refused(make) -> None:
    with pytest.raises(ValueError, match="expected a divergence_weight of 0 or more"):
        make(classes=CLASSES, divergence_weight=-1.0)


# --- figures


def test_similarity_is_scikit_images() -> None:
    shown, made = images(2), images(2, seed=1)
    shown[1] = 5 * shown[1] - 2
    outputs = torch.cat([torch.zeros((2, 4)), made.flatten(1)], dim=1)
    targets = torch.stack([target_of(image, 1) for image in shown])
    scores = EMBEDDING.score(outputs, targets, (1.0, 1.0))
    assert scores.shape == (2, 5)
    for n in range(2):
        expected = structural_similarity(
            shown[n, 0].double().numpy(),
            made[n, 0].double().numpy(),
            data_range=float(shown[n].max() - shown[n].min()),
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        assert scores[n, 0] == pytest.approx(expected, abs=2e-3)
        assert scores[n, 1] == 1.0


def rows(count: int, *, told: float) -> np.ndarray:
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    embedded = random.normal(size=(count, 4))
    embedded[:, 0] += told * labels
    return np.column_stack([np.ones(count), labels, embedded])


def test_the_probe_is_scikit_learns_ridge_regression_on_the_other_folds() -> None:
    task, scores = embedding.make(classes=("a", "b")), rows(40, told=1.0)
    order = np.lexsort(scores[:, :0:-1].T)
    folds = np.empty(40, dtype=int)
    folds[order] = np.arange(40) % 5
    model = make_pipeline(StandardScaler(), Ridge())
    values = cross_val_predict(model, scores[:, 2:], scores[:, 1], cv=PredefinedSplit(folds))
    expected = roc_auc_score(scores[:, 1], values)
    assert task.metrics(scores)["probe_auc"] == pytest.approx(expected)


def test_repeated_rows_tell_the_probe_nothing_about_each_other() -> None:
    """As in a bootstrap: with many numbers to few pictures, a leak would give an AUC near 1."""
    task, random = embedding.make(classes=("a", "b")), np.random.default_rng(1)
    scores = np.column_stack([np.ones(60), np.arange(60) % 2, random.normal(size=(60, 40))])
    again = task.metrics(np.concatenate([scores, scores[::-1], scores]))
    assert again["probe_auc"] < 0.75


def test_what_cannot_be_probed_is_absent() -> None:
    task, scores = embedding.make(classes=("a", "b")), rows(40, told=1.0)
    assert task.metrics(scores[:0]) == {}
    assert task.metrics(scores[:9]) == {"ssim": 1.0}
    assert task.metrics(np.repeat(scores[:2], 30, axis=0)) == {"ssim": 1.0}
    assert task.metrics(scores[::2]) == {"ssim": 1.0}
    scores[3, 4] = np.nan
    assert task.metrics(scores) == {"ssim": 1.0}


def test_anomalies_are_ranked_by_their_residual() -> None:
    scores = np.array([[0.1, 0.0], [0.3, 1.0], [0.2, 0.0], [0.15, 1.0]])
    assert ANOMALY.metrics(scores) == {"auc": 0.75}
    assert ANOMALY.metrics(scores[::2]) == {}
    net, shown = net_of(), images(3)
    outputs = ANOMALY.run(net, shown)
    found = ANOMALY.score(
        outputs.detach(),
        torch.stack([target_of(i, n) for n, i in enumerate(shown)]),
        (1.0, 1.0),
    )
    apart = (net(shown)[:, 4:] - shown.flatten(1)).square().mean(dim=1)
    assert found[:, 0] == pytest.approx(apart.detach().numpy())
    assert found[:, 1].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("task", [EMBEDDING, ANOMALY], ids=lambda task: task.name)
def test_baselines_are_scored_as_the_net_is(task: Task) -> None:
    shown = patients(18)
    found = evaluate_baselines(shown, task=task)
    assert len(found) == 2
    assert all(task.headline in e.metrics for e in found.values())
    assert task.headline in evaluate(net_of(), shown, task=task).metrics


def test_the_means_of_parts_are_the_embedding_of_a_baseline() -> None:
    run = EMBEDDING.baselines["means of 4 x 4"]
    found = run(images(2))
    parts = images(2).view(2, 4, 4, 4, 4).mean(dim=(2, 4)).flatten(1)
    assert torch.allclose(found[:, 1:17], parts)
    flat = run(torch.full((1, 1, 16, 16), 0.5))
    assert torch.allclose(flat[:, 1:], torch.tensor(0.5))


@pytest.mark.parametrize(("task", "width"), [(EMBEDDING, 32), (ANOMALY, 48)])
def test_a_picture_stands_beside_its_reconstruction(task: Task, width: int) -> None:
    shown = seen(patients(2)[1], 1, task=task)
    output = task.run(net_of(), shown.images)[0].detach()
    pixels, caption = task.picture(shown.images[0], shown.targets[0], output)
    assert pixels.shape == (16, width, 3)
    assert pixels.dtype == np.uint8
    assert "reconstruction" in caption
    assert "truth odd" in caption

"""Embedding: a picture in few numbers, from which it can be made again.

The net is an autoencoder. Labels are classes that it never learns from; a linear probe asks
afterwards how much of them its numbers tell.

References:
    Hinton and Salakhutdinov 2006, Reducing the dimensionality of data with neural networks. Kingma
    and Welling 2014, Auto-encoding variational Bayes, https://arxiv.org/abs/1312.6114. Wang et al.
    2004, Image quality assessment (SSIM). Alain and Bengio 2017, Understanding intermediate layers
    using linear classifier probes, https://arxiv.org/abs/1610.01644.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from shared_models.randomness import Randomness
from shared_models.tasks.base import Pixels, Scores, Task, grey
from shared_models.tasks.classification import make as make_classification

#: The side of the window within which MONAI's SSIM compares; no picture may be smaller.
SSIM_WINDOW = 11
NUM_FOLDS = 5


def make(*, classes: Sequence[str], divergence_weight: float = 0.0) -> Task:
    """Return the task of giving pictures of one channel back from their embedding.

    Metrics: ``ssim``, the structural similarity of picture and reconstruction (MONAI, over each
    picture's own range), and ``probe_auc``, how well a linear probe (ridge regression, five-fold
    cross-validation, one class against the rest) tells the classes from the embedding. Rows that
    are repeated share a fold, but pictures of one patient may not: several of each make the probe
    look better than it is, baselines included. ``probe_auc`` is absent where a class has fewer than
    five different pictures.

    Args:
        classes: as for classification.
        divergence_weight: what a variational net's divergence counts beside the squared error, as
            the pixels' variance; 0 trains a plain autoencoder, without noise.

    Raises:
        ValueError: as for classification, or if ``divergence_weight`` is below 0.
    """
    classification = make_classification(classes=classes)
    if not divergence_weight >= 0:
        raise ValueError(f"expected a divergence_weight of 0 or more, got {divergence_weight}")

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        own = target[0]
        likeness = float(_similarity(output[None], target[None])[0])
        name = classes[int(target[1, 0, 0])]
        caption = f"picture left, reconstruction right; SSIM {likeness:.2f}, truth {name}"
        return grey(torch.cat([own, reconstruction_of(output, own)], dim=1)), caption

    return Task(
        name="embedding",
        headline="ssim",
        label_kind="class",
        num_outputs=1,
        encode_class=classification.encode_class,
        loss=lambda outputs, targets: residual(outputs, targets, divergence_weight),
        score=_score,
        metrics=lambda scores: _metrics(scores, len(classes)),
        picture=picture,
        view=view_with_noise(divergence_weight),
        baselines={f"means of {n} x {n}": _means(n) for n in (4, 8)},
        made_up=made_up,
    )


def view_with_noise(
    divergence_weight: float,
) -> Callable[[Tensor, Tensor, Randomness, bool], tuple[Tensor, Tensor]]:
    """Return a view (channel, y, x) to a picture, and noise beside it for a variational net.

    It is held to (2, y, x): the picture, and a plane of its class.

    Raises:
        ValueError: (the view) if a picture has several channels or is smaller than SSIM compares.
    """

    def view(
        image: Tensor, target: Tensor, randomness: Randomness, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        if image.ndim != 3 or len(image) != 1 or min(image.shape[1:]) < SSIM_WINDOW:
            raise ValueError(
                f"expected pictures of one channel and {SSIM_WINDOW} pixels or more a side, got "
                f"{tuple(image.shape)}"
            )
        both = torch.cat([image, target.to(image).expand_as(image)])
        if not (is_training and divergence_weight):
            return image, both
        noise = torch.from_numpy(randomness.normal(image.numel())).to(image)
        return torch.cat([image, noise.view_as(image)]), both

    return view


def residual(outputs: Tensor, targets: Tensor, divergence_weight: float) -> Tensor:
    """Return the mean squared error of each reconstruction, and its share of divergence: (n,)."""
    pixels = targets[:, 0].flatten(1)
    apart = (outputs[:, -pixels.shape[1] :] - pixels).square().mean(dim=1)
    return apart + divergence_weight * outputs[:, 0] / pixels.shape[1]


def reconstruction_of(output: Tensor, image: Tensor) -> Tensor:
    """Return an output's reconstruction (y, x), within the range of its ``image`` (y, x)."""
    made = output[-image.numel() :].view_as(image)
    return made.clamp(float(image.min()), float(image.max()))


def made_up(generator: torch.Generator, spatial_dims: int) -> tuple[Tensor, Tensor]:
    """Return four outputs of an embedding of 4, and targets of the first two classes in turn."""
    if spatial_dims != 2:
        raise ValueError("expected a net of spatial_dims = 2: pictures are embedded, no volumes")
    planes = (torch.arange(4) % 2).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    images = torch.randn((4, 1, 8, 8), generator=generator)
    return torch.randn((4, 69), generator=generator), torch.cat([images, planes], dim=1)


def _score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
    """Return (batch, 2 + latent): the similarity, the class and the embedding."""
    embedded = outputs[:, 1 : outputs.shape[1] - targets[0, 0].numel()]
    columns = [_similarity(outputs, targets)[:, None], targets[:, 1, :1, 0], embedded]
    return np.asarray(torch.cat([c.double() for c in columns], dim=1).cpu().numpy())


def _similarity(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the SSIM of reconstructions and pictures, over each picture's own range: (n,)."""
    from monai.metrics.regression import compute_ssim_and_cs

    images = targets[:, :1].float()
    made = outputs[:, -images[0].numel() :].float().view_as(images)
    low, high = (f(images, dim=(2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    x, y = ((values - low) / (high - low).clamp(min=1e-6) for values in (made, images))
    windows = (SSIM_WINDOW,) * 2
    found, _ = compute_ssim_and_cs(x, y, 2, windows, (1.5, 1.5), data_range=1.0)
    means: Tensor = found.flatten(1).mean(dim=1)
    return means


def _means(edge: int) -> Callable[[Tensor], Tensor]:
    """Return the embedding of a picture as the means of ``edge`` squared parts of it."""

    def run(inputs: Tensor) -> Tensor:
        means = adaptive_avg_pool2d(inputs, edge)
        back = interpolate(means, inputs.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([inputs.new_zeros((len(inputs), 1)), means.flatten(1), back.flatten(1)], 1)

    return run


def _metrics(scores: Scores, num_classes: int) -> dict[str, float]:
    if not len(scores):
        return {}
    found = {"ssim": float(scores[:, 0].mean())}
    probed = _probed(scores[:, 1].astype(int), scores[:, 2:], num_classes)
    return found if probed is None else found | {"probe_auc": probed}


def _probed(
    labels: NDArray[np.int64], embedded: NDArray[np.float64], num_classes: int
) -> float | None:
    """Return the mean AUC of a linear probe over the classes, if each has enough pictures."""
    from sklearn.metrics import roc_auc_score

    rows = np.concatenate([labels[:, None], embedded], axis=1)
    different, which = np.unique(rows, axis=0, return_inverse=True)
    counts = np.bincount(different[:, 0].astype(int), minlength=num_classes)
    if counts.min() < NUM_FOLDS or not np.isfinite(embedded).all():
        return None
    # sorted by class, so that turns give every fold its share of each
    folds, truth = which.ravel() % NUM_FOLDS, np.eye(num_classes)[labels]
    values = np.zeros_like(truth)
    for fold in range(NUM_FOLDS):
        held = folds == fold
        values[held] = _ridge(embedded[~held], truth[~held], embedded[held])
    columns = slice(1, None) if num_classes == 2 else slice(None)  # of two, each mirrors the other
    return float(roc_auc_score(truth[:, columns], values[:, columns]))


def _ridge(
    x: NDArray[np.float64], y: NDArray[np.float64], asked: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the ridge regression of ``y`` (n, k) on standardized ``x`` (n, d), at ``asked``.

    As scikit-learn's with a penalty of 1, many times as fast: each interval asks for 200 probes.
    """
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation[deviation < 1e-12] = 1.0
    z, middle = (x - mean) / deviation, y.mean(axis=0)
    weights = np.linalg.solve(z.T @ z + np.eye(z.shape[1]), z.T @ (y - middle))
    values: NDArray[np.float64] = (asked - mean) / deviation @ weights + middle
    return values

"""Generation: pictures of nobody that look like those of patients, by an adversarial pair of nets.

Only the discriminator ever sees a patient, through its loss on real pictures; the generator is
trained against it and sees none, and it alone is released. Under differential privacy what it makes
is thereby as private as the discriminator's noised gradients (post-processing).

References:
    Goodfellow et al. 2014, Generative adversarial nets, https://arxiv.org/abs/1406.2661
    (non-saturating losses). Xie et al. 2018, Differentially private generative adversarial network,
    https://arxiv.org/abs/1802.06739 (noise on the discriminator alone). Heusel et al. 2017 (Frechet
    distance), https://arxiv.org/abs/1706.08500. Naeem et al. 2020, Reliable fidelity and diversity
    metrics (coverage), https://arxiv.org/abs/2002.09797.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, softplus

from shared_models.randomness import Randomness
from shared_models.tasks.base import Free, Pixels, Scores, Task, grey
from shared_models.tasks.classification import make as make_classification

#: Features of a picture: the mean and the deviation of each of 16 regions.
REGIONS = 4
NUM_FEATURES = 2 * REGIONS**2
NUM_NEIGHBOURS = 5
GENERATOR = "generator."


def make(*, classes: Sequence[str], num_generated: int = 32, ridge: float = 0.1) -> Task:
    """Return the task of making pictures of each of ``classes``, with values in [-1, 1].

    Metrics, each of one made picture for every real one, over simple features (the mean and the
    deviation of 16 regions): ``coverage``, the share of real pictures with a made one nearer than
    their fifth real neighbour; ``frechet``, the Frechet distance; ``auc_synthetic``, for two
    classes, how well a linear classifier trained on made pictures alone tells real ones apart.

    Args:
        classes: as for classification.
        num_generated: pictures that are made in a step of training.
        ridge: the linear classifier's penalty.

    Raises:
        ValueError: if there are fewer than two classes, or two of one name.
    """
    classification = make_classification(classes=classes)
    num_classes = classification.num_outputs
    if num_generated < 1 or not ridge > 0:
        raise ValueError("expected num_generated of 1 or more and a ridge over 0")

    def view(
        image: Tensor, target: Tensor, randomness: Randomness, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        if is_training:
            return image, target
        noise = torch.from_numpy(randomness.normal(image.numel())).to(image).view_as(image)
        noise[0, 0, 0] = min(int(randomness.uniform(1)[0] * num_classes), num_classes - 1)
        return torch.cat([image, noise]), torch.stack([target, noise[0, 0, 0].long()])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return softplus(-outputs.gather(1, targets[:, None])[:, 0])

    def free(net: nn.Module, randomness: Randomness) -> Tensor:
        pair: Any = net
        at = next(net.parameters())
        drawn = torch.from_numpy(randomness.normal(num_generated * pair.latent))
        noise = drawn.view(num_generated, -1).to(at)
        classes_ = torch.arange(num_generated, device=at.device) % num_classes
        made = pair.generated(noise, classes_)
        fixed = {n: p.detach() for n, p in pair.discriminator.named_parameters()}
        judged = torch.func.functional_call(pair.discriminator, fixed, (made,))
        unmasked = pair.discriminator(made.detach())
        return (softplus(-_of(judged, classes_)) + softplus(_of(unmasked, classes_))).mean()

    def run(net: nn.Module, inputs: Tensor) -> Tensor:
        """Return the real pictures and, beside each, a made one: (batch, 2, y, x)."""
        if inputs.shape[1] == 1:
            return inputs.expand(-1, 2, -1, -1)
        pair: Any = net
        noise = inputs[:, 1].flatten(1)
        made = pair.generated(noise[:, 1 : 1 + pair.latent], noise[:, 0].long())
        return torch.cat([inputs[:, :1], made], dim=1)

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        name = classification.picture(image, target[1], torch.eye(num_classes)[int(target[1])])[1]
        made = name.partition(" (")[0].removeprefix("predicted ")
        both = np.concatenate([grey(output[0]), grey(output[1])], axis=1)
        return both, f"a real picture left, a made one of {made} right"

    def made_up(generator: torch.Generator, spatial_dims: int) -> tuple[Tensor, Tensor]:
        if spatial_dims != 2:
            raise ValueError("expected a net of spatial_dims = 2: pictures are made, no volumes")
        return torch.randn((4, num_classes), generator=generator), torch.arange(4) % num_classes

    return Task(
        name="generation",
        headline="coverage",
        label_kind="class",
        num_outputs=num_classes,
        encode_class=classification.encode_class,
        loss=loss,
        score=_score,
        metrics=lambda scores: _metrics(scores, num_classes, ridge),
        picture=picture,
        view=view,
        run=run,
        free=Free(free, only=(GENERATOR,)),
        released=(GENERATOR,),
        baselines={"noise": _noise},
        answer="picture",
        made_up=made_up,
        covers=(
            "Only the discriminator sees patients, and its gradients are clipped and noised. The "
            "generator, which alone is released, learns from the discriminator and from no patient."
        ),
    )


def features_of(pictures: Tensor) -> NDArray[np.float64]:
    """Return the mean and the deviation of 16 regions of each picture (n, y, x): (n, 32)."""
    images = pictures[:, None].double()
    means = adaptive_avg_pool2d(images, REGIONS)
    squares = adaptive_avg_pool2d(images.square(), REGIONS)
    deviations = (squares - means.square()).clamp(min=0).sqrt()
    return np.asarray(torch.cat([means.flatten(1), deviations.flatten(1)], dim=1).numpy())


def _of(outputs: Tensor, classes: Tensor) -> Tensor:
    return outputs.gather(1, classes[:, None])[:, 0]


def _score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
    """Return (batch, 2 + 64): class and features of the real picture, then of the made one."""
    real, made = features_of(outputs[:, 0]), features_of(outputs[:, 1])
    labels = targets.double().numpy()
    return np.concatenate([labels[:, :1], real, labels[:, 1:], made], axis=1)


def _metrics(scores: Scores, num_classes: int, ridge: float) -> dict[str, float]:
    from monai.metrics import compute_roc_auc
    from scipy.spatial.distance import cdist

    real, made = np.split(scores, 2, axis=1)
    if len(scores) <= NUM_NEIGHBOURS:
        return {}
    x, y = real[:, 1:], made[:, 1:]
    apart = np.partition(cdist(x, np.unique(x, axis=0)), NUM_NEIGHBOURS, axis=1)
    found = {
        "coverage": float((cdist(x, y).min(axis=1) <= apart[:, NUM_NEIGHBOURS]).mean()),
        "frechet": frechet(x, y),
    }
    both = all(len(np.unique(part[:, 0])) == num_classes for part in (real, made))
    if num_classes == 2 and both:
        values = _classified(y, made[:, 0], x, ridge)
        labels = torch.from_numpy(real[:, 0])
        found["auc_synthetic"] = float(
            np.asarray(compute_roc_auc(torch.from_numpy(values), labels))
        )
    return found


def frechet(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the Frechet distance of two Gaussians with the means and covariances of (n, d)."""
    halves = []
    for part in (x, y):
        values, vectors = np.linalg.eigh(np.cov(part, rowvar=False))
        halves.append((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
    traces = sum(float(np.trace(half @ half)) for half in halves)
    shared = float(np.linalg.svd(halves[0] @ halves[1], compute_uv=False).sum())
    apart = float(np.square(x.mean(axis=0) - y.mean(axis=0)).sum())
    return max(apart + traces - 2 * shared, 0.0)


def _classified(
    made: NDArray[np.float64], labels: NDArray[np.float64], real: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """Return how a linear classifier fitted to ``made`` and its labels values ``real``: (n,)."""
    mean, deviation = made.mean(axis=0), made.std(axis=0) + 1e-6
    x = (made - mean) / deviation
    penalty = ridge * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + penalty, x.T @ (labels - labels.mean()))
    values: NDArray[np.float64] = ((real - mean) / deviation) @ weights
    return values


def _noise(inputs: Tensor) -> Tensor:
    """Return the real pictures and noise beside them."""
    return torch.cat([inputs[:, :1], inputs[:, 1:].tanh()], dim=1)

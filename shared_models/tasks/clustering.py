"""Clustering: which pictures are alike, by k-means over embeddings.

A patient tells, of each of their pictures, an offset from the nearest centre and a count of one.
Both are the gradient of that patient's loss, which is linear in the net's ``sums`` and ``counts``:
clipped and noised by the same engine as any other, averaged by the strategy ``lloyd``.

References:
    Lloyd 1982, Least squares quantization in PCM. Hubert and Arabie 1985, Comparing partitions.
    Rousseeuw 1987, Silhouettes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from shared_models.tasks.base import Pixels, Scores, Task, grey
from shared_models.tasks.classification import make as make_classification


def make(*, classes: Sequence[str], num_clusters: int = 4) -> Task:
    """Return the task of sorting pictures into ``num_clusters``, of which the labels know nothing.

    Labels are classes, and only compared with. Metrics (scikit-learn): ``adjusted_rand``, how well
    clusters and classes agree, 0 by chance; ``silhouette``, how much nearer a picture lies to its
    own cluster than to the next.

    Raises:
        ValueError: as for classification, or if there are fewer than two clusters.
    """
    classification = make_classification(classes=classes)
    if num_clusters < 2:
        raise ValueError(f"expected two or more clusters, got {num_clusters}")

    def baseline(inputs: Tensor) -> Tensor:
        """Sort by brightness, in equal steps of it."""
        brightness = inputs.flatten(1).mean(dim=1, keepdim=True)
        steps = (brightness.sigmoid() * num_clusters).floor().clamp(0, num_clusters - 1)
        apart = (torch.arange(num_clusters) - steps).square()
        return torch.cat([torch.zeros_like(steps), steps, apart, brightness], dim=1)

    def score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
        """Return (batch, 2 + latent): the class, the cluster and the embedding."""
        embedded = outputs[:, 2 + num_clusters :].double()
        columns = [targets[:, None].double(), outputs[:, 1:2].double(), embedded]
        return np.asarray(torch.cat(columns, dim=1).numpy())

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        name = classes[int(target)]
        return grey(image[0]), f"cluster {int(output[1]) + 1} of {num_clusters}; truth {name}"

    def made_up(generator: torch.Generator, spatial_dims: int) -> tuple[Tensor, Tensor]:
        return torch.randn((4, 6 + num_clusters), generator=generator), torch.arange(4) % 2

    return Task(
        name="clustering",
        headline="adjusted_rand",
        label_kind="class",
        num_outputs=num_clusters,
        encode_class=classification.encode_class,
        loss=lambda outputs, targets: -outputs[:, 0],
        score=score,
        metrics=_metrics,
        picture=picture,
        warm=_reconstruction_loss,
        baselines={"by brightness": baseline},
        answer="cluster",
        made_up=made_up,
        covers=(
            "What one patient adds to the clusters' sums and counts is that patient's gradient: "
            "clipped, and the patients' sum noised. No patient of a site trains the encoder."
        ),
    )


def _reconstruction_loss(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Return how unlike its reconstruction each image is: (batch,)."""
    encoder: Any = net
    apart = mse_loss(encoder.reconstructed(images), images, reduction="none")
    return apart.flatten(1).mean(dim=1)


def _metrics(scores: Scores) -> dict[str, float]:
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    if len(scores) < 2:
        return {}
    classes, clusters = scores[:, 0].astype(int), scores[:, 1].astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {"adjusted_rand": float(adjusted_rand_score(classes, clusters))}
        if 1 < len(np.unique(clusters)) < len(scores):
            found["silhouette"] = float(silhouette_score(scores[:, 2:], clusters))
    return found

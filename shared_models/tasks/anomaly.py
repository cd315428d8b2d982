"""Anomaly: what is unlike the normal pictures, by how badly an autoencoder of those gives it back.

The first class is the normal one. A picture of another class adds nothing to training: its loss and
its gradient are zero, and its patient is drawn, clipped and counted like any other.

References:
    Baur et al. 2021, Autoencoders for unsupervised anomaly segmentation in brain MR images: a
    comparative study, https://arxiv.org/abs/2004.03271. Meissen et al. 2022, On the pitfalls of
    using the residual as anomaly score, https://arxiv.org/abs/2202.03826 (it may do worse than
    brightness).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shared_models.tasks.base import Pixels, Scores, Task, grey
from shared_models.tasks.classification import make as make_classification
from shared_models.tasks.embedding import (
    made_up,
    reconstruction_of,
    residual,
    view_with_noise,
)


def make(*, classes: Sequence[str], divergence_weight: float = 0.0) -> Task:
    """Return the task of telling all other classes from the first, which alone is learned from.

    Metric: ``auc`` (MONAI) of the mean squared residual; absent unless normal pictures and others
    occur. A site without normal pictures learns nothing, and its update is that of no gradient.

    Args:
        classes: as for classification; the first is the normal one.
        divergence_weight: as for the task ``embedding``.

    Raises:
        ValueError: as for the task ``embedding``.
    """
    classification = make_classification(classes=classes)
    if not divergence_weight >= 0:
        raise ValueError(f"expected a divergence_weight of 0 or more, got {divergence_weight}")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = residual(outputs, targets, divergence_weight)
        return torch.where(targets[:, 1, 0, 0] == 0, found, 0.0)

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        own, name = target[0], classes[int(target[1, 0, 0])]
        made = reconstruction_of(output, own)
        both = grey(torch.cat([own, made], dim=1))
        pixels = np.concatenate([both, grey((own - made).abs())], axis=1)
        score = float(output[0])
        return pixels, f"picture, reconstruction, difference; score {score:.4f}, truth {name}"

    return Task(
        name="anomaly",
        headline="auc",
        label_kind="class",
        num_outputs=1,
        encode_class=classification.encode_class,
        loss=loss,
        score=_score,
        metrics=_metrics,
        picture=picture,
        view=view_with_noise(divergence_weight),
        run=_run,
        baselines={"mean intensity": _mean_intensity, "gradient energy": _gradient_energy},
        made_up=made_up,
    )


def _run(net: nn.Module, inputs: Tensor) -> Tensor:
    """Return (batch, 1 + y * x): how anomalous a picture is, and its reconstruction."""
    made = net(inputs)[:, -inputs[0].numel() :]
    apart = (made - inputs.flatten(1)).square().mean(dim=1, keepdim=True)
    return torch.cat([apart, made], dim=1)


def _mean_intensity(inputs: Tensor) -> Tensor:
    pixels = inputs.flatten(1)
    return torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1)


def _gradient_energy(inputs: Tensor) -> Tensor:
    """Score a picture by the mean square of its steps from pixel to pixel."""
    energy = sum(inputs.diff(dim=axis).square().flatten(1).mean(dim=1) for axis in (2, 3))
    assert isinstance(energy, Tensor)
    return torch.cat([energy[:, None], inputs.flatten(1)], dim=1)


def _score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
    """Return (batch, 2): how anomalous, and 1 for what is not normal."""
    is_other = targets[:, 1, 0, :1] > 0
    return np.asarray(torch.cat([outputs[:, :1].double(), is_other.double()], dim=1).cpu().numpy())


def _metrics(scores: Scores) -> dict[str, float]:
    from monai.metrics import compute_roc_auc

    if len(np.unique(scores[:, 1])) < 2:
        return {}
    values, truth = torch.from_numpy(scores).unbind(dim=1)
    return {"auc": float(np.asarray(compute_roc_auc(values, truth)))}

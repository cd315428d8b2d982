"""Classification: one of several classes for each image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from shared_models.tasks.base import Pixels, Scores, Task, grey


def make(*, classes: Sequence[str]) -> Task:
    """Return the task of telling ``classes`` apart; labels are their names or numbers from 0.

    Where a class is called like another's number, the name counts.

    Metrics: ``auc`` (MONAI; one against the rest, averaged, for more than two classes),
    ``accuracy``, and for two classes ``sensitivity`` and ``specificity`` of the second class at
    probability one half. ``auc`` is absent where only one class occurs.

    Raises:
        ValueError: if there are fewer than two classes, or two of one name.
    """
    classes = [str(name) for name in classes]
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise ValueError(f"expected two or more different classes, got {len(classes)}")
    by_number = {str(i): i for i in range(len(classes))}
    numbers = by_number | {name: i for i, name in enumerate(classes)}  # a name beats a number

    def encode_class(label: str) -> int:
        if label not in numbers:
            raise ValueError(f"expected a label that is one of {', '.join(classes)} or its number")
        return numbers[label]

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        share = torch.softmax(output, dim=0)
        guess = int(share.argmax())
        caption = (
            f"predicted {classes[guess]} ({float(share[guess]):.0%}), truth {classes[int(target)]}"
        )
        return grey(image[0]), caption

    return Task(
        name="classification",
        headline="auc",
        label_kind="class",
        num_outputs=len(classes),
        encode_class=encode_class,
        loss=_loss,
        score=_score,
        metrics=_metrics,
        picture=picture,
    )


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def _score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
    """Return (batch, classes + 1): the probabilities and the true class."""
    shares = torch.softmax(outputs.float(), dim=1).double()
    return np.asarray(torch.cat([shares, targets[:, None].double()], dim=1).cpu().numpy())


def _metrics(scores: Scores) -> dict[str, float]:
    from monai.metrics import compute_confusion_matrix_metric, compute_roc_auc, get_confusion_matrix

    if not len(scores):
        return {}
    shares, truth = torch.from_numpy(scores[:, :-1]), torch.from_numpy(scores[:, -1]).long()
    one_hot = torch.nn.functional.one_hot(truth, shares.shape[1])
    found: dict[str, float] = {}
    if len(np.unique(scores[:, -1])) == shares.shape[1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair = (shares[:, 1], truth) if shares.shape[1] == 2 else (shares, one_hot)
            found["auc"] = float(np.asarray(compute_roc_auc(*pair, average="macro")))
    guess = shares.argmax(dim=1)
    found["accuracy"] = float((guess == truth).double().mean())
    if shares.shape[1] == 2:
        counts = get_confusion_matrix(guess[:, None], truth[:, None]).sum(dim=(0, 1))
        for name, present in (
            ("sensitivity", (truth == 1).any()),
            ("specificity", (truth == 0).any()),
        ):
            if present:
                found[name] = float(compute_confusion_matrix_metric(name, counts))
    return found

"""Answers that are classes: which of several, and how the model divides its certainty among them.

A net for pictures looks at each slice by itself; what is said of the series is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from client.display import infer
from client.display.base import Asked, Kind, Result
from client.display.prediction import Classified, ClassShare

if TYPE_CHECKING:
    from torch import Tensor

    from client.display.objects import Origin


def read(outputs: Tensor, asked: Asked) -> Result:
    """Return the classes by their share of certainty, the greatest first."""
    import torch

    shares = torch.softmax(outputs.double(), dim=1)
    mean = shares.mean(dim=0)
    order = [int(place) for place in mean.argsort(descending=True)]
    names = asked.released.classes
    classes = tuple(
        ClassShare(name=names[place], probability=round(float(mean[place]), 4)) for place in order
    )
    leading = shares[:, order[0]]
    by_slice = tuple(round(float(share), 4) for share in leading) if len(leading) > 1 else ()
    shown = asked.study.shown
    is_by_slice = bool(by_slice) and infer.are_same_slices(asked.prepared, shown)
    key = int(leading.argmax()) if is_by_slice else shown.data.shape[0] // 2
    answer = Classified(classes=classes, by_slice=by_slice if is_by_slice else ())
    return Result(answer, None, (), (key,))


def report(result: Result, headers: Sequence[Any], origin: Origin) -> list[tuple[str, Any]]:
    """Return the report of the classes."""
    from client.display import objects

    assert isinstance(result.answer, Classified)
    return [("classes.dcm", objects.classes(result.answer.classes, headers, origin))]


KIND = Kind(read, report)

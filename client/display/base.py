"""What a kind of answer is: a pair of functions, chosen by what the task's labels mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.display.prediction import Classified, Legend, Outlined
from client.display.release import Released
from client.display.study import Study
from shared_models.volume import Volume

if TYPE_CHECKING:
    from torch import Tensor

    from client.display.objects import Origin


class Asked(NamedTuple):
    """A study, the model it was given to, and what the plan's steps made of it."""

    study: Study
    released: Released
    prepared: Volume


class Result(NamedTuple):
    """What the model said, in the study's own voxels.

    Attributes:
        answer: for the pages.
        labels: uint8 (z, y, x) of the volume that is shown, painted over it; None if nothing is.
        legend: what the numbers in ``labels`` stand for, from 1.
        key_slices: those that show best what was said, from 0.
    """

    answer: Outlined | Classified
    labels: NDArray[np.uint8] | None
    legend: tuple[Legend, ...]
    key_slices: tuple[int, ...]


class Kind(NamedTuple):
    """How one kind of outputs is understood.

    Attributes:
        read: the net's outputs (``infer.outputs``) become a result.
        report: a result becomes DICOM objects besides the key images, each with its file's name.
    """

    read: Callable[[Tensor, Asked], Result]
    report: Callable[[Result, Sequence[Any], Origin], list[tuple[str, Any]]]

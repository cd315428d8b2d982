"""The abstraction: a strategy is a pair of pure functions.

``init(weights) -> state`` and ``step(weights, updates, state) -> (weights, state)``. ``updates`` is
an iterable consumed once, so that a mean keeps one sum in memory and not one model per site. State
is arrays by name: saved and loaded, it continues bit for bit. Weights, updates and state may lie in
files, where an array is read each time it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_models.weights import Array, Weights

State = Mapping[str, NDArray[np.float64]]


class Update(NamedTuple):
    """What one site sends: ``arrays`` are trained weights minus the weights it was sent."""

    site: str
    num_patients: int
    arrays: Weights


Init = Callable[[Weights], State]
Step = Callable[[Weights, Iterable[Update], State], tuple[dict[str, Array], State]]


class Strategy(NamedTuple):
    """A pair of pure functions; see the module's docstring."""

    init: Init
    step: Step

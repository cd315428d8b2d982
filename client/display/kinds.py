"""Which kinds of answers can be shown, by what the task answers with.

A task of another kind (boxes, an image, a point) needs a module like ``maps.py`` here, a model in
``prediction.py``, and its part of each page.
"""

from __future__ import annotations

from client.display import classes, maps
from client.display.base import Kind
from client.display.release import Released
from shared_models.errors import DocumentError

KINDS: dict[str, Kind] = {"class": classes.KIND, "map": maps.KIND}


def kind_of(released: Released) -> Kind:
    """Return how the outputs of a release are understood.

    Raises:
        DocumentError: if nothing here understands them, or the plan does not name the classes.
    """
    answer = released.task.answer or released.task.label_kind
    if answer not in KINDS:
        raise DocumentError(
            f"the model's answers are of kind '{answer}', which cannot be shown yet; "
            f"known: {', '.join(sorted(KINDS))}"
        )
    expected = released.task.num_outputs - (1 if answer == "map" else 0)
    if len(released.classes) != expected:
        raise DocumentError(
            f"the plan names {len(released.classes)} classes, the model's answers have {expected}; "
            "they cannot be told apart"
        )
    return KINDS[answer]

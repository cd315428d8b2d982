"""What the three commands share: how they fail, and how they print a balance, a number, a size."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared_models.contracts import Reservation
from shared_models.errors import ConsiliaError
from shared_models.privacy import Spent, spent, studies_of

if TYPE_CHECKING:
    import typer


def balance(
    ledger: Sequence[Reservation],
    *,
    as_json: bool,
    delta: float | None = None,
    per_study: float | None = None,
    lifetime: float | None = None,
) -> str:
    """Return what each study, and all together, cost a patient, beside the limits if there are any.

    Each epsilon is stated at ``delta``, or else at the smallest delta agreed for what it counts.
    """
    studies = {study: spent(ledger, study=study, delta=delta) for study in studies_of(ledger)}
    total = spent(ledger, delta=delta)
    shares = max((entry.event.noise_shares for entry in ledger), default=1)
    if as_json:
        costs = {study: cost._asdict() for study, cost in studies.items()}
        found = {"unit": "patient", "studies": costs, "lifetime": total._asdict()}
        return json.dumps({**found, "noise_shares": shares})
    lines = [_cost(f"study {study[:12]}", cost, per_study) for study, cost in studies.items()]
    lines += [_cost("all studies", total, lifetime)]
    lines += ["per patient; dp_accounting PLD, rounded up; Poisson; add or remove one patient"]
    if shares > 1:
        lines += [
            f"in sums over sites only, as long as {shares} of them keep their noise to themselves"
        ]
    return "\n".join(lines)


def _cost(what: str, cost: Spent, limit: float | None) -> str:
    at = "" if cost.delta is None else f" at delta {cost.delta:g}"
    of = "" if limit is None else f" of {limit:g}"
    return f"{what:18}  epsilon {cost.epsilon:.4f}{of}{at}"


def upward(value: float, *, places: int = 2) -> str:
    """Return what was spent, rounded up: ``4.38`` of 4.3712; the 4 of 4.0 stays ``4``."""
    return _short(math.ceil(round(value * 10**places, 6)) / 10**places, places)


def downward(value: float, *, places: int = 2) -> str:
    """Return what is left, rounded down."""
    return _short(math.floor(round(value * 10**places, 6)) / 10**places, places)


def size(num_bytes: float) -> str:
    """Return a number of bytes as people read it: ``1.2 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def printable(text: str) -> str:
    """Return ``text`` without anything that could move a terminal's cursor or change its colour."""
    return "".join(c if c.isprintable() else " " for c in text)


def _short(value: float, places: int) -> str:
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if float(text) == round(value) else text


def run_app(app: typer.Typer) -> None:
    """Run ``app``; print a known error's sentences to standard error and leave with its code."""
    try:
        app()
    except ConsiliaError as error:
        for objection in error.objections:
            sys.stderr.write(f"{objection}\n")
        sys.exit(error.exit_code)

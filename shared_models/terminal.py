"""What the three commands share: how they fail, and how they print a ledger's balance."""

from __future__ import annotations

import json
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


def run_app(app: typer.Typer) -> None:
    """Run ``app``; print a known error's sentences to standard error and leave with its code."""
    try:
        app()
    except ConsiliaError as error:
        for objection in error.objections:
            sys.stderr.write(f"{objection}\n")
        sys.exit(error.exit_code)

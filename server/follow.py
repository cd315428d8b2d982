"""Tells how a study fares while it runs, from what its run directory holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from server import report, store
from shared_models.contracts import RoundRecord
from shared_models.errors import RunError
from shared_models.plan import StudyPlan

POLL_S = 0.3


class Progress(Protocol):
    """How a person is told what is going on."""

    def stage(self, text: str, *, total: int | None = None) -> None:
        """Begin a stage of ``total`` parts."""

    def advance(self, done: int, text: str = "") -> None:
        """Say how many parts are done, and a word on the last one."""

    def note(self, text: str) -> None:
        """Say in a line what is to be remembered of the stage."""


def follow(
    run_dir: Path, progress: Progress, *, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Show a study's rounds until it ends in a report or a fingerprint, or ``meanwhile`` raises.

    Raises:
        RunError: with what a person must put right, if it fails.
    """
    plan, num_shown = store.read_plan(run_dir).plan, 0
    if plan.fingerprint is not None:
        progress.stage("every hospital measures its images")
    else:
        progress.stage("federated rounds", total=plan.training.num_rounds)
    while not ((run_dir / report.HTML_NAME).exists() or store.has_fingerprint(run_dir)):
        if failure := store.read_failure(run_dir):
            raise RunError(failure)
        records = store.read_rounds(run_dir)
        for number in range(num_shown, len(records)):
            show(records[: number + 1], plan, progress)
        num_shown = len(records)
        meanwhile()
        time.sleep(POLL_S)


def show(records: Sequence[RoundRecord], plan: StudyPlan, progress: Progress) -> None:
    """Tell of the last of ``records``, the rounds so far."""
    last, trained = records[-1], sum(record.kind == "train" for record in records)
    if last.kind == "train":
        found = last.validation.metrics if last.validation else {}
        progress.advance(trained, ", ".join(f"{k} {v:.3f}" for k, v in list(found.items())[:1]))
        if trained == plan.training.num_rounds:
            progress.stage("final evaluation at every hospital")
    elif last.kind == "evaluate" and plan.compare_alone:
        progress.stage("each hospital trains alone, to compare")

"""What the three commands share: how they fail."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shared_models.errors import ConsiliaError

if TYPE_CHECKING:
    import typer


def run_app(app: typer.Typer) -> None:
    """Run ``app``; print a known error's sentences to standard error and leave with its code."""
    try:
        app()
    except ConsiliaError as error:
        for objection in error.objections:
            sys.stderr.write(f"{objection}\n")
        sys.exit(error.exit_code)

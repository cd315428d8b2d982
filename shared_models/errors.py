"""Errors that cross rooms, each with an exit code that is never reused.

A programmer's mistake is a ``ValueError`` or ``TypeError``; a refusal by policy is a ``Refusal``
value. What is here is for broken files, broken peers and a machine that lacks something.
"""

from __future__ import annotations

from collections.abc import Iterable


class ConsiliaError(Exception):
    """One or more sentences a person can act on, and the exit code of the command that met them."""

    exit_code = 10

    def __init__(self, objections: str | Iterable[str]) -> None:
        self.objections = (objections,) if isinstance(objections, str) else tuple(objections)
        super().__init__("\n".join(self.objections))


class DataError(ConsiliaError):
    """Images or labels that are missing, broken or do not fit the plan."""

    exit_code = 11


class DocumentError(ConsiliaError):
    """A plan, a configuration or a record that cannot be read."""

    exit_code = 12


class SignatureError(ConsiliaError):
    """Something that should be signed is not, or not by the right key."""

    exit_code = 13


class MachineError(ConsiliaError):
    """No disk space, no free port, a process that would not start."""

    exit_code = 14


class RunError(ConsiliaError):
    """A study that could not be completed: no quorum, a lost peer, a crashed server."""

    exit_code = 15


class LedgerError(ConsiliaError):
    """A privacy ledger that is broken or whose budget is spent."""

    exit_code = 16


EXIT_CODES = {
    0: "yes, or done",
    1: "no, or refused",
    2: "wrong usage",
    ConsiliaError.exit_code: "something else a person must put right",
    **{
        error.exit_code: (error.__doc__ or "").split("\n")[0].rstrip(".")
        for error in (
            DataError,
            DocumentError,
            SignatureError,
            MachineError,
            RunError,
            LedgerError,
        )
    },
    130: "interrupted; every process was ended",
}

EXIT_CODES_HELP = "Exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items())

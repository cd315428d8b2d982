"""The coordinator's run directory: one study, one folder.

plan.toml               the signed plan
run.json                this machine's settings for it (RunSettings)
approvals/<site>.json   the sites' countersignatures
rounds.jsonl            one RoundRecord a line, flushed as rounds end: the line is the commit
attempts.jsonl          one Attempt a line, only under secure aggregation, before its orders go out
checkpoints/<round>.safetensors
                        what the round after <round> begins with: ``round`` (rounds done, int64),
                        ``weights/<name>``, ``average/<name>`` (float32), ``state/<name>``; there
                        before the round's line, and removed once a later round's line is, or the
                        report
model/                  the released weights and their manifest
report.json, report.html
fingerprint.json        instead of these and the model, of a plan that asks for a fingerprint
failed.txt              only if the run failed: the sentences a person should read
run.lock                held by the process that runs the study, and its number

A killed coordinator is started again on the same folder. The last whole line of rounds.jsonl says
where it stood: a line that was cut short, and a checkpoint whose round has no line, are as if they
had never been, and that round is asked again.

Guarantees:
    A round that has its line is not asked again, and what the next one begins with is on disk.
    A masked round is never asked twice under one attempt.
    A checkpoint that is missing, unreadable or not of the recorded weights is refused.
    A run directory that a process holds is refused to others, until that process ends.

Design: the record's digest is of the released weights only. Where the plan keeps no average those
are the weights trained from; else these, and the strategy's state, are as good as the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from server.rounds import Attempts, Progress
from shared_models import plan as plans
from shared_models.contracts import (
    Contract,
    Count,
    Countersignature,
    PublicKey,
    RoundRecord,
    SiteName,
)
from shared_models.errors import DocumentError, SignatureError
from shared_models.files import append_line, is_locked, locked, replace
from shared_models.plan import SignedPlan
from shared_models.signing import digest, is_signed_by
from shared_models.weights import Place, Stored, entries, load, packed, serialized
from shared_models.weights import digest as weights_digest

ROUNDS = "rounds.jsonl"
ATTEMPTS = "attempts.jsonl"
CHECKPOINTS = "checkpoints"
FINGERPRINT = "fingerprint.json"
FAILED = "failed.txt"
LOCK = "run.lock"
LOCK_S = 5.0  # for a process that was killed to be gone, and for a look at the lock
RESTORE = "restore {what} from a copy, or run the study in a new folder"

AnyContract = TypeVar("AnyContract", bound=Contract)


class SiteKeys(Contract):
    """A site's public keys: ``signing`` for what it says, ``node`` (OpenSSH) for its connection."""

    signing: PublicKey
    node: str | None = None


class RunSettings(Contract):
    """What this machine needs to know to run the study; none of it is agreed with the sites."""

    signing_key: Path
    sites: dict[SiteName, SiteKeys]
    validation_manifest: Path | None = None
    validation_root: Path | None = None
    threads: Annotated[int, Field(ge=1)] = 1
    data: str = ""
    notes: tuple[str, ...] = ()


class Attempt(Contract):
    """One line of ``attempts.jsonl``: a masked round that may have been asked under this number."""

    round_: Count
    attempt: Count


def read_plan(run_dir: Path) -> SignedPlan:
    """Read the run's plan and insist on its coordinator's signature.

    Raises:
        DocumentError: if it cannot be read.
        SignatureError: if its own coordinator did not sign it.
    """
    signed = plans.read(run_dir / "plan.toml")
    if not is_signed_by(signed.plan, signed.signature, key=signed.plan.coordinator):
        raise SignatureError("the plan is not signed by its coordinator; restore it from a copy")
    return signed


def read_settings(run_dir: Path) -> RunSettings:
    """Read ``run.json``."""
    try:
        return RunSettings.model_validate_json(plans.read_text(run_dir / "run.json"))
    except ValidationError as error:
        raise DocumentError(plans.sentences(error, model=RunSettings)) from error


def write_settings(run_dir: Path, settings: RunSettings) -> None:
    """Write ``run.json``."""
    replace(run_dir / "run.json", settings.model_dump_json(indent=2).encode())


def lock(run_dir: Path) -> AbstractContextManager[None]:
    """Return what holds the run directory for this process alone.

    Raises:
        MachineError: on entering, if another process holds it.
    """
    refusal = f"another coordinator runs the study in {run_dir}; stop it, or wait until it is done"
    return locked(run_dir / LOCK, refusal=refusal, patience_s=LOCK_S)


def is_running(run_dir: Path) -> bool:
    """Return whether a process holds the run directory."""
    return is_locked(run_dir / LOCK)


def has_fingerprint(run_dir: Path) -> bool:
    """Return whether the study's fingerprint is there, with which such a study ends."""
    return (run_dir / FINGERPRINT).exists()


def write_failure(run_dir: Path, objections: Sequence[str]) -> None:
    """Say in ``failed.txt`` why the run failed."""
    replace(run_dir / FAILED, "\n".join(objections).encode())


def read_failure(run_dir: Path) -> tuple[str, ...]:
    """Return why the run failed; empty if it did not."""
    try:
        return tuple((run_dir / FAILED).read_text(encoding="utf-8").splitlines())
    except FileNotFoundError:
        return ()


def forget_failure(run_dir: Path) -> None:
    """Let a run that failed be run again."""
    (run_dir / FAILED).unlink(missing_ok=True)


def approvals(
    run_dir: Path, signed: SignedPlan, settings: RunSettings
) -> dict[str, Countersignature]:
    """Return by site the countersignatures over exactly this plan that are on file."""
    found = {site: _approval(run_dir, site, signed, settings) for site in signed.plan.sites}
    return {site: approval for site, approval in found.items() if approval is not None}


def append_round(run_dir: Path, record: RoundRecord) -> None:
    """Add a finished round; on disk when this returns."""
    append_line(run_dir / ROUNDS, record.model_dump_json())


def read_rounds(run_dir: Path) -> list[RoundRecord]:
    """Return the rounds so far, whole lines only.

    Raises:
        DocumentError: if a whole line is no record.
    """
    return read_lines(run_dir / ROUNDS, RoundRecord)


def commit_round(run_dir: Path, record: RoundRecord, progress: Progress) -> None:
    """Add a finished training round with what the next begins with; on disk when this returns."""
    keep_checkpoint(run_dir, progress)
    append_round(run_dir, record)
    drop_checkpoints(run_dir, but=progress.num_rounds)


def keep_checkpoint(run_dir: Path, progress: Progress) -> None:
    """Put ``progress`` on disk; it counts once its round has a line."""
    written = entries({"round": np.array([progress.num_rounds], np.int64)})
    for part, named in _parts(progress).items():
        written += entries(named, prefix=f"{part}/")
    file = _checkpoint(run_dir, progress.num_rounds)
    file.parent.mkdir(exist_ok=True)
    replace(file, serialized(written))


def drop_checkpoints(run_dir: Path, *, but: int | None = None) -> None:
    """Remove all checkpoints, and what a crash left of one, but that after ``but`` rounds."""
    folder = run_dir / CHECKPOINTS
    kept = None if but is None else _checkpoint(run_dir, but)
    for file in folder.iterdir() if folder.is_dir() else ():
        if file != kept:
            file.unlink()
    if kept is None and folder.is_dir():
        folder.rmdir()


def read_progress(run_dir: Path, records: Sequence[RoundRecord]) -> Progress | None:
    """Return where the run stands by its ``records``; None before the first round has ended.

    Raises:
        DocumentError: if the records' rounds do not follow each other, or the last one's checkpoint
            cannot be read or is not of the weights recorded.
    """
    trained = [record for record in records if record.kind == "train"]
    if [record.round_ for record in trained] != list(range(len(trained))):
        raise DocumentError(
            f"{run_dir / ROUNDS}: expected round after round from 0; {RESTORE.format(what='it')}"
        )
    if not trained:
        return None
    file = _checkpoint(run_dir, len(trained))
    try:
        found = _progress(load(file))
    except (OSError, ValueError, KeyError) as error:
        raise DocumentError(f"cannot read {file}; {RESTORE.format(what='it')}") from error
    expected = (len(trained), trained[-1].weights_digest)
    if (found.num_rounds, weights_digest(packed(found.average))) != expected:
        raise DocumentError(
            f"{file} does not hold the weights that {ROUNDS} records of round {len(trained) - 1}; "
            + RESTORE.format(what="both")
        )
    return found


def attempts(run_dir: Path) -> Attempts:
    """Return what counts a masked round's attempts, each on disk before it is given."""

    def unused(round_: int) -> Iterator[int]:
        used = [a.attempt for a in read_lines(run_dir / ATTEMPTS, Attempt) if a.round_ == round_]
        for attempt in count(max(used, default=-1) + 1):
            line = Attempt(round_=round_, attempt=attempt).model_dump_json()
            append_line(run_dir / ATTEMPTS, line)
            yield attempt

    return unused


def _checkpoint(run_dir: Path, num_rounds: int) -> Path:
    return run_dir / CHECKPOINTS / f"{num_rounds - 1:05}.safetensors"


def _parts(progress: Progress) -> dict[str, Any]:
    return {"weights": progress.weights, "state": progress.state, "average": progress.average}


def _progress(arrays: Stored) -> Progress:
    """Return what a checkpoint holds; its arrays stay in its file."""
    parts: dict[str, dict[str, Place]] = {"weights": {}, "state": {}, "average": {}}
    (num_rounds,) = arrays["round"]
    for key in arrays.keys() - {"round"}:
        part, _, name = key.partition("/")
        parts[part][name] = arrays.places[key]
    return Progress(int(num_rounds), **{p: Stored(arrays.flat, parts[p]) for p in parts})


def read_lines(
    file: Path, contract: type[AnyContract], *, cure: str = RESTORE.format(what="it")
) -> list[AnyContract]:
    """Read whole lines; what stands after the last line end was never told to anybody.

    Raises:
        DocumentError: if a whole line is none of ``contract``, with the ``cure``.
    """
    if not file.exists():
        return []
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    try:
        return [contract.model_validate_json(line) for line in whole.splitlines()]
    except ValidationError as error:
        raise DocumentError(f"cannot read {file}; {cure}") from error


def _approval(
    run_dir: Path, site: str, signed: SignedPlan, settings: RunSettings
) -> Countersignature | None:
    file = run_dir / "approvals" / f"{site}.json"
    if site not in settings.sites or not file.is_file():
        return None
    try:
        found = Countersignature.model_validate_json(file.read_bytes())
    except ValidationError:
        return None
    approval, key = found.approval, settings.sites[site].signing
    is_theirs = is_signed_by(approval, found.signature, key=key) and approval.site == site
    is_this = approval.study == digest(signed.plan) and approval.decision == "approved"
    has_key = approval.mask_key is not None or not signed.plan.rounds.secure_aggregation
    return found if is_theirs and is_this and has_key else None

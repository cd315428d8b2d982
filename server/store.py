"""The coordinator's run directory: one study, one folder.

plan.toml               the signed plan
run.json                this machine's settings for it (RunSettings)
approvals/<site>.json   the sites' countersignatures
rounds.jsonl            one RoundRecord a line, flushed as rounds end
model/                  the released weights and their manifest
report.json, report.html
failed.txt              only if the run failed: the sentences a person should read
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from shared_models import plan as plans
from shared_models.contracts import Contract, Countersignature, PublicKey, RoundRecord, SiteName
from shared_models.errors import DocumentError, SignatureError
from shared_models.files import append_line, replace
from shared_models.plan import SignedPlan
from shared_models.signing import digest, is_signed_by


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


def read_plan(run_dir: Path) -> SignedPlan:
    """Read the run's plan and insist on its coordinator's signature.

    Raises:
        DocumentError: if it cannot be read.
        SignatureError: if its own coordinator did not sign it.
    """
    signed = plans.read(run_dir / "plan.toml")
    if not is_signed_by(signed.plan, signed.signature, key=signed.plan.coordinator):
        raise SignatureError("the plan is not signed by its coordinator; sign it again")
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


def approvals(
    run_dir: Path, signed: SignedPlan, settings: RunSettings
) -> dict[str, Countersignature]:
    """Return by site the countersignatures over exactly this plan that are on file."""
    found = {site: _approval(run_dir, site, signed, settings) for site in signed.plan.sites}
    return {site: approval for site, approval in found.items() if approval is not None}


def append_round(run_dir: Path, record: RoundRecord) -> None:
    """Add a finished round; on disk when this returns."""
    append_line(run_dir / "rounds.jsonl", record.model_dump_json())


def read_rounds(run_dir: Path) -> list[RoundRecord]:
    """Return the rounds so far, whole lines only."""
    file = run_dir / "rounds.jsonl"
    if not file.exists():
        return []
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    return [RoundRecord.model_validate_json(line) for line in whole.splitlines()]


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

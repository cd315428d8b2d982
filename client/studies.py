"""The studies this site knows: the plans it approved, and with what signature (the second key)."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from client import journal
from client.config import SiteConfig
from client.policy import judge
from shared_models import plan as plans
from shared_models.contracts import Approval, Countersignature
from shared_models.errors import DocumentError
from shared_models.files import replace
from shared_models.masking import create_mask_key, load_mask_key, public_mask_key
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, is_signed_by, public_key, sign

MASK_KEY = "mask.key"


def objections(signed: SignedPlan, site: SiteConfig, *, today: date) -> list[str]:
    """Return every reason not to approve: the site's rules, and a signature that does not hold."""
    found = judge(signed.plan, site, today=today)
    if not is_signed_by(signed.plan, signed.signature, key=signed.plan.coordinator):
        found.append("signature: the plan is not signed by its coordinator")
    return found


def approve(
    signed: SignedPlan, site: SiteConfig, *, key: Ed25519PrivateKey, who: str
) -> Countersignature:
    """Keep the plan and this site's signature over it; the caller has seen no objections.

    Raises:
        DocumentError: if the journal is not this site's own; nothing is approved then.
        pydantic.ValidationError: if ``who`` is empty or too long.
    """
    study = digest(signed.plan)
    approval = Approval(
        study=study, site=site.name, decision="approved", who=who, when=datetime.now(UTC)
    )
    folder = folder_of(site, study)  # nothing is made before ``who`` is found to be in order
    folder.mkdir(parents=True, exist_ok=True)
    if signed.plan.rounds.secure_aggregation:
        approval = approval.model_copy(update={"mask_key": _mask_key(folder)})
    countersignature = Countersignature(approval=approval, signature=sign(approval, key=key))
    event = journal.Event("approved", study=study, who=who, digest=digest(approval))
    journal.append(journal.Book(site.state_dir, site.name, key), event)
    replace(folder / "plan.toml", plans.render(signed.plan, signed.signature).encode())
    replace(folder / "approval.json", countersignature.model_dump_json(indent=2).encode())
    return countersignature


def approved(study: str, site: SiteConfig, *, key: Ed25519PrivateKey) -> StudyPlan | None:
    """Return the plan of that digest if this site approved it with its own key, else nothing."""
    folder = folder_of(site, study)
    try:
        signed = plans.read(folder / "plan.toml")
        found = Countersignature.model_validate_json((folder / "approval.json").read_bytes())
    except (DocumentError, ValidationError, OSError):
        return None
    is_ours = is_signed_by(found.approval, found.signature, key=public_key(key))
    is_this = found.approval.study == study == digest(signed.plan)
    is_signed = is_signed_by(signed.plan, signed.signature, key=signed.plan.coordinator)
    if is_ours and is_this and is_signed and found.approval.decision == "approved":
        return signed.plan
    return None


def folder_of(site: SiteConfig, study: str) -> Path:
    """Return where this site keeps what belongs to the study of that digest."""
    return site.state_dir / "studies" / study


def _mask_key(folder: Path) -> str:
    """Return the public half of the study's masking key, made at the first approval."""
    file = folder / MASK_KEY
    return public_mask_key(load_mask_key(file) if file.exists() else create_mask_key(file))

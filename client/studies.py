"""The studies this site knows: what was offered, and what its people decided (the second key).

Each study has a folder, named by its plan's digest, in ``state/studies``:

plan.toml        the signed plan; what was judged, offered and decided about
offer.json       the coordinator's own word on where the study stands (Word)
approval.json    the newest decision with this site's signature (Countersignature)
decisions.jsonl  every decision ever made about it, a Countersignature a line
notes.jsonl      what people wrote beside a decision; it never leaves (Note)
mask.key, masks/ the study's key for secure aggregation, and the masks used (``masks.py``)

Guarantees:
    Only a plan that its coordinator signed and this site's own key approved is approved.
    A withdrawal counts from the next order on, for an agent that is running as well.
    A withdrawal or a refusal killed at any write leaves the study not approved.
    A later decision is later by its date, whatever the clock says.
    An approval that was withdrawn can take part in no secure sum again.
    Once its coordinator says that a study is closed, no order for it is obeyed.

Design: approval.json is removed before a withdrawal is journalled, and written anew afterwards. So
whoever finds it approving, while nobody writes in the journal, knows that no withdrawal precedes.
The masking key goes with the withdrawal; who approves again does so with a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError

from client import journal
from client.config import SiteConfig
from client.policy import judge
from shared_models import plan as plans
from shared_models.contracts import (
    Approval,
    Contract,
    Count,
    Countersignature,
    Decision,
    DecisionReason,
    StudyState,
)
from shared_models.errors import ConsiliaError, DocumentError
from shared_models.files import append_line, replace
from shared_models.masking import create_mask_key, load_mask_key, public_mask_key
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, is_signed_by, public_key, sign

PLAN, OFFER, APPROVAL = "plan.toml", "offer.json", "approval.json"
DECISIONS, NOTES, MASK_KEY = "decisions.jsonl", "notes.jsonl", "mask.key"
SHORT = 12  # so much of a digest names a study to people

Status = Literal["offered", "approved", "refused", "withdrawn", "expired", "closed"]


class Word(Contract):
    """Where the coordinator last said that a study stands."""

    state: StudyState
    num_rounds_done: Count = 0
    when: datetime


class Note(Contract):
    """What somebody wrote beside the decision of that digest, for this hospital only."""

    decision: str
    text: Annotated[str, Field(min_length=1, max_length=2000)]


class Known(NamedTuple):
    """A study this site was offered, or decided about."""

    study: str
    signed: SignedPlan
    status: Status
    decision: Approval | None
    word: Word | None

    @property
    def plan(self) -> StudyPlan:
        """The plan itself."""
        return self.signed.plan


def objections(signed: SignedPlan, site: SiteConfig, *, today: date) -> list[str]:
    """Return every reason not to approve: the site's rules, and a signature that does not hold."""
    found = judge(signed.plan, site, today=today)
    if not _is_signed(signed):
        found.append("signature: the plan is not signed by its coordinator")
    return found


def known(site: SiteConfig, *, key: Ed25519PrivateKey, today: date) -> list[Known]:
    """Return every study this site was offered or decided about, by name; unsigned ones are none.

    ``expired`` and ``closed`` is what may no longer run though nobody refused or withdrew it.
    """
    parent = site.state_dir / "studies"
    folders = parent.iterdir() if parent.is_dir() else ()
    found = (_known(folder, site, key=key, today=today) for folder in folders)
    return sorted((one for one in found if one is not None), key=lambda o: (o.plan.name, o.study))


def look_up(text: str, site: SiteConfig, *, key: Ed25519PrivateKey, today: date) -> Known:
    """Return the study somebody means by a plan's file, or by the beginning of a known digest.

    Raises:
        DocumentError: if it is no plan's file and no study's beginning, or several studies'.
    """
    found = known(site, key=key, today=today)
    if Path(text).is_file() or "/" in text or text.endswith(".toml"):
        signed = plans.read(Path(text))
        study = digest(signed.plan)
        new = Known(study, signed, "offered", None, None)
        return next((one for one in found if one.study == study), new)
    matching = [one for one in found if text and one.study.startswith(text.lower())]
    if len(matching) != 1:
        raise DocumentError(
            f"expected a plan's file or the beginning of one study's digest, got that of "
            f"{len(matching)} of {len(found)}; consilia-site studies lists them"
        )
    return matching[0]


def keep_offer(signed: SignedPlan, word: Word, site: SiteConfig, *, key: Ed25519PrivateKey) -> bool:
    """Keep a plan that was offered, journalled before it is there, and the coordinator's word.

    Returns:
        Whether the plan is new here.
    """
    study = digest(signed.plan)
    folder = folder_of(site, study)
    is_new = not (folder / PLAN).exists()
    if is_new:
        journal.append(_book(site, key), journal.Event("offered", study=study))
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / PLAN, plans.render(signed.plan, signed.signature).encode())
    before = _word(folder)
    if before is None or before.model_copy(update={"when": word.when}) != word:
        replace(folder / OFFER, word.model_dump_json().encode())
    return is_new


def approve(
    signed: SignedPlan, site: SiteConfig, *, key: Ed25519PrivateKey, who: str
) -> Countersignature:
    """Keep the plan and this site's signature over it; the caller has seen no objections.

    Raises:
        ConsiliaError: if the coordinator has closed the study.
        DocumentError: if the journal is not this site's own; nothing is approved then.
        pydantic.ValidationError: if ``who`` is empty or too long.
    """
    if _is_closed(folder_of(site, digest(signed.plan))):
        raise ConsiliaError("the coordinator has closed the study: nothing runs for it any more")
    return _decide(signed, site, key=key, decision="approved", who=who)


def refuse(
    signed: SignedPlan,
    site: SiteConfig,
    *,
    key: Ed25519PrivateKey,
    who: str,
    reason: DecisionReason,
    note: str | None = None,
) -> Countersignature:
    """Refuse a plan. The coordinator learns ``reason``, and nobody outside the ``note``.

    Raises:
        ConsiliaError: if the plan is approved; that is withdrawn, not refused.
        DocumentError: if the journal is not this site's own.
        pydantic.ValidationError: if ``who`` or ``note`` is empty or too long.
    """
    last = last_decision(digest(signed.plan), site, key=key)
    if last is not None and last.approval.decision == "approved":
        raise ConsiliaError("the study is approved; to take that back: consilia-site withdraw")
    return _decide(signed, site, key=key, decision="refused", who=who, reason=reason, note=note)


def withdraw(
    signed: SignedPlan,
    site: SiteConfig,
    *,
    key: Ed25519PrivateKey,
    who: str,
    reason: DecisionReason | None = None,
    note: str | None = None,
) -> Countersignature:
    """Take this site's approval back, from the next order on. Approving again is a new decision.

    Raises:
        ConsiliaError: if this site has not approved the plan.
        DocumentError: if the journal is not this site's own; the approval counts no more even so.
        pydantic.ValidationError: if ``who`` or ``note`` is empty or too long.
    """
    last = last_decision(digest(signed.plan), site, key=key)
    if last is None or last.approval.decision != "approved":
        raise ConsiliaError("this site has not approved the study; there is nothing to withdraw")
    return _decide(signed, site, key=key, decision="withdrawn", who=who, reason=reason, note=note)


def approved(study: str, site: SiteConfig, *, key: Ed25519PrivateKey) -> StudyPlan | None:
    """Return the plan of that digest if this site approved it with its own key, else nothing.

    Nothing as well once its coordinator has closed the study.
    """
    folder = folder_of(site, study)
    found = _countersignature(folder, study, site, key=key)
    newest = last_decision(study, site, key=key)
    if found is None or newest is None or _is_closed(folder):
        return None
    if {found.approval.decision, newest.approval.decision} != {"approved"}:
        return None
    signed = _signed(folder, study)
    return None if signed is None else signed.plan


def last_decision(
    study: str, site: SiteConfig, *, key: Ed25519PrivateKey
) -> Countersignature | None:
    """Return the newest decision about the study that this site's own key signed."""
    folder = folder_of(site, study)
    found = [*decisions(folder), _countersignature(folder, study, site, key=key)]
    ours = [one for one in found if one is not None and _is_ours(one, study, site, key)]
    return max(ours, key=lambda one: one.approval.when, default=None)


def decisions(folder: Path) -> Iterator[Countersignature]:
    """Yield the decisions kept in a study's folder, oldest first; a line cut short is left out."""
    file = folder / DECISIONS
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            yield Countersignature.model_validate_json(line)
        except ValidationError:
            continue


def folder_of(site: SiteConfig, study: str) -> Path:
    """Return where this site keeps what belongs to the study of that digest."""
    return site.state_dir / "studies" / study


def _decide(
    signed: SignedPlan,
    site: SiteConfig,
    *,
    key: Ed25519PrivateKey,
    decision: Decision,
    who: str,
    reason: DecisionReason | None = None,
    note: str | None = None,
) -> Countersignature:
    """Journal a decision, then keep it; see the module's design for the order of things."""
    study = digest(signed.plan)
    folder = folder_of(site, study)
    last = last_decision(study, site, key=key)
    approval = Approval(
        study=study,
        site=site.name,
        decision=decision,
        reason=reason,
        who=who,
        when=_later_than(last),
    )
    written = None if note is None else Note(decision=digest(approval), text=note)
    folder.mkdir(parents=True, exist_ok=True)  # nothing is made before all is found to be in order
    if last is not None and last not in decisions(folder):
        append_line(folder / DECISIONS, last.model_dump_json())  # of before there was a history
    if decision != "approved":
        (folder / APPROVAL).unlink(missing_ok=True)
        (folder / MASK_KEY).unlink(missing_ok=True)
    elif signed.plan.rounds.secure_aggregation:
        approval = approval.model_copy(update={"mask_key": _mask_key(folder)})
    found = Countersignature(approval=approval, signature=sign(approval, key=key))
    event = journal.Event(decision, study=study, who=who, digest=digest(approval))
    journal.append(_book(site, key), event)
    if written is not None:
        append_line(folder / NOTES, written.model_dump_json())
    append_line(folder / DECISIONS, found.model_dump_json())
    replace(folder / PLAN, plans.render(signed.plan, signed.signature).encode())
    replace(folder / APPROVAL, found.model_dump_json(indent=2).encode())
    return found


def _later_than(last: Countersignature | None) -> datetime:
    """Return now, or just after the last decision if the clock was put back since."""
    now = datetime.now(UTC)
    return now if last is None else max(now, last.approval.when + timedelta(microseconds=1))


def _known(folder: Path, site: SiteConfig, *, key: Ed25519PrivateKey, today: date) -> Known | None:
    study = folder.name
    signed = _signed(folder, study)
    if signed is None:
        return None
    found = _countersignature(folder, study, site, key=key)
    status: Status = "offered" if found is None else found.approval.decision
    if status in ("offered", "approved") and signed.plan.expires < today:
        status = "expired"
    elif status in ("offered", "approved") and _is_closed(folder):
        status = "closed"
    decision = None if found is None else found.approval
    return Known(study, signed, status, decision, _word(folder))


def _signed(folder: Path, study: str) -> SignedPlan | None:
    """Return the folder's plan if it is the one of that digest, and signed."""
    try:
        signed = plans.read(folder / PLAN)
    except DocumentError:
        return None
    return signed if digest(signed.plan) == study and _is_signed(signed) else None


def _is_signed(signed: SignedPlan) -> bool:
    return is_signed_by(signed.plan, signed.signature, key=signed.plan.coordinator)


def _countersignature(
    folder: Path, study: str, site: SiteConfig, *, key: Ed25519PrivateKey
) -> Countersignature | None:
    """Return the decision that counts, if it is this site's own about that study."""
    try:
        found = Countersignature.model_validate_json((folder / APPROVAL).read_bytes())
    except (ValidationError, OSError):
        return None
    return found if _is_ours(found, study, site, key) else None


def _is_ours(found: Countersignature, study: str, site: SiteConfig, key: Ed25519PrivateKey) -> bool:
    is_signed = is_signed_by(found.approval, found.signature, key=public_key(key))
    return is_signed and (found.approval.study, found.approval.site) == (study, site.name)


def _word(folder: Path) -> Word | None:
    try:
        return Word.model_validate_json((folder / OFFER).read_bytes())
    except (ValidationError, OSError):
        return None


def _is_closed(folder: Path) -> bool:
    word = _word(folder)
    return word is not None and word.state == "closed"


def _book(site: SiteConfig, key: Ed25519PrivateKey) -> journal.Book:
    return journal.Book(site.state_dir, site.name, key)


def _mask_key(folder: Path) -> str:
    """Return the public half of the study's masking key, made at the first approval."""
    file = folder / MASK_KEY
    return public_mask_key(load_mask_key(file) if file.exists() else create_mask_key(file))

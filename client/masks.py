"""Whom a site hides its update among, and the mask it hides it under (secure aggregation).

Guarantees:
    An update is masked only among enough sites this hospital trusts, each with its own signature.
    No mask is used twice, not even after a crash or by two processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client import peers, studies
from client.config import SiteConfig
from client.gate import Refused
from shared_models.contracts import RoundOrder
from shared_models.masking import Masked, load_mask_key, masked, public_mask_key
from shared_models.plan import StudyPlan, fewest_honest
from shared_models.signing import digest, is_signed_by

Mask = Callable[[NDArray[np.floating]], Masked]


def mask_for(order: RoundOrder, plan: StudyPlan, site: SiteConfig) -> Mask:
    """Return what hides this site's numbers among the participants of ``order``, once.

    Raises:
        Refused: if the participants are not those of the plan, too few of them are trusted, or
            their mask was used before.
    """
    keys = _participants(order, plan, site)
    folder = studies.folder_of(site, order.study)
    own = load_mask_key(folder / studies.MASK_KEY)
    if keys.pop(site.name, None) != public_mask_key(own):
        raise Refused("bad-order", "the order does not hold this site's own countersignature")
    label = label_of(order)
    _claim(folder / "masks" / label)
    return partial(masked, own=own, peers=list(keys.values()), label=label)


def label_of(order: RoundOrder) -> str:
    """Return what all participants of a round, and only they, call it: a digest of the order.

    A site asked among other participants than its peers finds no pad that cancels.
    """
    common = order.model_dump_json(exclude={"site", "issued_at", "expires_at"})
    return digest(common.encode())


def _participants(order: RoundOrder, plan: StudyPlan, site: SiteConfig) -> dict[str, str]:
    """Return the masking keys of all participants by name, once they are found to be in order."""
    approvals = [c.approval for c in order.participants]
    keys = {a.site: a.mask_key for a in approvals if a.mask_key is not None}
    if len({*keys.values()}) != len(approvals) or not keys.keys() <= {*plan.sites}:
        raise Refused("bad-order", "expected each participant once, a site of the plan with a key")
    if any(a.study != order.study or a.decision != "approved" for a in approvals):
        raise Refused("bad-order", "a participant has not approved this plan")
    if len(keys) < plan.rounds.quorum:
        raise Refused("bad-order", "fewer participants than the plan's quorum")
    trusted = peers.read(site.policy.peers)
    known = [
        c.approval.site
        for c in order.participants
        if c.approval.site != site.name
        and is_signed_by(c.approval, c.signature, key=trusted.get(c.approval.site, ""))
    ]
    if len(known) + 1 < fewest_honest(plan):
        raise Refused(
            "peers", f"{len(known)} trusted peers take part, {fewest_honest(plan) - 1} needed"
        )
    return keys


def _claim(file: Path) -> None:
    """Note on disk that a mask is used, before it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise Refused(
            "out-of-order", "this very round was masked before; ask as another attempt"
        ) from None
    parent = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)

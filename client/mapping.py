"""What labels are called here and in plans: pairs a person vouched for, under the site's signature.

Swapped or misspelt classes train without a complaint. So a label that a plan does not know is
refused, unless somebody has said which of the plan's classes it is, and that stands in one signed
file. It is read where the site's key is, and goes to the worker with each job.

Guarantees:
    A mapping that the site's key did not sign is refused, and nothing is trained.
    A label that is not mapped stays what it was; a map's number that is mapped becomes the number
    that the plan at hand gives the class, whatever the order of its classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from client.config import SiteConfig
from shared_models.contracts import Contract, Signature, SiteName
from shared_models.errors import DataError, DocumentError, SignatureError
from shared_models.files import replace
from shared_models.signing import canonical, is_signed_by, public_key, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from shared_models.plan import StudyPlan
    from shared_models.tasks import Task

LabelText = Annotated[str, Field(min_length=1, max_length=120)]
Pairs = tuple[tuple[LabelText, LabelText], ...]


class LabelMapping(Contract):
    """``pairs`` of a label here, or a map's number, and the class that plans call it."""

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    site: SiteName
    pairs: Pairs
    who: Annotated[str, Field(min_length=1, max_length=120)]
    when: datetime


class SignedMapping(Contract):
    """A mapping and the site's signature over it."""

    mapping: LabelMapping
    signature: Signature


def make(
    site: SiteConfig, pairs: Sequence[str], *, key: Ed25519PrivateKey, who: str
) -> SignedMapping:
    """Return the signed mapping of ``OLD=NEW`` pairs, which takes the place of any before it.

    A label may be called differently in different plans: then it stands in several pairs.

    Raises:
        ValueError: if there is none, or a pair is none.
    """
    split = [tuple(part.strip() for part in pair.split("=", 1)) for pair in pairs]
    if not split or any(len(pair) != 2 or not all(pair) for pair in split):
        raise ValueError("expected OLD=NEW for each label")
    try:
        found = LabelMapping.model_validate(
            {"site": site.name, "pairs": split, "who": who, "when": datetime.now(UTC)}
        )
    except ValidationError as error:
        raise ValueError("expected labels and who decides in 1 to 120 characters") from error
    return SignedMapping(mapping=found, signature=sign(found, key=key))


def write(site: SiteConfig, found: SignedMapping) -> None:
    """Keep a mapping.

    Raises:
        OSError: if it cannot be written.
    """
    replace(site.data.mapping, canonical(found) + b"\n", mode=0o600)


def read(site: SiteConfig, *, key: Ed25519PrivateKey) -> Pairs:
    """Return the site's pairs, none if there is no mapping.

    Raises:
        DocumentError: if it cannot be read.
        SignatureError: if the site's key did not sign it.
    """
    file = site.data.mapping
    if not file.exists():
        return ()
    try:
        found = SignedMapping.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        raise DocumentError(
            f"cannot read {file}; map the labels again: consilia-site data map"
        ) from None
    is_ours = is_signed_by(found.mapping, found.signature, key=public_key(key))
    if not is_ours or found.mapping.site != site.name:
        raise SignatureError(
            f"{file} is not signed by this site's key; have a person look, and map the labels "
            "again: consilia-site data map"
        )
    return found.mapping.pairs


def applied(task: Task, plan: StudyPlan, pairs: Pairs) -> Task:
    """Return ``task`` with labels understood through ``pairs``.

    Raises:
        DataError: if the pairs do not fit the plan.
    """
    if not pairs:
        return task
    told, values = told_for(plan, pairs), values_of(plan, pairs)

    def encode_map(label: NDArray[np.float32]) -> NDArray[np.int64]:
        found = np.rint(label)
        renamed = found.copy()
        for old, new in values.items():
            renamed[found == old] = new
        return task.encode_map(renamed)

    return task._replace(
        encode_class=lambda label: task.encode_class(told.get(label, label)),
        encode_map=encode_map,
    )


def told_for(plan: StudyPlan, pairs: Pairs) -> dict[str, str]:
    """Return which of the plan's classes each label is; other plans' classes are passed over.

    Raises:
        DataError: if a label is two of them, or a number is none.
    """
    known = (*_classes(plan), "background")
    found: dict[str, str] = {}
    for old, new in pairs:
        if new in known and found.setdefault(old, new) != new:
            raise DataError(
                f"the label mapping calls '{old}' two of the plan's classes; map the labels again: "
                "consilia-site data map"
            )
    lost = [old for old, _ in pairs if old.isdigit() and old not in found]
    if lost:
        raise DataError(
            f"the label mapping calls {lost[0]} by none of the plan's classes; map the labels "
            f"again, it may be one of {', '.join(known)}: consilia-site data map"
        )
    return found


def values_of(plan: StudyPlan, pairs: Pairs) -> dict[int, int]:
    """Return what becomes of a map's numbers: the plan's numbers of the classes they are.

    Raises:
        DataError: if the pairs do not fit the plan.
    """
    classes = ["background", *_classes(plan)]
    told = told_for(plan, pairs)
    return {int(old): classes.index(new) for old, new in told.items() if old.isdigit()}


def _classes(plan: StudyPlan) -> list[str]:
    given = plan.task.params.get("classes", ())
    return [str(name) for name in given] if isinstance(given, tuple) else []

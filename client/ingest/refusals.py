"""Why a series is not taken in: a closed list of reasons, what each means, and which may pass."""

from __future__ import annotations

from shared_models.reasons import REASONS

#: What is said besides what makes a series no volume (``shared_models.reasons``).
OURS = {
    "already-done": "it was de-identified here before; take in what it was made from",
    "burned-in": "header or pixels say that there is text in the pixels; look at such images, and "
    "if they hold no names clear them: ingest.terms.cleared in site.toml",
    "no-identity": "neither a patient nor a study that it belongs to",
    "no-decoder": "pixels that nothing installed can decode, so nobody has looked at them",
    "object-class": "a kind of object that cannot be cleaned attribute by attribute",
    "unreadable": "a value that the standard does not allow, where one is needed",
    "incomplete": "the PACS holds more of it than it sent; it is asked again at the next run",
    "conflicting": "two different images under one SOP Instance UID; find out which is the right "
    "one, then: consilia-site data forget",
}
SENTENCES: dict[str, str] = {**{str(reason): text for reason, text in REASONS.items()}, **OURS}

#: Nothing that is sent later makes a volume of these; what came of them is not kept.
FINAL = frozenset(
    {
        "not-image",
        "unsupported-class",
        "secondary-capture",
        "localizer",
        "mosaic",
        "not-grey",
        "mixed-patients",
        "mixed-sizes",
        "mixed-orientations",
        "mixed-contrasts",
        "mixed-times",
        "tilted",
        "off-line",
        "too-large",
        "inverted-units",
        "already-done",
        "burned-in",
        "no-identity",
        "object-class",
    }
)


def sentence(reason: str) -> str:
    """Return what a reason means, for people."""
    return SENTENCES.get(reason, reason)

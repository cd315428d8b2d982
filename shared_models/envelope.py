"""A door: letters in Flower's records and out again, the same for coordinator and site.

A letter's four texts go in a ConfigRecord, its buckets in an ArrayRecord of raw bytes: a few large
objects instead of one or two for each tensor, and nothing that numpy or pickle would have to open.
Small weights go beside the texts: every object is a request to the SuperLink each time it is pushed
or pulled, so that a small model's round is mostly the number of objects.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from shared_models.errors import DocumentError
from shared_models.wire import Letter

#: The app bundle of every run: it names what is installed at each party, and holds no code.
BUNDLE_FILES = {
    "pyproject.toml": """\
[project]
name = "consilia"
version = "1.0.0"
description = "What runs is what is installed at each party: this bundle holds no code."
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "consilia"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
run-dir = ""
""",
    "LICENSE": "The licence of the installed Consilia package applies.\n",
}
#: The SHA-256 of what Flower packs of them, uncompressed, so the same everywhere: a site obeys no
#: order of a run of any other bundle.
BUNDLE_DIGEST = "b24716ac0ca708ed71db6fbfb6cab00f26d216efc7b3e3caff59855f628c805d"

FIELDS = ("kind", "document", "key", "signature")
INLINE = "weights"
INLINE_BYTES = 2**18  # no more, for equal buckets of several letters travel to the SuperLink once
LEAST_PAUSE_S, MOST_PAUSE_S = 0.03, 0.5


def record_from(letter: Letter) -> RecordDict:
    """Pack a letter for Flower."""
    content = RecordDict()
    fields = ConfigRecord({name: getattr(letter, name) for name in FIELDS})
    content["letter"] = fields
    if letter.buckets and sum(map(len, letter.buckets)) <= INLINE_BYTES:
        fields[INLINE] = list(letter.buckets)
    elif letter.buckets:
        content["weights"] = ArrayRecord(
            {
                f"{index:04d}": Array(dtype="uint8", shape=(len(bucket),), stype="raw", data=bucket)
                for index, bucket in enumerate(letter.buckets)
            }
        )
    return content


def letter_from(record: RecordDict) -> Letter:
    """Unpack a letter that came through Flower.

    Raises:
        DocumentError: if the record is anything but a letter.
    """
    fields = record.get("letter")
    if not isinstance(fields, ConfigRecord) or not set(record) <= {"letter", "weights"}:
        raise DocumentError("expected a record 'letter' and at most a record 'weights'")
    if INLINE in fields and "weights" in record:
        raise DocumentError("expected a letter's weights in one place")
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    if len(texts) + (INLINE in fields) != len(fields) or set(texts) != set(FIELDS):
        raise DocumentError(f"expected a letter of the texts {', '.join(FIELDS)}")
    buckets = _inline(fields[INLINE]) if INLINE in fields else ()
    buckets = _buckets(record["weights"]) if "weights" in record else buckets
    return Letter(**texts, buckets=buckets)


def pause_s(waited_s: float) -> float:
    """Return how long to wait before asking again: a tenth of the wait so far, within bounds.

    What comes soon is taken soon; what takes long costs few requests.
    """
    return min(max(waited_s / 10, LEAST_PAUSE_S), MOST_PAUSE_S)


def _inline(weights: object) -> tuple[bytes, ...]:
    if not isinstance(weights, list) or not weights:
        raise DocumentError("expected weights beside the texts as buckets of bytes")
    buckets = tuple(bucket for bucket in weights if isinstance(bucket, bytes))
    if len(buckets) != len(weights) or sum(map(len, buckets)) > INLINE_BYTES:
        raise DocumentError(f"expected buckets of at most {INLINE_BYTES} bytes beside the texts")
    return buckets


def _buckets(weights: object) -> tuple[bytes, ...]:
    if not isinstance(weights, ArrayRecord) or not weights:
        raise DocumentError("expected weights in an array record that is not empty")
    names = [f"{index:04d}" for index in range(len(weights))]
    if set(weights) != set(names):
        raise DocumentError("expected the buckets to be numbered without a gap")
    arrays = [weights[name] for name in names]
    if not all(
        array.dtype == "uint8" and array.stype == "raw" and array.shape == (len(array.data),)
        for array in arrays
    ):
        raise DocumentError("expected buckets of raw bytes")
    return tuple(array.data for array in arrays)

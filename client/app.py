"""A door: letters in and out of Flower's records, and the Flower app a site runs.

Every order travels as a TRAIN message. Its content is a ConfigRecord ``letter`` (kind, document,
key, signature) and, if weights belong to it, an ArrayRecord ``weights`` whose arrays ``0000``,
``0001``, ... are the letter's buckets, byte for byte. Nothing is unpickled or parsed as NumPy.

Guarantees:
    A record that is not exactly a letter is refused.
    A reply to a failed order carries no text of the exception.

Design: the coordinator has its own copy of the two small functions that pack and unpack
(``server/app.py``), because a hospital's code and the coordinator's never import each other; a
test holds the copies together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from shared_models.errors import DocumentError
from shared_models.wire import Letter

Answer = Callable[[Letter], Letter]

FIELDS = ("kind", "document", "key", "signature")
FAILED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
SITE_CONFIG = "site-config"

log = logging.getLogger(__name__)


def make_app(answer: Answer) -> ClientApp:
    """Return a Flower app that gives every order to ``answer``."""
    return _app(lambda _: answer)


def record_from(letter: Letter) -> RecordDict:
    """Pack a letter for Flower."""
    content = RecordDict()
    content["letter"] = ConfigRecord({name: getattr(letter, name) for name in FIELDS})
    if letter.buckets:
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
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    if len(texts) != len(fields) or set(texts) != set(FIELDS):
        raise DocumentError(f"expected a letter of the texts {', '.join(FIELDS)}")
    buckets = _buckets(record["weights"]) if "weights" in record else ()
    return Letter(**texts, buckets=buckets)


def error_reply(order: Message) -> Message:
    """Return the reply that says no more than that the site could not answer."""
    return Message(Error(code=FAILED, reason="the site could not answer"), reply_to=order)


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


def _app(choose: Callable[[Context], Answer]) -> ClientApp:
    flower_app = ClientApp()

    @flower_app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            reply = choose(context)(letter_from(message.content))
            return Message(record_from(reply), reply_to=message)
        except Exception as error:  # whatever failed, its text stays in the hospital
            log.error("an order could not be answered: %s", type(error).__name__)
            log.debug("the exception was", exc_info=True)
            return error_reply(message)

    return flower_app


def _configured(context: Context) -> Answer:
    """Open the site named in the node's configuration, for a stock ``flower-supernode``."""
    from client.answer import open_site

    file = context.node_config.get(SITE_CONFIG)
    if not isinstance(file, str):
        raise DocumentError(f"expected {SITE_CONFIG}=<site.toml> in the node's configuration")
    answer: Answer = open_site(Path(file))
    return answer


app = _app(_configured)

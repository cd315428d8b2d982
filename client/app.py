"""A door: the Flower app a site runs.

Every order travels as a TRAIN message that holds a letter (``shared_models.envelope``).

Guarantees:
    A record that is not exactly a letter is refused.
    A reply to a failed order carries no text of the exception.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from shared_models.envelope import letter_from, record_from
from shared_models.errors import DocumentError
from shared_models.wire import Letter

Answer = Callable[[Letter], Letter]
Refuse = Callable[[str], Letter]  # given the reason, for the site's log

FAILED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
SITE_CONFIG = "site-config"

log = logging.getLogger(__name__)


def make_app(answer: Answer, refuse: Refuse | None = None) -> ClientApp:
    """Return a Flower app that gives every order to ``answer``, what is no letter to ``refuse``."""
    return _app(lambda _: answer, refuse)


def refusal_reply(order: Message, refuse: Refuse | None, *, why: str) -> Message:
    """Return the reply to an order that is not to be read: a refusal, if there is who refuses."""
    if refuse is not None:
        return Message(record_from(refuse(why)), reply_to=order)
    log.error("an order could not be answered: %s", why)
    return error_reply(order)


def error_reply(order: Message) -> Message:
    """Return the reply that says no more than that the site could not answer."""
    return Message(Error(code=FAILED, reason="the site could not answer"), reply_to=order)


def _app(choose: Callable[[Context], Answer], refuse: Refuse | None = None) -> ClientApp:
    flower_app = ClientApp()

    @flower_app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            try:
                letter = letter_from(message.content)
            except DocumentError:
                return refusal_reply(message, refuse, why="it is no letter")
            return Message(record_from(choose(context)(letter)), reply_to=message)
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

    def answer(letter: Letter) -> Letter:
        with open_site(Path(file)) as desk:  # a stock node starts a process for each order anyway
            return desk.answer(letter)

    return answer


app = _app(_configured)

"""The process that trains: ``python -m client.worker``, started and watched by ``supervisor.py``.

It is told what it may read, gives up everything else (``confinement.py``), imports what training
needs, and then does one job after the other. It never holds a key, and ends when its parent does.

Guarantees:
    Nothing is imported but the standard library before the process has given up everything else.
    An exception is told by its type alone; only what is wrong with the data is told in words.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import socket
import struct
import sys
import traceback
from typing import TYPE_CHECKING

from client.confinement import Confines, confine

if TYPE_CHECKING:
    from client.work import Trainer

HEAD = struct.Struct("<4sIQ")  # of each message: MAGIC, the bytes of its document, of its vector
MAGIC = b"job1"

log = logging.getLogger(__name__)


def main() -> None:
    """Serve the parent at the other end of the socket whose number is the only argument."""
    faulthandler.enable()
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        with channel.makefile("rb") as stream:
            told = json.loads(stream.readline())
        logging.basicConfig(
            level=told["log_level"],
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        logging.getLogger("absl").setLevel(logging.ERROR)
        lasting = tuple(told.get("lasting", ()))
        confined = confine(Confines(tuple(told["readable"]), told["scratch"], lasting))
        found = json.dumps(confined).encode()
        channel.sendall(HEAD.pack(MAGIC, len(found), 0) + found)  # at once: imports take long
        from client import work

        work.warm_up()
        serve(channel, work.Bench())


def serve(channel: socket.socket, do: Trainer) -> None:
    """Do the jobs that come through ``channel`` until it is closed."""
    from client.supervisor import Answer, receive, send
    from client.work import Job
    from shared_models.errors import DataError
    from shared_models.weights import flat_of, spooled

    while (received := receive(channel)) is not None:
        document, vector = received
        weights = None if vector is None else spooled(flat_of(vector).stretches())
        del received, vector  # what is trained takes the memory
        update = None
        try:
            outcome, update = do(Job.model_validate_json(document), weights)
            answer = Answer(outcome=outcome)
        except DataError as error:
            answer = Answer(failure="data", sentences=error.objections)
        except Exception as error:
            log.error("training failed: %s", type(error).__name__)
            # the lines of code only: a message may quote a file's name or its content
            log.debug("it failed at\n%s", "".join(traceback.format_tb(error.__traceback__)))
            answer = Answer(failure="failed")
        send(channel, answer.model_dump_json().encode(), update)
        del update, weights


if __name__ == "__main__":
    main()

"""The coordinator at work: it answers hospitals, and runs the studies that are wanted.

A study is wanted while its run directory holds the file ``wanted``, which ``consilia-coordinator
run`` makes and ``stop`` removes. So what is to be done stands on the disk: a coordinator that was
killed goes on with it when it is started again.

``stop`` is for a while: the study goes on where it was when it is run again. ``close`` is for good:
it stands in the signed register, the study is run no more, and its sites obey no more orders for it
once they have heard so. ``revoke`` is about a site, in whichever study.

Guarantees:
    A site that is enrolled no longer is reached by no further order, and its approvals count no
    more.
    A study that is wanted is run until it has its report, across restarts.
    A study that was closed is run no more, whatever else is asked for.
    The servers' certificate is issued anew in good time, however long this runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import NamedTuple

from server import control, desk, register, report, store
from server import office as offices
from server.conduct import News, Place, conduct
from server.control import CERTIFY_EVERY_S
from server.office import Office
from server.store import SiteKeys
from shared_models.contracts import Bulletin, Visit
from shared_models.errors import ConsiliaError
from shared_models.files import replace
from shared_models.signing import digest

WANTED = "wanted"

log = logging.getLogger(__name__)


class Known(NamedTuple):
    """What the register says: the keys of the sites enrolled now, and the studies closed."""

    enrolled: Mapping[str, SiteKeys]
    closed: frozenset[str]


def serve(office: Office, *, stop: Event) -> Generator[News, None, None]:
    """Answer visits and newcomers and run the wanted studies until ``stop`` is set.

    Raises:
        MachineError: if a port cannot be listened on, or the SuperLink keeps dying.
    """
    known = _known(office)

    def visit(site: str, told: Visit) -> Bulletin:
        enrolled, closed = known()
        at = desk.Desk(office.folder, office.key, enrolled, closed)
        return desk.visit(at, told, site=site, today=datetime.now(UTC).date())

    conducted = conduct(
        place(office),
        studies=lambda: _wanted(office.folder, known()),
        enrolled=lambda: {site: keys.node or "" for site, keys in known().enrolled.items()},
        stop=stop,
    )
    certified_at = time.monotonic()
    with control.serve(office, visit=visit), closing(conducted):
        for news in conducted:
            yield news
            if time.monotonic() > certified_at + CERTIFY_EVERY_S:
                certified_at = time.monotonic()
                _certify(office)


def _certify(office: Office) -> None:
    """Have the certificate issued anew if few days are left; the SuperLink shows it by itself."""
    try:
        offices.certify(office)
    except (ConsiliaError, OSError) as error:
        log.error("the servers' certificate cannot be renewed: %s", type(error).__name__)


def place(office: Office) -> Place:
    """Return where the office's SuperLink lives and listens."""
    host, _, port = office.settings.listen.fleet.rpartition(":")
    return Place(
        office.folder / "fleet", offices.certify(office), host=host.strip("[]"), port=int(port)
    )


def want(office: Office, run_dir: Path) -> None:
    """Ask for a study to be run; a failure it had is forgotten.

    Raises:
        ConsiliaError: if the study was closed.
    """
    if digest(store.read_plan(run_dir).plan) in offices.closed(office):
        raise ConsiliaError(f"study {run_dir.name} was closed, for good; propose another")
    store.forget_failure(run_dir)
    replace(run_dir / WANTED, b"")


def want_no_more(run_dir: Path) -> None:
    """Ask for a study to be stopped; run again, it goes on where it was."""
    (run_dir / WANTED).unlink(missing_ok=True)


def close(office: Office, run_dir: Path) -> None:
    """Close a study for good: it takes no more orders, and its sites hear so at their next visit.

    Raises:
        ConsiliaError: if its plan or the register cannot be read.
    """
    offices.close(office, digest(store.read_plan(run_dir).plan))
    want_no_more(run_dir)
    if not (run_dir / report.JSON_NAME).exists():  # whoever follows it waits no longer
        store.write_failure(run_dir, ["the study was closed: it takes no more orders"])


def is_wanted(run_dir: Path) -> bool:
    """Return whether a study is to be run."""
    return (run_dir / WANTED).exists()


def _wanted(folder: Path, known: Known) -> list[Path]:
    """Return the studies to run, in which only sites count that are enrolled now."""
    closed = {study[: desk.SHORT] for study in known.closed}
    found = sorted(file.parent for file in (folder / "studies").glob(f"*/{WANTED}"))
    found = [run_dir for run_dir in found if run_dir.name not in closed]
    for run_dir in (one for one in found if not (one / report.JSON_NAME).exists()):
        for approval in (run_dir / "approvals").glob("*.json"):
            if approval.stem not in known.enrolled:
                approval.replace(approval.with_suffix(".revoked"))
    return found


def _known(office: Office) -> Callable[[], Known]:
    """Return what tells what the register says; it is read again when it has grown."""
    file = office.folder / register.FILE
    seen: tuple[int, datetime] | None = None
    found = Known({}, frozenset())

    def known() -> Known:
        nonlocal seen, found
        size = file.stat().st_size if file.exists() else 0
        now = datetime.now(UTC)
        minute = now.replace(second=0, microsecond=0)  # certificates end by the clock
        if seen != (size, minute):
            found, seen = Known(offices.enrolled(office), offices.closed(office)), (size, minute)
        return found

    return known

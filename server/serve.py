"""The coordinator at work: it answers hospitals, and runs the studies that are wanted.

A study is wanted while its run directory holds the file ``wanted``, which ``consilia-coordinator
run`` makes and ``stop`` removes. So what is to be done stands on the disk: a coordinator that was
killed goes on with it when it is started again.

Guarantees:
    A site that is enrolled no longer is reached by no further order, and its approvals count no
    more.
    A study that is wanted is run until it has its report, across restarts.
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

from server import control, desk, register, report, store
from server import office as offices
from server.conduct import News, Place, conduct
from server.control import CERTIFY_EVERY_S
from server.office import Office
from server.store import SiteKeys
from shared_models.contracts import Bulletin, Visit
from shared_models.errors import ConsiliaError
from shared_models.files import replace

WANTED = "wanted"

log = logging.getLogger(__name__)

Enrolled = Callable[[], Mapping[str, SiteKeys]]


def serve(office: Office, *, stop: Event) -> Generator[News, None, None]:
    """Answer visits and newcomers and run the wanted studies until ``stop`` is set.

    Raises:
        MachineError: if a port cannot be listened on, or the SuperLink keeps dying.
    """
    enrolled = _enrolled(office)

    def visit(site: str, told: Visit) -> Bulletin:
        at = desk.Desk(office.folder, office.key, enrolled())
        return desk.visit(at, told, site=site, today=datetime.now(UTC).date())

    conducted = conduct(
        place(office),
        studies=lambda: _wanted(office.folder, enrolled()),
        enrolled=lambda: {site: keys.node or "" for site, keys in enrolled().items()},
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


def want(run_dir: Path) -> None:
    """Ask for a study to be run; a failure it had is forgotten."""
    store.forget_failure(run_dir)
    replace(run_dir / WANTED, b"")


def want_no_more(run_dir: Path) -> None:
    """Ask for a study to be stopped; run again, it goes on where it was."""
    (run_dir / WANTED).unlink(missing_ok=True)


def is_wanted(run_dir: Path) -> bool:
    """Return whether a study is to be run."""
    return (run_dir / WANTED).exists()


def _wanted(folder: Path, enrolled: Mapping[str, SiteKeys]) -> list[Path]:
    """Return the studies to run, in which only sites count that are enrolled now."""
    found = sorted(file.parent for file in (folder / "studies").glob(f"*/{WANTED}"))
    for run_dir in (one for one in found if not (one / report.JSON_NAME).exists()):
        for approval in (run_dir / "approvals").glob("*.json"):
            if approval.stem not in enrolled:
                approval.replace(approval.with_suffix(".revoked"))
    return found


def _enrolled(office: Office) -> Enrolled:
    """Return what tells who is enrolled; the register is read again when it has grown."""
    file = office.folder / register.FILE
    seen: tuple[int, datetime] | None = None
    known: Mapping[str, SiteKeys] = {}

    def enrolled() -> Mapping[str, SiteKeys]:
        nonlocal seen, known
        size = file.stat().st_size if file.exists() else 0
        now = datetime.now(UTC)
        minute = now.replace(second=0, microsecond=0)  # certificates end by the clock
        if seen != (size, minute):
            known, seen = offices.enrolled(office), (size, minute)
        return known

    return enrolled

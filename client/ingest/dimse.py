"""A PACS over DIMSE: images are received by C-STORE, and asked for by C-FIND with C-MOVE or C-GET.

What is received goes to an inbox as it came, byte for byte, and is acknowledged once it is on the
disk: a process killed in between is sent the image again, and an image sent twice is one image to
whoever empties the inbox.

Guarantees:
    An image that was acknowledged is on the disk.
    Only the AE titles of ``station.senders`` are accepted, and only under this station's own title.
    No message names a study, a series or what a query found.

Design: TCP_NODELAY is set on every association, ours and theirs: without it each operation waits 40
ms for an acknowledgement of TCP's. pynetdicom 3.0 loses an answer now and then on a busy machine,
because the thread that serves requests may still run when a request of ours is sent. A
``_Checkpoint`` takes the place of the event it waits for; a test fails when that is renamed.
"""

from __future__ import annotations

import logging
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from client.ingest.pacs import DimsePacs, Query, Series, Station
from client.ingest.sources import put
from shared_models.errors import ConsiliaError, MachineError

MOST_PDU_BYTES = 131_072
#: How long pynetdicom sleeps between looks at its socket; its own millisecond is most of a pull.
LOOK_S = 1e-4
TIMEOUT_S = 60.0
HELD_S = 5.0  # a thread that has not come by then has ended
SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
PENDING = (0xFF00, 0xFF01)
WARNING = 0xB000  # some images could not be sent
#: DICOM lets a requestor propose so many kinds of object at once.
MOST_CONTEXTS = 128

log = logging.getLogger(__name__)


class _Checkpoint(threading.Event):
    """An event that is cleared only once the thread that waits for it is held by it."""

    def __init__(self) -> None:
        super().__init__()
        self.set()
        self.lock = threading.Lock()
        self.held = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        """Hold the calling thread until the event is set."""
        while True:
            with self.lock:
                if self.is_set():
                    self.held.clear()
                    return True
                self.held.set()
            super().wait(0.1)

    def clear(self) -> None:
        """Reset the event; whoever waits for it does nothing else when this returns."""
        with self.lock:
            super().clear()
        self.held.wait(HELD_S)


class Moved(NamedTuple):
    """What came of asking for series: how many were asked for, and how many images failed."""

    num_series: int
    num_failed: int


@contextmanager
def receiving(station: Station, root: Path, *, also: tuple[str, ...] = ()) -> Iterator[None]:
    """Receive images into the inbox ``root`` while the context lasts.

    Args:
        station: this site as a DICOM node.
        root: the inbox.
        also: AE titles that are accepted besides ``station.senders``.

    Raises:
        MachineError: if the port cannot be listened on.
    """
    from pynetdicom import evt

    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    senders = [*station.senders, *also]
    if not senders:
        raise MachineError(
            "nobody may send to this site; list the PACS's AE title in pacs.station.senders"
        )
    entity = _entity(station.title)
    entity.require_called_aet = True
    entity.require_calling_aet = senders
    entity.maximum_associations = 8
    entity.supported_contexts = _storage_contexts()
    entity.add_supported_context("1.2.840.10008.1.1")  # verification: C-ECHO
    handlers = [
        (evt.EVT_CONN_OPEN, _hurry),
        (evt.EVT_C_STORE, _store, [root, station.reserve_mb * 2**20]),
    ]
    try:
        server = entity.start_server(
            (station.bind, station.port), block=False, evt_handlers=handlers
        )
    except OSError as error:
        raise MachineError(
            f"port {station.port} cannot be listened on ({error.strerror}); stop what listens "
            "there or change pacs.station.port"
        ) from error
    try:
        yield
    finally:
        server.shutdown()


def echo(pacs: DimsePacs, station: Station) -> None:
    """Ask the PACS for a sign of life (C-ECHO).

    Raises:
        ConsiliaError: if it gives none.
    """
    with _associated(pacs, station, ["1.2.840.10008.1.1"]) as association:
        status = association.send_c_echo()
        if getattr(status, "Status", None) != SUCCESS:
            raise ConsiliaError("the PACS does not answer an echo; see its log")


def search(pacs: DimsePacs, station: Station, query: Query) -> list[Series]:
    """Return the series that ``query`` asks for, each once (C-FIND).

    Raises:
        ConsiliaError: if the PACS cannot be asked, with the cure.
    """
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as Find

    found: dict[str, Series] = {}
    with _associated(pacs, station, [Find]) as association:
        for keys in query.parts():
            # dates stand at the level of studies, and some PACS look for them nowhere else
            studies = [keys["StudyInstanceUID"]] if "StudyInstanceUID" in keys else None
            if studies is None:
                wanted = {"StudyInstanceUID": "", **_without(keys, "Modality")}
                rows = _find(association, Find, "STUDY", wanted)
                studies = sorted({str(row.get("StudyInstanceUID", "")) for row in rows} - {""})
            for study in studies:
                wanted = {
                    "SeriesInstanceUID": "",
                    "NumberOfSeriesRelatedInstances": "",
                    "Modality": keys.get("Modality", ""),
                    "StudyInstanceUID": study,
                }
                for row in _find(association, Find, "SERIES", wanted):
                    series = _series(row, study)
                    found.setdefault(series.series, series)
    return list(found.values())


def pull(
    pacs: DimsePacs,
    station: Station,
    query: Query,
    root: Path,
    *,
    is_whole: Callable[[Series], bool] = lambda _: False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Moved:
    """Let the PACS send every series that is not here whole to the inbox ``root``.

    By C-MOVE it sends to this station's own port, which must be open to it; by C-GET over the
    association that asked.

    Raises:
        ConsiliaError: if the PACS cannot be asked, with the cure; what came before is kept.
    """
    wanted = [series for series in search(pacs, station, query) if not is_whole(series)]
    num_failed = 0
    if pacs.retrieve == "get":
        num_failed = _get(pacs, station, wanted, root, advance)
    elif wanted:
        with receiving(station, root, also=(pacs.title,)):
            num_failed = _move(pacs, station, wanted, advance)
    return Moved(len(wanted), num_failed)


def _move(
    pacs: DimsePacs, station: Station, wanted: list[Series], advance: Callable[[int, int], None]
) -> int:
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelMove as Move

    num_failed = 0
    with _associated(pacs, station, [Move]) as association:
        for done, series in enumerate(wanted):
            answers = association.send_c_move(_identifier(series), station.title, Move)
            num_failed += _failed(answers, "C-MOVE", station)
            advance(done + 1, len(wanted))
    return num_failed


def _get(
    pacs: DimsePacs,
    station: Station,
    wanted: list[Series],
    root: Path,
    advance: Callable[[int, int], None],
) -> int:
    from pynetdicom import build_role, evt
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet as Get

    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    storage = [context.abstract_syntax for context in _storage_contexts()][: MOST_CONTEXTS - 1]
    roles = [build_role(uid, scp_role=True) for uid in storage]
    handlers = [(evt.EVT_C_STORE, _store, [root, station.reserve_mb * 2**20])]
    num_failed = 0
    with _associated(pacs, station, [Get, *storage], roles=roles, handlers=handlers) as association:
        for done, series in enumerate(wanted):
            answers = association.send_c_get(_identifier(series), Get)
            num_failed += _failed(answers, "C-GET", station)
            advance(done + 1, len(wanted))
    return num_failed


def _failed(answers: Any, what: str, station: Station) -> int:
    """Read the answers to a retrieval and return how many images failed."""
    last = None
    for status, _ in answers:
        last = status
    if last is None or "Status" not in last:
        raise ConsiliaError(f"the PACS ended the association during a {what}; see its log")
    if last.Status == 0xA801:
        raise ConsiliaError(
            f"the PACS does not know this station; have its administrator add {station.title} with "
            f"this machine's address and port {station.port}"
        )
    if last.Status not in (SUCCESS, WARNING):
        raise ConsiliaError(
            f"the PACS refuses the {what} (status {last.Status:04X}); have its administrator allow "
            f"it to {station.title}"
        )
    return int(last.get("NumberOfFailedSuboperations", 0) or 0)


def _find(association: Any, model: Any, level: str, keys: dict[str, str]) -> Iterator[Any]:
    from pydicom.dataset import Dataset

    wanted = Dataset()
    wanted.QueryRetrieveLevel = level
    for key, value in keys.items():
        setattr(wanted, key, value)
    for status, row in association.send_c_find(wanted, model):
        if "Status" not in status:
            raise ConsiliaError("the PACS ended the association during a C-FIND; see its log")
        if status.Status in PENDING and row is not None:
            yield row
        elif status.Status not in (SUCCESS, *PENDING):
            raise ConsiliaError(
                f"the PACS refuses the C-FIND (status {status.Status:04X}); have its administrator "
                "allow queries at study and series level"
            )


def _series(row: Any, study: str) -> Series:
    number = row.get("NumberOfSeriesRelatedInstances")
    try:
        return Series(
            study=study,
            series=str(row.get("SeriesInstanceUID", "")),
            num_instances=None if number in (None, "") else int(number),
        )
    except (ValidationError, ValueError):
        raise ConsiliaError(
            "the PACS answered a search without the UID of a series; ask its maker"
        ) from None


def _identifier(series: Series) -> Any:
    from pydicom.dataset import Dataset

    wanted = Dataset()
    wanted.QueryRetrieveLevel = "SERIES"
    wanted.StudyInstanceUID = series.study
    wanted.SeriesInstanceUID = series.series
    return wanted


def _store(event: Any, root: Path, reserve_bytes: int) -> int:
    """Keep one received image, as it came, before it is acknowledged."""
    try:
        if shutil.disk_usage(root).free < reserve_bytes:
            log.error("an image was refused: less space is left than pacs.station.reserve_mb")
            return OUT_OF_RESOURCES
        put(root, event.encoded_dataset())
    except OSError as error:
        log.error("an image could not be kept: %s", type(error).__name__)
        return OUT_OF_RESOURCES
    except Exception as error:
        log.error("an image could not be understood: %s", type(error).__name__)
        return CANNOT_UNDERSTAND
    return SUCCESS


@contextmanager
def _associated(
    pacs: DimsePacs,
    station: Station,
    abstract_syntaxes: list[Any],
    *,
    roles: list[Any] | None = None,
    handlers: list[Any] | None = None,
) -> Iterator[Any]:
    from pynetdicom import ALL_TRANSFER_SYNTAXES, evt

    entity = _entity(station.title)
    for uid in abstract_syntaxes:
        entity.add_requested_context(uid, ALL_TRANSFER_SYNTAXES if roles else None)
    association = entity.associate(
        pacs.host,
        pacs.port,
        ae_title=pacs.title,
        max_pdu=MOST_PDU_BYTES,
        ext_neg=roles,
        evt_handlers=[(evt.EVT_CONN_OPEN, _hurry), *(handlers or [])],
    )
    if not association.is_established:
        raise ConsiliaError(_why_not(association, pacs, station))
    association._reactor_checkpoint = _Checkpoint()
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def _why_not(association: Any, pacs: DimsePacs, station: Station) -> str:
    if association.is_rejected:
        return (
            f"the PACS rejects this station; have its administrator add {station.title} with this "
            f"machine's address, and check that pacs.dimse.title is its own title, {pacs.title}"
        )
    return (
        f"the PACS cannot be reached at {pacs.host}:{pacs.port}; check pacs.dimse and the firewall"
    )


def _hurry(event: Any) -> None:
    """Send small messages at once, and look for the next ones soon."""
    event.assoc.dul._run_loop_delay = LOOK_S
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _entity(title: str) -> Any:
    from pynetdicom import AE

    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it logs what was asked for
    entity = AE(ae_title=title)
    entity.maximum_pdu_size = MOST_PDU_BYTES
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT_S
    entity.connection_timeout = TIMEOUT_S / 2
    return entity


@cache
def _storage_contexts() -> list[Any]:
    from pynetdicom import ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, build_context

    return [
        build_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
        for context in AllStoragePresentationContexts
    ]


def _without(keys: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in keys.items() if key != name}

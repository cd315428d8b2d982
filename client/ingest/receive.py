"""What arrives, one object at a time: looked at, de-identified, and put where its series waits.

Design: whether slices belong together is judged by what their headers said before they were
de-identified, of which keyed marks are kept, and by where the de-identified files say they lie. So
what de-identification takes out cannot hide that two series were mixed. A file that is no DICOM
object spoils the series beside it in its folder: it may be a broken slice of theirs, and a slice
missing at an end of a stack leaves no trace.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmwrite
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import SegmentationStorage

from client.ingest import catalogue, maps, shelves
from client.ingest.catalogue import Instance
from client.ingest.deid import Refused, deidentify, identity_of
from client.ingest.desk import Desk, Progress
from client.ingest.elements import bytes_of, first
from client.ingest.keys import remember
from client.ingest.refusals import FINAL
from client.ingest.sources import Arrival
from shared_models.errors import ConsiliaError, DataError, MachineError
from shared_models.reasons import Reason
from shared_models.slices import Slice, inspect, inspect_stream

#: So many files reach the disk, and the catalogue, together.
BATCH = 64
NOWHERE = Path()
#: What a file is called that is no slice: lists, reports, pictures, other formats.
LISTS = (".txt", ".csv", ".json", ".xml", ".pdf", ".html", ".htm", ".log", ".md")
PICTURES = (".jpg", ".jpeg", ".png", ".nii", ".gz", ".zip", ".nrrd", ".mha", ".exe")


def receive_all(desk: Desk, is_stopped: Callable[[], bool], progress: Progress) -> tuple[str, ...]:
    """Receive everything; return why the source broke off, if it did."""
    objections: tuple[str, ...] = ()
    desk.connection.execute("BEGIN IMMEDIATE")
    try:
        for arrival in desk.source.arrivals:
            _receive(desk, arrival)
            desk.done.append(arrival.done)
            desk.num_files += 1
            progress("reading", desk.num_files, desk.source.num_files)
            if desk.num_files % BATCH == 0:
                _flush(desk)
            if is_stopped():
                break
        else:
            desk.uncounted.clear()
    except ConsiliaError as error:
        if isinstance(error, MachineError):
            raise
        objections = error.objections
    finally:
        _flush(desk)
        desk.connection.execute("COMMIT")
    return objections


def _flush(desk: Desk) -> None:
    """Have the files and then the catalogue reach the disk; only then tell the source."""
    shelves.flush(desk.unsynced)
    for folder in desk.folders:
        shelves.sync(folder)
    desk.connection.execute("COMMIT")
    for done in desk.done:
        done()
    desk.unsynced, desk.folders, desk.done = [], set(), []
    desk.connection.execute("BEGIN IMMEDIATE")


def _receive(desk: Desk, arrival: Arrival) -> None:
    state, place = _state(desk, arrival.file)
    noted = {"place": place, "root": desk.root, "run": desk.run}
    if state:
        is_known, series = catalogue.series_seen(desk.connection, state, **noted)  # type: ignore[arg-type]
        if is_known:
            desk.num_known += 1
            desk.touched.add(series or "")
            return
    series = _take(desk, arrival)
    desk.touched.add(series or "")
    if series is None and place and not _is_of_others(arrival.file):
        catalogue.reopen_at(desk.connection, place)
    if state and (series is not None or not _is_of_others(arrival.file)):
        catalogue.note_seen(desk.connection, state, series=series, **noted)  # type: ignore[arg-type]


def _state(desk: Desk, file: Path | None) -> tuple[str, str]:
    """Return what changes when a file in the source's folder does, and where it lies, as marks."""
    if file is None or desk.source.root is None:
        return "", ""
    try:
        stat = file.stat()
    except OSError:
        return "", ""
    times = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    state = desk.key.mark(f"{file.absolute()}\0{times}\0{desk.profile}")
    return state, desk.key.mark(f"place {file.absolute().parent}")


def _is_of_others(file: Path | None) -> bool:
    """Return whether a file's name says that it is no slice: a report, a picture, a list."""
    return file is not None and file.name.lower().endswith(LISTS + PICTURES)


def _take(desk: Desk, arrival: Arrival) -> str | None:
    """Take one object in; return which series it is of, None if it is no object."""
    try:
        dataset = arrival.read()
        found = inspected(arrival.file, dataset)
    except DataError:
        return None
    if found == "not-dicom":
        return None
    if _said(dataset, "SOPClassUID") == SegmentationStorage:
        return _take_segmentation(desk, dataset)
    if isinstance(found, str):
        return _set_aside(desk, dataset, reason=found)
    return _take_slices(desk, dataset, found)


def inspected(file: Path | None, dataset: Dataset) -> list[Slice] | Reason:
    """Return an object's slices, or why it holds none; ``file`` is where it lies, if anywhere.

    Raises:
        DataError: if it is no object.
    """
    if file is not None:
        return inspect(file)
    stream = io.BytesIO()
    try:
        dcmwrite(stream, dataset)
    except Exception:  # whatever a broken object makes a writer raise
        raise DataError("no object that can be written") from None
    stream.seek(0)
    return inspect_stream(stream, NOWHERE)


def _said(dataset: Dataset, keyword: str) -> str:
    try:
        return str(first(dataset, keyword))
    except Exception:  # of a value that nobody understands, nothing may be said
        return ""


def _uid(desk: Desk, uid: str, *instead: str) -> str:
    return desk.key.uid(uid or f"none {' '.join(instead)}")


def _set_aside(desk: Desk, dataset: Dataset, *, reason: str) -> str:
    """Note an object that is no slice; nothing of it is kept."""
    series_uid = _uid(desk, _said(dataset, "SeriesInstanceUID"), "series")
    uid = _uid(desk, _said(dataset, "SOPInstanceUID"), series_uid, str(desk.num_files))
    aside = Instance(uid, series_uid, series_uid, "[]", reason, 1, None, None, desk.profile)
    if catalogue.find_instance(desk.connection, uid) is None:
        study = _uid(desk, _said(dataset, "StudyInstanceUID"), series_uid)
        _open(desk, aside, study=study, patient=None, modality="")
        catalogue.put_instance(desk.connection, aside)
    return series_uid


def _take_slices(desk: Desk, dataset: Dataset, slices: list[Slice]) -> str:
    one = slices[0]
    uid = _uid(desk, one.instance, one.series, str(desk.num_files))
    series_uid = _uid(desk, one.series, uid)
    is_own = one.is_multiframe or one.is_film or not one.series
    marks = json.dumps([[desk.key.mark(repr(group)) for group in s.same] for s in slices])
    fault: str | None = next((s.fault for s in slices if s.fault is not None), None)
    if fault is None and _said(dataset, "SOPInstanceUID") != one.instance:
        fault = "damaged"  # cut off in the middle of an element, so that nothing could be read
    new = Instance(
        uid, uid if is_own else series_uid, series_uid, marks, fault, 0, None, None, desk.profile
    )
    cleaned = None if fault else deidentify(dataset, desk.settings.terms, desk.key)
    if isinstance(cleaned, Refused):
        new, cleaned = new._replace(fault=_fault(dataset, cleaned)), None
    study = _uid(desk, _said(dataset, "StudyInstanceUID"), series_uid)
    if cleaned is None:
        _add(desk, new, None, study=study, patient=None, modality=one.modality)
    else:
        _remember(desk, dataset)
        content = _encoded(cleaned)
        new = new._replace(
            digest=hashlib.sha256(content).hexdigest(), content=_shown(content, cleaned)
        )
        _add(
            desk,
            new,
            content,
            study=study,
            patient=str(cleaned.PatientID),
            modality=str(cleaned.get("Modality", "")),
        )
    return new.series


def _fault(dataset: Dataset, refused: Refused) -> str:
    """Return why an object cannot be kept; pixels that a decoder here chokes on are damaged."""
    if refused.reason != "no-decoder":
        return refused.reason
    try:
        can_decode = get_decoder(dataset.file_meta.TransferSyntaxUID).is_available
    except NotImplementedError:
        can_decode = False
    return "damaged" if can_decode else refused.reason


def _encoded(cleaned: Dataset) -> bytes:
    stream = io.BytesIO()
    dcmwrite(stream, cleaned, enforce_file_format=True)
    return stream.getvalue()


def _shown(content: bytes, cleaned: Dataset) -> str:
    """Return the digest of what an object shows and where, however it is encoded."""
    found: Any = inspect_stream(io.BytesIO(content), NOWHERE)
    if not isinstance(found, str):
        found = [
            s._replace(
                file=NOWHERE,
                offset=None,
                same=(),
                layout=s.layout and s.layout._replace(is_big_endian=False),
            )
            for s in found
        ]
    digest = hashlib.sha256(repr(found).encode())
    digest.update(bytes_of(cleaned.get_item("PixelData")))
    return digest.hexdigest()


def _remember(desk: Desk, dataset: Dataset) -> None:
    """Have the register lead back to the patient before anything of theirs is kept."""
    patient = identity_of(dataset)
    if (pseudonym := desk.key.pseudonym(patient)) not in desk.known_patients:
        remember(desk.settings.private / shelves.REGISTER, [patient], desk.key)
        desk.known_patients.add(pseudonym)


def _add(
    desk: Desk,
    new: Instance,
    content: bytes | None,
    *,
    study: str,
    patient: str | None,
    modality: str,
) -> None:
    """Add an instance to its series, with its file, unless it is there or refused for good."""
    known = catalogue.find_instance(desk.connection, new.uid)
    series = catalogue.find_series(desk.connection, new.series)
    if known is not None and known.series == new.series and known.profile == new.profile:
        if known.fault == "conflicting" or (known.fault, known.content) == (new.fault, new.content):
            return
        if known.content is not None and series is not None and series.state == "accepted":
            catalogue.put_flag(desk.connection, new.series, "changed-at-source")
            return
        if known.content is not None and new.content is not None:
            new, content = new._replace(fault="conflicting", digest=None, content=None), None
    if series is not None and series.state == "refused" and series.reason in FINAL:
        if series.profile == new.profile:
            gone = new._replace(fault=series.reason, digest=None, content=None)
            catalogue.put_instance(desk.connection, gone)
            return
        desk.connection.execute("DELETE FROM instances WHERE series = ?", (new.series,))
    _open(desk, new, study=study, patient=patient, modality=modality)
    if content is not None:
        file = shelves.pending_file(
            desk.settings, series=new.series, uid=new.uid, digest=new.digest or ""
        )
        desk.unsynced.append(shelves.write(file, content))
        desk.folders |= {file.parent, file.parent.parent}
    catalogue.put_instance(desk.connection, new)


def _open(desk: Desk, new: Instance, *, study: str, patient: str | None, modality: str) -> None:
    """Have the series of an instance judged again, or begin it."""
    if patient is not None:
        catalogue.add_patient(desk.connection, patient)
    known = catalogue.find_series(desk.connection, new.series)
    if known is None:
        known = catalogue.Series(
            new.series,
            new.series_uid,
            study,
            patient,
            modality,
            desk.profile,
            "open",
            None,
            time.time(),
            None,
        )
    catalogue.put_series(
        desk.connection,
        known._replace(
            patient=known.patient or patient,
            modality=known.modality or modality,
            profile=desk.profile,
            state="open",
            changed=time.time(),
        ),
    )


def _take_segmentation(desk: Desk, dataset: Dataset) -> str:
    """Keep a segmentation until its series is a volume; return the series it is of."""
    of = _uid(desk, maps.referenced(dataset), "referenced")
    uid = _uid(desk, _said(dataset, "SOPInstanceUID"), of)
    cleaned = deidentify(dataset, desk.settings.terms, desk.key)
    if isinstance(cleaned, Refused):
        return of
    content = _encoded(cleaned)
    digest = hashlib.sha256(content).hexdigest()
    file = shelves.pending_file(desk.settings, series=shelves.MAPS, uid=uid, digest=digest)
    if not file.exists():
        desk.unsynced.append(shelves.write(file, content))
        desk.folders |= {file.parent, file.parent.parent}
    catalogue.put_segmentation(desk.connection, uid, series_uid=of, digest=digest)
    return of

"""From a source to the store: de-identify, judge, keep, and write down what became of it.

Objects come one at a time, in any order. Each is looked at, de-identified, and waits on the disk
until its source is exhausted (or, when a source is watched, quiet); then its series is judged as a
whole, and kept as a volume or refused with a reason.

Guarantees:
    Nothing that came is written to the disk before it is de-identified, nor are its names.
    The same images taken in twice change nothing.
    A series that has grown is replaced as a whole; one that grew into no volume is withdrawn.
    A process killed at any point leaves a store that the next run completes, as if undisturbed.
    A series that is refused stops no other.
    Memory does not grow with the source: one object, then one volume at a time.

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
import logging
import os
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydicom import Dataset, config, dcmwrite
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import SegmentationStorage

from client.config import IngestSettings
from client.ingest import catalogue, maps, shelves
from client.ingest.catalogue import Instance
from client.ingest.deid import METHOD, Refused, deidentify, identity_of
from client.ingest.elements import bytes_of, first
from client.ingest.keys import Key, create_key, load_key, remember
from client.ingest.manifest import write_manifest
from client.ingest.refusals import FINAL
from client.ingest.sources import Arrival
from shared_models import series as readers
from shared_models.contracts import Contract
from shared_models.errors import ConsiliaError, DataError, MachineError
from shared_models.files import locked
from shared_models.reasons import Fault
from shared_models.slices import PROJECTIONS, Slice, inspect, inspect_stream
from shared_models.volume import Volume

SOFTWARE = ("pydicom", "numpy")
#: So many files reach the disk, and the catalogue, together.
BATCH = 64
NOWHERE = Path()
#: Less than this many slices, or thicker ones, are worth a look.
FEW_SLICES, THICK_MM = 5, 6.0
SUFFIXES_OF_OTHERS = (".txt", ".csv", ".json", ".xml", ".pdf", ".html", ".htm", ".log", ".md")
SUFFIXES_OF_OTHERS += (".jpg", ".jpeg", ".png", ".nii", ".gz", ".zip", ".nrrd", ".mha", ".exe")

Kind = Literal["folder", "web", "dimse"]
Outcome = Literal["new", "changed", "same", "refused", "withdrawn"]
#: Told what is being done, how much is done, and of how much (0: not known).
Progress = Callable[[str, int, int], None]

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where images come from; ``root`` is the folder, if it is one.

    ``uncounted`` are the series, by their new UID, of which the PACS does not say how many objects
    it holds: if it breaks off, they are left to the next run.
    """

    kind: Kind
    arrivals: Iterator[Arrival]
    root: Path | None = None
    num_files: int = 0
    uncounted: set[str] = set()


class Report(Contract):
    """What a run took in: counts, and nothing else.

    ``known`` files were looked at before. Series are counted as they stand after the run, if the
    source holds them: of the accepted, ``new`` and ``changed`` by this run. ``withdrawn`` were
    accepted before. ``waiting`` came too recently to be judged, or not all of it could be had.
    """

    source: Kind
    files: int = 0
    known: int = 0
    accepted: int = 0
    new: int = 0
    changed: int = 0
    withdrawn: int = 0
    waiting: int = 0
    refused: dict[str, int] = {}
    patients: int = 0
    label_maps: int = 0
    objections: tuple[str, ...] = ()


class Desk:
    """A site's intake while it is open: its settings, key and catalogue, and what it has seen."""

    def __init__(
        self, settings: IngestSettings, connection: sqlite3.Connection, key: Key, source: Source
    ) -> None:
        self.settings, self.connection, self.key = settings, connection, key
        self.source = source
        terms = settings.terms.model_dump_json().encode()
        self.profile = f"{METHOD} {hashlib.sha256(terms).hexdigest()[:16]}"
        self.root = "" if source.root is None else key.mark(str(source.root.absolute()))
        self.run = catalogue.begin_run(connection, source=source.kind, began=now())
        self.touched: set[str] = set()
        self.known_patients = registered(settings)
        self.unsynced: list[int] = []
        self.folders: set[Path] = set()
        self.done: list[Callable[[], None]] = []
        self.num_files = self.num_known = 0


@contextmanager
def opened(settings: IngestSettings) -> Iterator[tuple[sqlite3.Connection, Key]]:
    """Open the site's catalogue and its key, which is made if there is none, for one process.

    Raises:
        ConsiliaError: if they cannot be used, or another process takes images in.
    """
    try:
        shelves.make_folders(settings)
    except OSError as error:
        raise MachineError(
            f"cannot make {settings.folder} ({error.strerror}); correct ingest.folder in site.toml"
        ) from error
    refusal = "another process takes images in or changes labels; wait for it, or end it"
    with locked(settings.private / shelves.LOCK, refusal=refusal):
        file = settings.private / shelves.KEY
        key = load_key(file) if file.exists() else create_key(file)
        with catalogue.opened(settings.private / shelves.CATALOGUE) as connection:
            yield connection, key


@contextmanager
def quiet() -> Iterator[None]:
    """Let nothing that reads DICOM warn or log: it would quote what it complains about."""
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        for name in ("pydicom", "highdicom"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield


def take_in(
    settings: IngestSettings,
    connection: sqlite3.Connection,
    key: Key,
    source: Source,
    *,
    settle_s: float = 0.0,
    is_stopped: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Take in what ``source`` holds, and return what became of it.

    Args:
        settings: where to, and under which terms.
        connection: the catalogue.
        key: the site's own.
        source: where from.
        settle_s: a series of which something came within this time is left to a later run.
        is_stopped: asked between files; what came until then is kept.
        progress: told of what is done.

    Raises:
        MachineError: if the disk is full or cannot be written; the next run goes on from there.
    """
    with quiet():
        try:
            shelves.sweep(settings, connection)
            desk = Desk(settings, connection, key, source)
            objections = _receive_all(desk, is_stopped, progress)
            if source.root is not None and not is_stopped():
                with catalogue.changing(connection):
                    catalogue.forget_gone(connection, root=desk.root, run=desk.run)
                    catalogue.reopen(connection, reason="not-dicom")
            outcomes = _settle_all(desk, settle_s, is_stopped, progress)
            maps.make_all(settings, connection)
            write_manifest(settings, connection)
            report = _report(desk, outcomes, objections)
        except OSError as error:
            raise MachineError(
                f"the store cannot be written ({error.strerror}); see to {settings.folder}, then "
                "run the same command again: it goes on from there"
            ) from error
        catalogue.end_run(connection, desk.run, ended=now(), report=report.model_dump_json())
    return report


def now() -> str:
    """Return the time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def registered(settings: IngestSettings) -> set[str]:
    """Return the pseudonyms that the register knows."""
    with suppress(FileNotFoundError):
        lines = (settings.private / shelves.REGISTER).read_text("ascii").splitlines()
        return {line.partition(" ")[0] for line in lines}
    return set()


# --- receiving


def _receive_all(
    desk: Desk, is_stopped: Callable[[], bool], progress: Progress
) -> tuple[str, ...]:
    """Receive everything; return why the source broke off, if it did."""
    objections: tuple[str, ...] = ()
    desk.connection.execute("BEGIN IMMEDIATE")
    try:
        for arrival in desk.source.arrivals:
            _receive(desk, arrival)
            desk.num_files += 1
            progress("reading", desk.num_files, desk.source.num_files)
            if desk.num_files % BATCH == 0:
                _flush(desk)
            if is_stopped():
                break
        else:
            desk.source.uncounted.clear()
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
    for descriptor in desk.unsynced:
        os.fsync(descriptor)
        os.close(descriptor)
    for folder in desk.folders:
        shelves.sync(folder)
    desk.connection.execute("COMMIT")
    for done in desk.done:
        done()
    desk.unsynced, desk.folders, desk.done = [], set(), []
    desk.connection.execute("BEGIN IMMEDIATE")


def _receive(desk: Desk, arrival: Arrival) -> None:
    desk.done.append(arrival.done)
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
    return file is not None and file.name.lower().endswith(SUFFIXES_OF_OTHERS)


def _take(desk: Desk, arrival: Arrival) -> str | None:
    """Take one object in; return which series it is of, None if it is no object."""
    try:
        dataset = arrival.read()
        found = _inspected(arrival.file, dataset)
    except DataError:
        return None
    if found == "not-dicom":
        return None
    if _said(dataset, "SOPClassUID") == SegmentationStorage:
        return _take_segmentation(desk, dataset)
    if isinstance(found, str):
        return _set_aside(desk, dataset, reason=found)
    return _take_slices(desk, dataset, found)


def _inspected(file: Path | None, dataset: Dataset) -> list[Slice] | str:
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


# --- judging


def _settle_all(
    desk: Desk, settle_s: float, is_stopped: Callable[[], bool], progress: Progress
) -> dict[str, Outcome]:
    """Judge every series that something came of, except those that may not be all here."""
    outcomes: dict[str, Outcome] = {}
    found = catalogue.open_series(desk.connection, before=time.time() - settle_s)
    for done, uid in enumerate(found):
        series = catalogue.find_series(desk.connection, uid)
        if series is not None and series.series_uid not in desk.source.uncounted:
            outcomes[uid] = _settle(desk, series)
        if is_stopped():
            break
        progress("judging", done + 1, len(found))
    return outcomes


def _settle(desk: Desk, series: catalogue.Series) -> Outcome:
    connection, uid = desk.connection, series.uid
    every = catalogue.instances(connection, uid)
    images = [one for one in every if not one.is_aside]
    before = catalogue.find_volume(connection, uid)
    folder = None if before is None else before.folder
    try:
        volume = _read(desk, series, images, every, folder=folder)
    except Fault as fault:
        return _refuse(desk, series, images, reason=fault.reason, folder=folder)
    digest = shelves.digest_of(uid, images)
    if before is not None and before.digest == digest:
        with catalogue.changing(connection):
            catalogue.judge(connection, uid, state="accepted")
        shelves.clear_pending(desk.settings, uid)
        return "same"
    files = {
        f"{one.uid}.dcm": shelves.file_of(desk.settings, one, folder=folder) for one in images
    }
    new = shelves.publish(desk.settings, files, patient=series.patient or "", digest=digest)
    _accept(desk, series, volume, folder=new, digest=digest, num=(len(images), len(every)))
    shelves.clear_pending(desk.settings, uid)
    if folder is not None:
        write_manifest(desk.settings, connection)
        shelves.remove(desk.settings, folder)
    return "new" if folder is None else "changed"


def _read(
    desk: Desk,
    series: catalogue.Series,
    images: list[Instance],
    every: list[Instance],
    *,
    folder: str | None,
) -> Volume:
    """Return the volume a series is.

    Raises:
        Fault: if it is none.
    """
    if not images:
        raise Fault(every[0].fault or "empty")  # type: ignore[arg-type]
    for one in images:
        if one.fault is not None:
            raise Fault(one.fault)  # type: ignore[arg-type]
    if catalogue.is_beside_no_object(desk.connection, series.uid):
        raise Fault("not-dicom")
    if catalogue.num_missing(desk.connection, series.series_uid):
        raise Fault("incomplete")  # type: ignore[arg-type]
    slices: list[Slice] = []
    for one in images:
        slices += _slices(one, shelves.file_of(desk.settings, one, folder=folder))
    files = tuple(dict.fromkeys(one.file for one in slices))
    try:
        return readers.read(readers.Series(files, tuple(slices)))
    except readers.SeriesRefused as refused:
        raise Fault(refused.reason) from None


def _slices(instance: Instance, file: Path) -> list[Slice]:
    """Return an instance's slices as its file says, but alike as they were before."""
    found = inspect(file)
    if isinstance(found, str):
        raise Fault(found)
    marks = json.loads(instance.marks)
    if len(marks) != len(found):
        raise Fault("bad-frames")
    return [
        one._replace(same=tuple((mark,) for mark in own))
        for one, own in zip(found, marks, strict=True)
    ]


def _refuse(
    desk: Desk,
    series: catalogue.Series,
    images: list[Instance],
    *,
    reason: str,
    folder: str | None,
) -> Outcome:
    """Refuse a series; what may still become a volume waits, the rest is not kept."""
    kept = [one for one in images if one.digest is not None and reason not in FINAL]
    if folder is not None:
        shelves.take_back(desk.settings, kept, folder=folder)
    with catalogue.changing(desk.connection):
        catalogue.judge(desk.connection, series.uid, state="refused", reason=reason)
        catalogue.drop_volume(desk.connection, series.uid)
        if reason in FINAL:
            catalogue.drop_files(desk.connection, series.uid)
    if reason in FINAL:
        shelves.clear_pending(desk.settings, series.uid)
    if folder is None:
        return "refused"
    write_manifest(desk.settings, desk.connection)
    shelves.remove(desk.settings, folder)
    return "withdrawn"


def _accept(
    desk: Desk,
    series: catalogue.Series,
    volume: Volume,
    *,
    folder: str,
    digest: str,
    num: tuple[int, int],
) -> None:
    num_files, num_objects = num
    found = measured(series.uid, volume, folder=folder, digest=digest, num_files=num_files)
    with catalogue.changing(desk.connection):
        catalogue.judge(desk.connection, series.uid, state="accepted")
        catalogue.put_volume(
            desk.connection,
            found,
            source=desk.source.kind,
            taken=now(),
            profile=desk.profile,
            software=" ".join(f"{name} {version(name)}" for name in SOFTWARE),
            flags=_flags(found, is_film=volume.modality in PROJECTIONS)
            + ["left-out"] * (num_objects > num_files),
        )


def measured(
    series: str, volume: Volume, *, folder: str, digest: str, num_files: int
) -> catalogue.Volume:
    """Return what is written down of a volume; percentiles of at most a million voxels."""
    from nibabel.orientations import aff2axcodes

    sample = volume.data.ravel()[:: max(1, volume.data.size // 2**20)]
    p1, median, p99 = (float(v) for v in np.percentile(sample, (1, 50, 99)))
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    return catalogue.Volume(
        series,
        folder,
        digest,
        num_files,
        *volume.data.shape,
        *(round(value, 6) for value in volume.spacing_mm),
        "".join(aff2axcodes(ras)),
        float(volume.data.min()),
        p1,
        median,
        p99,
        float(volume.data.max()),
    )


def _flags(volume: catalogue.Volume, *, is_film: bool) -> list[str]:
    """Return what is worth a look about a volume."""
    found = {
        "one-value": volume.low == volume.high,
        "few-slices": volume.num_slices < FEW_SLICES and not is_film,
        "thick-slices": volume.z_mm > THICK_MM and not is_film,
        "not-axial": volume.orientation[-1] not in "SI" and not is_film,
    }
    return [flag for flag, holds in found.items() if holds]


def _report(desk: Desk, outcomes: dict[str, Outcome], objections: tuple[str, ...]) -> Report:
    """Count what the source holds, as it stands now."""
    found = [catalogue.find_series(desk.connection, uid) for uid in sorted(desk.touched) if uid]
    states = [one for one in found if one is not None]
    refused = Counter(one.reason or "" for one in states if one.state == "refused")
    refused["not-dicom"] += catalogue.num_alone(desk.connection, run=desk.run)
    outcome = Counter(outcomes.values())
    return Report(
        source=desk.source.kind,
        files=desk.num_files,
        known=desk.num_known,
        accepted=sum(one.state == "accepted" for one in states),
        new=outcome["new"],
        changed=outcome["changed"],
        withdrawn=outcome["withdrawn"],
        waiting=sum(one.state == "open" for one in states),
        refused={reason: refused[reason] for reason in sorted(refused) if refused[reason]},
        patients=len({one.patient for one in states if one.state == "accepted"}),
        label_maps=catalogue.num_maps(desk.connection),
        objections=objections,
    )

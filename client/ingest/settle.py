"""Series judged as a whole: kept as a volume, replaced by a grown one, refused or withdrawn."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from client.ingest import catalogue, shelves
from client.ingest.catalogue import Instance
from client.ingest.desk import Desk, Progress, Report, now
from client.ingest.manifest import write_manifest
from client.ingest.refusals import FINAL
from shared_models import series as readers
from shared_models.reasons import Fault
from shared_models.slices import PROJECTIONS, Slice, inspect
from shared_models.volume import Volume

SOFTWARE = ("pydicom", "numpy")
#: Less than this many slices, or thicker ones, are worth a look.
FEW_SLICES, THICK_MM = 5, 6.0

Outcome = Literal["new", "changed", "same", "refused", "withdrawn"]


def settle_all(
    desk: Desk, settle_s: float, is_stopped: Callable[[], bool], progress: Progress
) -> dict[str, Outcome]:
    """Judge every series that something came of, except those that may not be all here."""
    outcomes: dict[str, Outcome] = {}
    found = catalogue.open_series(desk.connection, before=time.time() - settle_s)
    for done, uid in enumerate(found):
        if is_stopped():
            break
        series = catalogue.find_series(desk.connection, uid)
        if series is not None and series.series_uid not in desk.uncounted:
            outcomes[uid] = _settle(desk, series)
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
    files = {f"{one.uid}.dcm": shelves.file_of(desk.settings, one, folder=folder) for one in images}
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
        raise Fault((every[0].fault if every else None) or "empty")  # type: ignore[arg-type]
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
    num_slices, num_rows, num_columns = volume.data.shape
    z_mm, y_mm, x_mm = (round(value, 6) for value in volume.spacing_mm)
    return catalogue.Volume(
        series=series,
        folder=folder,
        digest=digest,
        num_files=num_files,
        num_slices=num_slices,
        num_rows=num_rows,
        num_columns=num_columns,
        z_mm=z_mm,
        y_mm=y_mm,
        x_mm=x_mm,
        orientation="".join(aff2axcodes(ras)),
        low=float(volume.data.min()),
        p1=p1,
        median=median,
        p99=p99,
        high=float(volume.data.max()),
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


def reported(desk: Desk, outcomes: dict[str, Outcome], objections: tuple[str, ...]) -> Report:
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

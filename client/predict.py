"""A released model on one study: from a release and a folder to pages and DICOM objects.

Everything happens in this process and on this machine; nothing is fetched and nothing is sent.

Guarantees:
    Nothing is written unless release and study passed every check; the folder appears whole.
    Who the patient is stands in the DICOM objects, in ``prediction.json`` and on the doctor's page,
    all readable by their owner only; in no file's name, no message and not on the patient's page.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from client.display import facts, infer, kinds, objects, pages, pictures, release, words
from client.display.base import Asked, Result
from client.display.objects import Origin
from client.display.prediction import Classified, Prediction
from client.display.release import Released
from client.display.study import headers, open_study
from shared_models.errors import DataError, DocumentError
from shared_models.files import create

log = logging.getLogger(__name__)

JSON, DOCTOR, PATIENT = "prediction.json", "doctor.html", "patient.html"


class Choice(NamedTuple):
    """What a person chose: the modality to look for, which series, whether DICOM is wanted."""

    modality: str | None = None
    series: int | None = None
    with_dicom: bool = True


NO_CHOICE = Choice()


def predict(
    model: Path,
    study: Path,
    folder: Path,
    *,
    coordinator: str,
    plugins: Collection[str] = (),
    choice: Choice = NO_CHOICE,
    progress: Callable[[str], None] = lambda _: None,
) -> Prediction:
    """Run the release ``model`` on ``study`` and leave what it says in ``folder``.

    Args:
        model: a release's folder.
        study: a folder of DICOM files, a DICOM or NIfTI file, or a picture.
        folder: where the answer goes; it must not exist.
        coordinator: the public key (hexadecimal) that must have signed the release.
        plugins: distributions whose tasks, nets and steps may be used, as ``name==version``.
        choice: what the study alone does not decide.
        progress: told what is done next.

    Raises:
        ConsiliaError: with what a person can do about it, and nothing of the patient.
    """
    if folder.exists():
        raise DocumentError("the folder for the answer exists; name a new one")
    progress("checking the release")
    released = release.open_release(model, coordinator=coordinator, plugins=plugins)
    kind = kinds.kind_of(released)
    progress("reading the study")
    opened = open_study(
        study,
        modalities=_modalities(released, choice),
        number=choice.series,
        stated=choice.modality,
    )
    progress("asking the model")
    prepared = infer.prepare(opened.volume, released, plugins=plugins)
    asked = Asked(opened, released, prepared)
    result = kind.read(infer.outputs(prepared, released), asked)
    progress("writing the answer")
    origin = Origin(opened, released, datetime.now(UTC).replace(microsecond=0))
    wanted = choice.with_dicom and bool(opened.slices)
    written = _objects(kind.report, result, origin) if wanted else []
    prediction = Prediction(
        created=origin.created,
        software=f"consilia {version('consilia')}",
        model=facts.model_card(released, coordinator=coordinator),
        study=facts.study_card(opened),
        answer=result.answer,
        legend=result.legend,
        picture=pictures.plain_picture(opened, result),
        sheets=pictures.sheets(opened, result, plan=released.plan),
        files=tuple(name for name, _ in written),
        cautions=facts.cautions(asked, result, has_dicom=bool(written)),
    )
    _write(folder, prediction, written)
    log.info("predicted: %d DICOM objects", len(written))
    return prediction


def read(file: Path) -> Prediction:
    """Read a ``prediction.json``.

    Raises:
        DocumentError: if it cannot be read or is none; the message repeats no content.
    """
    try:
        return Prediction.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot read the prediction ({type(error).__name__})") from None


def _modalities(released: Released, choice: Choice) -> tuple[str, ...]:
    """Return the modalities to look for; nobody's guess."""
    known = released.manifest.modalities
    if not known and choice.modality is None:
        raise DataError(
            "the release does not say which images it reads; state the modality it was made for "
            "with --modality, such as CT or MR"
        )
    return known or (str(choice.modality),)


def _objects(
    report: Callable[..., list[tuple[str, Any]]], result: Result, origin: Origin
) -> list[tuple[str, Any]]:
    sources = headers(origin.study)
    found = list(report(result, sources, origin))
    series = None
    for number, slice_ in enumerate(result.key_slices, 1):
        pixels = pictures.key_image(
            origin.study, result, slice_, lines=_lines(result, origin, slice_)
        )
        one = objects.key_image(pixels, slice_, sources, origin, number=number)
        series = series or one.SeriesInstanceUID
        one.SeriesInstanceUID = series
        found.append((f"key-image-{number}.dcm", one))
    return found


def _lines(result: Result, origin: Origin, slice_: int) -> list[str]:
    num_slices = origin.study.shown.data.shape[0]
    lines = [f"model {origin.released.version}; slice {slice_ + 1} of {num_slices}"]
    if isinstance(result.answer, Classified):
        first = result.answer.classes[0]
        share = words.percent(first.probability)
        lines.append(
            f"{words.certainty(first.probability)} {first.name} ({share} of its certainty)"
        )
    return lines


def _write(folder: Path, prediction: Prediction, objects_: list[tuple[str, Any]]) -> None:
    """Write everything beside its place, then move it there whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)
    try:
        create(partial / JSON, (prediction.model_dump_json(indent=1) + "\n").encode())
        create(partial / DOCTOR, pages.doctor(prediction).encode())
        create(partial / PATIENT, pages.patient(prediction).encode())
        for name, dataset in objects_:
            create(partial / name, _bytes(dataset))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@objects.quietly
def _bytes(dataset: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()

"""What is said of a model and a study on the pages: from the release and the image alone."""

from __future__ import annotations

from collections.abc import Iterator

from client.display import infer
from client.display.base import Asked, Result
from client.display.prediction import Classified, ModelCard, Outlined, StudyCard
from client.display.release import Released
from client.display.study import Study, directions
from shared_models.signing import digest

#: Fewer patients than this say little about how good a model is.
FEW_PATIENTS = 30
WHOLE = 0.999
#: The model works on voxels this much larger than the image's before it is worth a word.
COARSER = 1.5


def model_card(released: Released, *, coordinator: str) -> ModelCard:
    """Return what the release says of itself."""
    manifest, plan = released.manifest, released.plan
    return ModelCard(
        name=plan.name,
        version=released.version,
        purpose=plan.purpose,
        description=plan.description,
        task=manifest.task,
        net=manifest.net,
        strategy=manifest.strategy,
        num_rounds=manifest.round_,
        num_parameters=manifest.num_parameters,
        intended_use=manifest.intended_use,
        modalities=manifest.modalities,
        study=manifest.study,
        weights_digest=manifest.weights_digest,
        manifest_digest=digest(manifest),
        coordinator=coordinator,
        validation=manifest.validation,
        sites=manifest.sites,
        privacy=manifest.privacy,
        is_private=plan.privacy is not None,
    )


def study_card(study: Study) -> StudyCard:
    """Return what was looked at, and whose it is."""
    identity, shown = study.identity, study.shown
    num_slices, rows, columns = shown.data.shape
    z, y, x = (round(step, 4) for step in shown.spacing_mm)
    is_film = num_slices == 1 and not (study.slices and study.slices[0].position)
    return StudyCard(
        kind=study.kind,  # type: ignore[arg-type]
        modality=shown.modality,
        patient_name=identity.name,
        patient_id=identity.number,
        birth_date=identity.birth_date,
        sex=identity.sex,
        study_date=identity.study_date,
        num_slices=num_slices,
        rows=rows,
        columns=columns,
        spacing_mm=None if study.kind == "picture" else (z, y, x),
        edges=None if is_film else directions(shown.affine),
    )


def cautions(asked: Asked, result: Result, *, has_dicom: bool) -> tuple[str, ...]:
    """Return what a doctor must know of this very answer and this release, in plain sentences."""
    return (*_of_answer(asked, result, has_dicom=has_dicom), *_of_release(asked.released))


def _of_answer(asked: Asked, result: Result, *, has_dicom: bool) -> Iterator[str]:
    shown = asked.study.shown
    share = float(infer.seen(asked.prepared.data.shape, asked.prepared.affine, shown).mean())
    if share < WHOLE:
        yield (
            f"The model saw {100 * share:.0f} % of the image: its own preparation cuts the rest "
            "away. It says nothing about what lies outside."
        )
    fine = min(asked.prepared.spacing_mm[1:])
    if fine > COARSER * min(shown.spacing_mm[1:]) and asked.study.kind != "picture":
        yield (
            f"The model works on pixels of {fine:.1f} mm, coarser than the image's "
            f"{min(shown.spacing_mm[1:]):.2g} mm. Small structures may be missed, and outlines are "
            "no sharper than that."
        )
    if isinstance(result.answer, Outlined):
        at_edge = [region.name for region in result.answer.regions if region.is_at_edge]
        if at_edge:
            yield f"At the edge of the image, so perhaps cut off: {', '.join(at_edge)}."
    if isinstance(result.answer, Classified):
        if result.answer.by_slice:
            yield (
                "The model looks at each slice by itself; the figures for the series are the mean "
                "over its slices. A finding in a few slices only may be lost in it."
            )
        if "ece" not in asked.released.manifest.validation.metrics:
            yield (
                "Nobody measured for this release whether its certainty matches how often it is "
                "right. Read it as a ranking, not as a probability of disease."
            )
    if asked.study.kind == "picture":
        yield "The file does not say how large a pixel is, so nothing is measured in mm or ml."
    if not has_dicom:
        yield "There is no DICOM answer beside this page: none was asked for, or none is possible."


def _of_release(released: Released) -> Iterator[str]:
    manifest = released.manifest
    tested = manifest.validation.num_patients
    if tested == 0:
        yield "The release states no validation on patients whom no hospital trained on."
    elif tested < FEW_PATIENTS:
        yield f"The model was validated on only {tested} patients; its figures are uncertain."
    if not manifest.modalities:
        yield "The release does not say which kind of images it was validated on."
    yield (
        "The release does not say how old the patients were it learnt from, their sex, or the "
        "scanners: whether this patient is like them is for the doctor to judge."
    )
    if released.plan.privacy is None:
        yield "The model was trained without differential privacy."

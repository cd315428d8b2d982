"""A result as DICOM objects that a PACS takes back: segmentation, measurements, key images.

They are of the source's patient and study, in series of their own, and name the source's instances.
None is verified or complete; each says that it is for research only. This runs at the hospital, on
the doctor's side: the patient's own identity stands in the objects, as in the source, and nowhere
else.

References:
    DICOM PS3.3 A.51 (Segmentation), A.8.1 (Secondary Capture), A.35.13 (Comprehensive 3D SR);
    PS3.16 TID 1500 (Measurement Report).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from client.display.codes import SCHEME, coded, plain
from client.display.pictures import Pixels
from client.display.prediction import ClassShare, Region
from client.display.release import Released
from client.display.study import Study, directions
from shared_models.errors import DataError

logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # it tells what headers say

MANUFACTURER = "consilia"
RESEARCH = "research use only, not for diagnosis"
SERIES_NUMBERS = {"SEG": 9101, "SR": 9102, "OT": 9103}

P = ParamSpec("P")
T = TypeVar("T")


class Origin(NamedTuple):
    """Where an object comes from: the study, the model, and when."""

    study: Study
    released: Released
    created: datetime


def quietly(make: Callable[P, T]) -> Callable[P, T]:
    """Return ``make`` so that neither a warning nor an error of its libraries quotes a header.

    Raises:
        DataError: whatever it raised, by the name of the error only.
    """

    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return make(*args, **kwargs)
        except Exception as error:
            raise DataError(
                f"the answer cannot be written as DICOM ({type(error).__name__}): the series' "
                "headers lack or break what a DICOM answer must repeat; use --no-dicom"
            ) from None

    return made


@quietly
def segmentation(
    labels: NDArray[np.uint8], regions: Sequence[Region], headers: Sequence[Any], origin: Origin
) -> Any:
    """Return the segmentation of the source's frames: a binary segment for each region found.

    Args:
        labels: uint8 (z, y, x) in the order of the study's slices; numbers of regions from 1.
        regions: all of them, in the order of their numbers; those without a voxel are left out.
        headers: the source's files, in the order of the slices.
        origin: where this comes from.
    """
    import highdicom as hd

    numbers = [number for number, region in enumerate(regions, 1) if region.num_voxels]
    renumbered = np.zeros(256, np.uint8)
    renumbered[numbers] = np.arange(1, len(numbers) + 1)
    described = []
    for place, number in enumerate(numbers, 1):
        region = regions[number - 1]
        category, type_ = coded(region.name, number=number)
        described.append(
            hd.seg.SegmentDescription(
                segment_number=place,
                segment_label=plain(region.name),
                segmented_property_category=category,
                segmented_property_type=type_,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=_algorithm(origin),
                tracking_uid=hd.UID(),
                tracking_id=plain(f"{number} {region.name}"),
                display_color=_colour(region.colour),
            )
        )
    found = hd.seg.Segmentation(
        source_images=list(headers),
        pixel_array=_in_frames(renumbered[labels], origin.study),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        content_label="SEGMENTATION",
        content_description=plain(f"AI result, {RESEARCH}"),
        **_identifiers("SEG", origin),
        manufacturer_model_name=plain(origin.released.version),
        software_versions=version("consilia"),
        device_serial_number=origin.released.manifest.weights_digest[:16],
    )
    if "FrameOfReferenceUID" not in found and "PatientOrientation" not in found:
        found.PatientOrientation = headers[0].get("PatientOrientation") or ""  # type 2C
    return _described(found, origin)


@quietly
def measured_regions(
    regions: Sequence[Region], segmented: Any, headers: Sequence[Any], origin: Origin
) -> Any:
    """Return the report (TID 1500) of the regions found: their volumes in ml, or areas in cm2."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    groups = []
    found = [(number, one) for number, one in enumerate(regions, 1) if one.num_voxels]
    for segment, (number, region) in zip(segmented.SegmentSequence, found, strict=True):
        category, type_ = coded(region.name, number=number)
        groups.append(
            hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=hd.sr.TrackingIdentifier(
                    uid=segment.TrackingUID, identifier=segment.TrackingID
                ),
                referenced_segment=hd.sr.ReferencedSegment(
                    sop_class_uid=segmented.SOPClassUID,
                    sop_instance_uid=segmented.SOPInstanceUID,
                    segment_number=int(segment.SegmentNumber),
                    source_series=hd.sr.SourceSeriesForSegmentation(headers[0].SeriesInstanceUID),
                ),
                finding_type=type_,
                finding_category=category,
                algorithm_id=_algorithm_item(origin),
                measurements=_measurements(region, codes),
            )
        )
    return _report(groups, [*headers, segmented], origin)


@quietly
def classes(shares: Sequence[ClassShare], headers: Sequence[Any], origin: Origin) -> Any:
    """Return the report (TID 1500) of how certain the model is of each class, in percent."""
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    names = origin.released.classes
    groups = []
    for share in shares:
        number = names.index(share.name) + 1
        groups.append(
            hd.sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=hd.sr.TrackingIdentifier(
                    uid=hd.UID(), identifier=plain(f"class {number} {share.name}")
                ),
                finding_type=Code(f"CLASS-{number}", SCHEME, plain(share.name)),
                algorithm_id=_algorithm_item(origin),
                measurements=[
                    hd.sr.Measurement(
                        name=codes.DCM.CertaintyOfFinding,
                        value=round(100 * share.probability, 2),
                        unit=codes.UCUM.Percent,
                    )
                ],
            )
        )
    return _report(groups, headers, origin)


@quietly
def key_image(
    pixels: Pixels, slice_: int, headers: Sequence[Any], origin: Origin, *, number: int
) -> Any:
    """Return a secondary capture of a picture of one slice, uint8 (y, x, 3)."""
    import highdicom as hd
    from pydicom.dataset import Dataset

    source = headers[slice_] if len(headers) == len(origin.study.slices) else headers[0]
    found = hd.sc.SCImage.from_ref_dataset(
        ref_dataset=source,
        pixel_array=np.ascontiguousarray(pixels),
        photometric_interpretation=hd.PhotometricInterpretationValues.RGB,
        bits_allocated=8,
        coordinate_system=hd.CoordinateSystemNames.PATIENT,
        patient_orientation=("L", "P"),  # replaced below
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        **_identifiers("OT", origin) | {"instance_number": number},
    )
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = (
        source.SOPClassUID,
        source.SOPInstanceUID,
    )
    if len(headers) != len(origin.study.slices):
        item.ReferencedFrameNumber = origin.study.slices[slice_].frame + 1
    found.SourceImageSequence = [item]
    found.PatientOrientation = _orientation(origin.study, source)
    if "Laterality" not in found:
        found.Laterality = ""  # type 2C, which highdicom leaves out
    found.BurnedInAnnotation = "NO"  # what is written into it identifies nobody
    found.ImageType = ["DERIVED", "SECONDARY"]
    found.DerivationDescription = plain(f"model {origin.released.version}; {RESEARCH}")
    return _described(found, origin)


def _orientation(study: Study, source: Any) -> Any:
    """Return where a picture's rows and columns lead to (PS3.3 C.7.6.1.1.1); empty if unknown."""
    if study.slices[0].position:
        _, right, _, bottom = directions(study.shown.affine)
        return [right, bottom]
    return source.get("PatientOrientation") or ""


def _identifiers(modality: str, origin: Origin) -> dict[str, Any]:
    import highdicom as hd

    return {
        "series_instance_uid": hd.UID(),
        "series_number": SERIES_NUMBERS[modality],
        "sop_instance_uid": hd.UID(),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
    }


def _described(dataset: Any, origin: Origin) -> Any:
    """Say in every viewer's list of series what this is."""
    dataset.SeriesDescription = plain(f"AI {origin.released.plan.name}: {RESEARCH}")
    return dataset


def _report(groups: Sequence[Any], evidence: Sequence[Any], origin: Origin) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    observer = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=_device_uid(origin),
            name=plain(origin.released.version),
            manufacturer_name=MANUFACTURER,
            model_name=plain(origin.released.plan.name),
        ),
    )
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=list(groups),
    )
    found = hd.sr.Comprehensive3DSR(
        evidence=list(evidence),
        content=content,
        is_complete=False,
        is_final=False,
        is_verified=False,
        **_identifiers("SR", origin),
    )
    found.CompletionFlagDescription = plain(RESEARCH)
    return _described(found, origin)


def _measurements(region: Region, codes: Any) -> list[Any]:
    import highdicom as hd
    from pydicom.sr.coding import Code

    found = []
    if region.volume_ml is not None:
        unit = Code("ml", "UCUM", "milliliter")
        found.append(hd.sr.Measurement(codes.SCT.Volume, region.volume_ml, unit))
    if region.area_cm2 is not None:
        unit = codes.UCUM.SquareCentimeter
        found.append(hd.sr.Measurement(codes.SCT.Area, region.area_cm2, unit))
    return found


def _algorithm(origin: Origin) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    return hd.AlgorithmIdentificationSequence(
        name=plain(origin.released.plan.name),
        family=codes.DCM.ArtificialIntelligence,
        version=origin.released.manifest.weights_digest[:12],
        source=MANUFACTURER,
    )


def _algorithm_item(origin: Origin) -> Any:
    import highdicom as hd

    return hd.sr.AlgorithmIdentification(
        name=plain(origin.released.plan.name), version=origin.released.manifest.weights_digest[:12]
    )


def _device_uid(origin: Origin) -> str:
    """Return a UID of the model: the same for the same weights (PS3.5 B.2)."""
    return f"2.25.{int(origin.released.manifest.weights_digest[:32], 16)}"


def _colour(colour: str) -> Any:
    import highdicom as hd

    return hd.color.CIELabColor.from_rgb(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))


def _in_frames(labels: NDArray[np.uint8], study: Study) -> NDArray[np.uint8]:
    """Return labels in the order of a multi-frame source's frames; single frames are in order."""
    if not study.slices[0].is_multiframe:
        return labels
    found = np.zeros_like(labels)
    found[[one.frame for one in study.slices]] = labels
    return found

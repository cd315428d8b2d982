"""Where the frames of an enhanced multi-frame image lie, and what sets them apart.

References:
    DICOM PS3.3 C.7.6.16 (Multi-frame Functional Groups), C.8.13.5.9 (MR Diffusion).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydicom import Dataset

from shared_models.reasons import Fault

Group = Callable[[str], Any]
KINDS = ("CTImage", "MRImage", "PETImage")


def describe(dataset: Any, *, num_frames: int) -> list[dict[str, Any]]:
    """Return the fields of a ``Slice`` that each frame has of its own, and its ``contrast``.

    Raises:
        Fault: the image is a part of a larger one, or its frames are not all described.
    """
    if dataset.get("ConcatenationUID") and dataset.get("InConcatenationTotalNumber") != 1:
        raise Fault("concatenation")
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    if len(frames) != num_frames:
        raise Fault("bad-frames")
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    return [_describe(_group(frame, shared)) for frame in frames]


def _group(frame: Any, shared: Any) -> Group:
    """Return how to look up a functional group: the frame's own before the shared one."""

    def group(name: str) -> Any:
        items = frame.get(name) or shared.get(name)
        return items[0] if items else Dataset()

    return group


def _describe(group: Group) -> dict[str, Any]:
    transform = group("PixelValueTransformationSequence")
    measures = group("PixelMeasuresSequence")
    slope = _number(transform.get("RescaleSlope"))
    if slope == 0:
        raise Fault("bad-rescale")
    return {
        "position": _numbers(group("PlanePositionSequence").get("ImagePositionPatient")),
        "orientation": _numbers(group("PlaneOrientationSequence").get("ImageOrientationPatient")),
        "spacing_mm": _numbers(measures.get("PixelSpacing")),
        "thickness_mm": _number(measures.get("SliceThickness")),
        "slope": 1.0 if slope is None else slope,
        "intercept": _number(transform.get("RescaleIntercept")) or 0.0,
        "echo_ms": _number(group("MREchoSequence").get("EffectiveEchoTime")),
        "tilt_degrees": _number(group("CTGeometrySequence").get("GantryDetectorTilt")),
        "contrast": _contrast(group, transform),
    }


def _contrast(group: Group, transform: Any) -> tuple[Any, ...]:
    """Return what must be the same for frames to be slices of one stack."""
    content, diffusion = group("FrameContentSequence"), group("MRDiffusionSequence")
    gradient = (diffusion.get("DiffusionGradientDirectionSequence") or [Dataset()])[0]
    return (
        content.get("StackID"),
        content.get("TemporalPositionIndex"),
        diffusion.get("DiffusionBValue"),
        str(gradient.get("DiffusionGradientOrientation")),
        str(group("CTReconstructionSequence").get("ConvolutionKernel")),
        transform.get("RescaleType"),
        *(str(group(f"{kind}FrameTypeSequence").get("FrameType")) for kind in KINDS),
    )


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value or ()))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

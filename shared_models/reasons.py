"""Why DICOM files are not one volume: a closed list of codes, and what each means to people."""

from __future__ import annotations

from typing import Literal

Reason = Literal[
    "empty",
    "not-dicom",
    "not-image",
    "unsupported-class",
    "secondary-capture",
    "localizer",
    "mosaic",
    "several-series",
    "bad-header",
    "no-pixels",
    "truncated",
    "pixel-length",
    "pixel-format",
    "not-grey",
    "bad-frames",
    "concatenation",
    "no-position",
    "bad-geometry",
    "bad-rescale",
    "inverted-units",
    "mixed-patients",
    "mixed-sizes",
    "mixed-orientations",
    "mixed-contrasts",
    "mixed-times",
    "same-position",
    "missing-slice",
    "uneven",
    "tilted",
    "off-line",
    "too-large",
    "transfer-syntax",
    "damaged",
    "stray-bits",
]

#: What each reason means and what cures it, for people. Only the code need be stored.
REASONS: dict[Reason, str] = {
    "empty": "the folder holds no images",
    "not-dicom": "a file is no DICOM, or its header cannot be read; take it out or export it again",
    "not-image": "a DICOM object that is no image (a report, a segmentation, an index)",
    "unsupported-class": "a kind of image that has no slices in the patient's space; "
    "expected CT, MR, PET or a projection film",
    "secondary-capture": "a secondary capture: a picture of a screen, not what the scanner stored",
    "localizer": "a localizer (scout), which shows where slices lie and is none of them",
    "mosaic": "an MR mosaic: many slices tiled into one picture; export it as an enhanced "
    "multi-frame image or as single slices",
    "several-series": "expected one series, got several; give each its own folder",
    "bad-header": "an attribute every image needs is absent or unreadable; export the series again",
    "no-pixels": "an image without pixel data, or cut off before it; export it again",
    "truncated": "a file ends before its pixels do; export it again",
    "pixel-length": "the pixel data is not as long as rows, columns and bits make it",
    "pixel-format": "expected whole numbers of 8, 16 or 32 allocated bits",
    "not-grey": "expected one grey slice per frame, got colours or a palette",
    "bad-frames": "the number of frames differs from what describes them",
    "concatenation": "a part of a multi-frame image that is spread over files; join it first",
    "no-position": "a slice lacks its position, orientation or pixel spacing",
    "bad-geometry": "positions, directions or spacings are impossible: expected finite numbers, "
    "two unit vectors at right angles and a spacing above zero",
    "bad-rescale": "the modality LUT or the rescale slope cannot be applied",
    "inverted-units": "MONOCHROME1 with values in physical units (CT, PET): some programs turned "
    "the values, some did not, and the file does not tell; export it as MONOCHROME2",
    "mixed-patients": "slices of different patients, studies, devices or frames of reference",
    "mixed-sizes": "slices of different size, spacing or pixel format",
    "mixed-orientations": "slices of different orientation; give each stack its own series",
    "mixed-contrasts": "several images per place: echoes, b-values, kernels, phases or stacks; "
    "split them into series",
    "mixed-times": "the slices of several acquisitions or time points lie between one another; "
    "split them into series",
    "same-position": "two slices lie at the same position; remove the duplicates, or split time "
    "points into series",
    "missing-slice": "a slice is missing; export the series again",
    "uneven": "the slices are not evenly spaced; a slice is missing or does not belong",
    "tilted": "the gantry was tilted: the stack is a sheared box; resample it on a straight grid",
    "off-line": "the slices do not lie on a line: the table or the patient moved between them",
    "too-large": "more voxels than a volume may have",
    "transfer-syntax": "pixels compressed in a way no decoder here knows; export them uncompressed",
    "damaged": "compressed pixels that cannot be decoded, or not to the end; export them again",
    "stray-bits": "bits outside those said to be stored are set (an old overlay, or a wrong "
    "BitsStored); export the series without overlays",
}


class Fault(Exception):
    """Carries a reason up to where a slice or a file is judged."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason

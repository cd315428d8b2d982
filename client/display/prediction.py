"""``prediction.json``: everything the two pages show, and the only thing they are made from.

It says whose study it is and stays in the hospital. A new kind of answer is a new model here, with
its ``kind``, and a part of each page of that name (``client/templates``).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from shared_models.contracts import (
    Contract,
    Count,
    Digest,
    Evaluation,
    NonNegative,
    PrivacyStatement,
    PublicKey,
    ReleasedSite,
    SiteName,
)

Colour = Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]
Share = Annotated[float, Field(ge=0, le=1)]


class Region(Contract):
    """What was outlined as one class; places are slices from 1. Where nothing was, counts are 0.

    ``volume_ml`` is absent where there is one slice only, ``area_cm2`` where there are several;
    both where nobody knows how large a pixel is. ``mean_value`` is in the image's own unit.
    """

    name: str
    colour: Colour
    num_voxels: Count
    share_of_image: Share
    volume_ml: NonNegative | None = None
    area_cm2: NonNegative | None = None
    first_slice: Count | None = None
    last_slice: Count | None = None
    largest_slice: Count | None = None
    voxels_by_slice: tuple[Count, ...] = ()
    extent_mm: tuple[float, float, float] | None = None
    mean_value: float | None = None
    confidence: Share | None = None
    is_at_edge: bool = False


class Outlined(Contract):
    """The answer of a task whose labels are maps: a region for each class."""

    kind: Literal["map"] = "map"
    regions: tuple[Region, ...]


class ClassShare(Contract):
    """One class and the share of its certainty that the model gives it."""

    name: str
    probability: Share


class Classified(Contract):
    """The answer of a task whose labels are classes, the greatest share first.

    ``by_slice`` holds the share of the first of ``classes`` in each slice, if the model looked at
    slices by themselves; the shares are then means over them.
    """

    kind: Literal["class"] = "class"
    classes: tuple[ClassShare, ...]
    by_slice: tuple[Share, ...] = ()


Answer = Annotated[Outlined | Classified, Field(discriminator="kind")]


class ModelCard(Contract):
    """The release: what it is, what made it, how it was tested, what protects whom."""

    name: str
    version: str
    purpose: str
    description: str
    task: str
    net: str
    strategy: str
    num_rounds: Count
    num_parameters: Count
    intended_use: str
    modalities: tuple[str, ...]
    study: Digest
    weights_digest: Digest
    manifest_digest: Digest
    coordinator: PublicKey
    validation: Evaluation
    sites: dict[SiteName, ReleasedSite]
    privacy: dict[SiteName, PrivacyStatement]
    is_private: bool


class StudyCard(Contract):
    """What was looked at, and whose it is."""

    kind: Literal["DICOM series", "NIfTI volume", "picture"]
    modality: str
    patient_name: str = ""
    patient_id: str = ""
    birth_date: str = ""
    sex: str = ""
    study_date: str = ""
    num_slices: Count
    rows: Count
    columns: Count
    spacing_mm: tuple[float, float, float] | None
    edges: tuple[str, str, str, str] | None


class Preset(Contract):
    """A window: values from ``centre`` - ``width`` / 2 to ``centre`` + ``width`` / 2 are grey."""

    name: str
    centre: float
    width: Annotated[float, Field(gt=0)]


class Sheets(Contract):
    """The slices as pictures on larger sheets, and what is painted over them.

    ``images`` and ``overlays`` are sheets (base64) of ``across`` x ``down`` tiles, row by row; a
    tile is ``tile_rows`` x ``tile_columns`` pixels, of which the first ``rows`` x ``columns``
    count. A pixel of an image is the place in ``levels`` of its value; a pixel of an overlay the
    number of its legend from 1, or 0. ``height_per_width`` is of a whole slice, in mm.
    """

    image_type: Literal["png", "jpeg"]
    images: tuple[str, ...]
    overlays: tuple[str, ...] = ()
    rows: Count
    columns: Count
    tile_rows: Count
    tile_columns: Count
    across: Count
    down: Count
    levels: Annotated[tuple[float, ...], Field(min_length=256, max_length=256)]
    unit: str
    presets: tuple[Preset, ...]
    height_per_width: Annotated[float, Field(gt=0)]
    first_shown: Count


class Legend(Contract):
    """What a number in the overlays stands for."""

    name: str
    colour: Colour


class Prediction(Contract):
    """What a released model said about one study; ``picture`` is a JPEG (base64) of a key slice."""

    schema_version: Literal[1] = 1
    created: datetime
    software: str
    model: ModelCard
    study: StudyCard
    answer: Answer
    legend: tuple[Legend, ...] = ()
    picture: str
    sheets: Sheets
    files: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

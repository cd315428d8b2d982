"""One study as it lies in a folder: which of its series a model is for, and that series' voxels.

Guarantees:
    A series is chosen only if it is the only one of the model's modality, or a person chose it.
    A folder in which a file is no DICOM is refused, for it may be a broken slice; not so where its
    name says that it is something else.
    Nothing of a header, and no file's name, is in any message.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_models import series as readers
from shared_models.errors import DataError
from shared_models.imaging.geometry import orient
from shared_models.series import Series, Slice
from shared_models.slices import PROJECTIONS, QUANTITATIVE
from shared_models.volume import NIFTI, PICTURES, Volume, read_volume

#: Films and plain pictures, which a model cannot tell apart by anything but a header.
FILMS = ("CR", "DX", "OT")
#: Endings of what exports put beside images: viewers, licences, notes, tables, pictures of pages.
BESIDE = tuple(
    f".{ending}"
    for ending in (
        *("bat", "bmp", "cmd", "css", "csv", "db", "dll", "ds_store", "exe", "gif", "htm", "html"),
        *("ico", "inf", "ini", "jar", "jpeg", "jpg", "js", "json", "md", "pdf", "png", "sh", "svg"),
        *("tif", "tiff", "tsv", "txt", "xml", "xsl", "zip"),
    )
)
#: What a doctor must see of whose study it is; for the doctor's page only.
IDENTITY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate")


class Identity(NamedTuple):
    """Whose study it is, as the hospital wrote it; empty where nobody did."""

    name: str = ""
    number: str = ""
    birth_date: str = ""
    sex: str = ""
    study_date: str = ""


class Study(NamedTuple):
    """What a model is given, and what its answer is shown on.

    Attributes:
        volume: as it was read; the plan's steps begin with it.
        shown: the voxels of the answer. Of a DICOM series they are its own, else turned to LPS.
        slices: of a DICOM series, in the volume's order; none otherwise.
        identity: whose it is.
        is_picture: whether it is a picture file, whose pixels have neither a size nor a unit.
    """

    volume: Volume
    shown: Volume
    slices: tuple[Slice, ...]
    identity: Identity
    is_picture: bool = False

    @property
    def kind(self) -> str:
        """What the study was read from."""
        if self.slices:
            return "DICOM series"
        return "picture" if self.is_picture else "NIfTI volume"


def open_study(
    path: Path, *, modalities: Collection[str], number: int | None = None, stated: str | None = None
) -> Study:
    """Read the series in ``path`` that is of one of ``modalities``.

    Args:
        path: a folder of DICOM files at any depth, one DICOM file, a NIfTI file or a picture.
        modalities: those the model was made for.
        number: which series, where several fit; as the refusal numbers them, from 1.
        stated: the modality of a NIfTI file or a picture, which do not say it.

    Raises:
        DataError: if there is none or more than one, it is of another modality, or it cannot be
            read; without any identifier.
    """
    if not path.exists():
        raise DataError("there is no such study; name a folder of DICOM files, or one file")
    if path.is_file() and path.name.lower().endswith((*NIFTI, *PICTURES)):
        is_picture = path.name.lower().endswith(PICTURES)
        if is_picture and stated in QUANTITATIVE:
            raise DataError(
                f"a picture's greys are no {stated} values; give the DICOM series it was made from"
            )
        return _plain(read_volume(path), modalities, stated, is_picture=is_picture)
    files = _files(path) if path.is_dir() else [path]
    chosen = _chosen(readers.scan(files), modalities, number)
    volume = readers.read(chosen)
    slices = readers.ordered(chosen)
    return Study(volume, volume, slices, _identity(slices[0].file))


def headers(study: Study) -> list[Any]:
    """Return the data sets of a DICOM series' files, each once, in the order of the slices.

    Raises:
        DataError: if they cannot be read whole.
    """
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote header values
            files = dict.fromkeys(one.file for one in study.slices)
            return [_with_shared(pydicom.dcmread(file)) for file in files]
    except Exception as error:
        raise DataError(f"cannot read the series' headers again ({type(error).__name__})") from None


def directions(affine: NDArray[np.float64]) -> tuple[str, str, str, str]:
    """Return the letters at a slice's left, right, top and bottom edge: L, R, A, P, H or F."""
    across, down = (_letters(affine[:3, axis]) for axis in (0, 1))
    return across[1], across[0], down[1], down[0]


def _with_shared(header: Any) -> Any:
    """Put what all frames of an enhanced image repeat where highdicom looks for it.

    Pixel measures and orientation are the same in every frame of a series that was read.
    """
    shared = header.get("SharedFunctionalGroupsSequence")
    frames = header.get("PerFrameFunctionalGroupsSequence")
    for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if shared and frames and keyword not in shared[0] and keyword in frames[0]:
            setattr(shared[0], keyword, frames[0][keyword].value)
    return header


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder at any depth that are, or may once have been, DICOM."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in found if not file.name.lower().endswith(BESIDE)]


def _plain(
    volume: Volume, modalities: Collection[str], stated: str | None, *, is_picture: bool
) -> Study:
    if stated is not None:
        volume = volume._replace(modality=stated)
    if not _fits(volume.modality, modalities):
        raise DataError(
            f"the image counts as {volume.modality}, the model reads {_listed(modalities)}; if the "
            "file is of that modality, which it does not say itself, state it with --modality"
        )
    shown = volume if is_picture else orient()(volume)[0]
    return Study(volume, shown, (), Identity(), is_picture)


def _chosen(found: Sequence[Series], modalities: Collection[str], number: int | None) -> Series:
    if any(one.aside == "not-dicom" for one in found):
        raise DataError(
            "a file in the study is no DICOM file, and may be a broken slice; take out what does "
            "not belong there, or export the study again"
        )
    images = [one for one in found if one.aside is None]
    fitting = [one for one in images if _fits(one.slices[0].modality, modalities)]
    good = [one for one in fitting if readers.verdict(one).is_ok]
    if not good:
        raise DataError(
            [
                f"no series of the study can be used: the model reads {_listed(modalities)}",
                *_why_not(images, fitting),
            ]
        )
    if number is not None:
        if not 1 <= number <= len(good):
            raise DataError(f"expected --series from 1 to {len(good)}, got {number}")
        return good[number - 1]
    if len(good) > 1:
        raise DataError(
            [
                f"{len(good)} series of the study could be meant; choose one with --series",
                *(f"--series {place}: {_described(one)}" for place, one in enumerate(good, 1)),
            ]
        )
    return good[0]


def _why_not(images: Sequence[Series], fitting: Sequence[Series]) -> list[str]:
    others = Counter(one.slices[0].modality for one in images if one not in fitting)
    refused = Counter(readers.verdict(one).sentence for one in fitting)
    return [
        *(f"{count} series of modality {_safe(name)}" for name, count in sorted(others.items())),
        *(f"{count} refused: {sentence}" for sentence, count in sorted(refused.items())),
    ]


def _described(one: Series) -> str:
    slices = readers.ordered(one)
    layout = slices[0].layout
    size = "" if layout is None else f" of {layout.rows} x {layout.columns}"
    thick = slices[0].thickness_mm
    return (
        f"{_safe(slices[0].modality)}, {len(slices)} slices{size}"
        f"{'' if thick is None else f', {thick:g} mm thick'}"
    )


def _fits(modality: str, modalities: Collection[str]) -> bool:
    is_film = modality in FILMS and any(one in FILMS for one in modalities)
    return modality in modalities or is_film


def _listed(modalities: Collection[str]) -> str:
    return " or ".join(sorted(modalities))


def _safe(modality: str) -> str:
    """Return a modality if it is one; a header's field may hold anything."""
    known = modality in (*PROJECTIONS, "CT", "MR", "PT", "NM", "US", "XA", "RF", "OT")
    return modality if known else "another"


def _identity(file: Path) -> Identity:
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(
                file, specific_tags=[*IDENTITY, "SpecificCharacterSet"], stop_before_pixels=True
            )
            return Identity(*(_clean(str(header.get(name) or "")) for name in IDENTITY))
    except Exception:  # a header pydicom stumbles over in what decides nothing
        return Identity()


def _clean(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).replace("^", " ").split())


def _letters(direction: NDArray[np.float64]) -> tuple[str, str]:
    """Return where a direction in LPS leads to, and where it comes from."""
    axis = int(np.abs(direction).argmax())
    forward, backward = (("L", "R"), ("P", "A"), ("H", "F"))[axis]
    return (forward, backward) if direction[axis] > 0 else (backward, forward)

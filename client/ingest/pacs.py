"""What is asked of a PACS, and how it is reached: the ``[pacs]`` table of ``site.toml``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared_models.contracts import Contract

AeTitle = Annotated[str, Field(pattern=r"^[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Modality = Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")]
Uid = Annotated[str, Field(pattern=r"^[0-9.]{1,64}$")]


class WebPacs(Contract):
    """A DICOMweb service: QIDO-RS and WADO-RS under one address.

    ``token`` names a file that holds a bearer token; ``user`` and ``password`` (a file) are for
    basic authentication. ``authority`` is a certificate file where it is the hospital's own.
    """

    address: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")]
    token: Path | None = None
    user: str = ""
    password: Path | None = None
    authority: Path | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @model_validator(mode="after")
    def _check_one_way_in(self) -> Self:
        if self.token is not None and self.user:
            raise ValueError("expected a token or a user, got both")
        if bool(self.user) is not (self.password is not None):
            raise ValueError("expected user and password (a file) together")
        return self


class DimsePacs(Contract):
    """A PACS that speaks DIMSE: its AE title and where it listens."""

    title: AeTitle
    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Port
    retrieve: Literal["move", "get"] = "move"


class Station(Contract):
    """This site as a DICOM node: what the PACS is told to send to, and who may send.

    ``senders`` are the AE titles that are accepted. ``reserve_mb`` stay free on the disk.
    """

    title: AeTitle = "CONSILIA"
    bind: str = "0.0.0.0"
    port: Port = 11112
    senders: tuple[AeTitle, ...] = ()
    reserve_mb: Annotated[int, Field(ge=0)] = 5000


class PacsSettings(Contract):
    """How the site gets its images: by DICOMweb, by DIMSE, or by both."""

    web: WebPacs | None = None
    dimse: DimsePacs | None = None
    station: Station = Station()


class Query(Contract):
    """Which series are asked for; what is empty asks for everything."""

    modalities: tuple[Modality, ...] = ()
    since: date | None = None
    until: date | None = None
    studies: tuple[Uid, ...] = ()

    @model_validator(mode="after")
    def _check_the_dates(self) -> Self:
        if self.since and self.until and self.since > self.until:
            raise ValueError("expected since before until")
        return self

    @property
    def dates(self) -> str:
        """Return the study dates as DICOM writes a range; empty if there is none."""
        if self.since is None and self.until is None:
            return ""
        return "-".join("" if day is None else f"{day:%Y%m%d}" for day in (self.since, self.until))

    def parts(self) -> Iterator[dict[str, str]]:
        """Yield the keys of each query there is to make: one for each modality and study."""
        for modality in self.modalities or ("",):
            for study in self.studies or ("",):
                keys = {"StudyDate": self.dates, "Modality": modality, "StudyInstanceUID": study}
                yield {key: value for key, value in keys.items() if value}


class Series(Contract):
    """A series that a PACS holds; ``num_instances`` is None where it does not say."""

    study: Uid
    series: Uid
    num_instances: Annotated[int, Field(ge=0)] | None = None

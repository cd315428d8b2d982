"""What a site decides about de-identification: the ``[ingest.terms]`` table of ``site.toml``."""

from __future__ import annotations

from typing import Literal

from shared_models.contracts import Contract


class Clearance(Contract):
    """Images whose pixels the site has looked at: all that is given must match, exactly."""

    modality: str
    manufacturer: str
    model: str
    rows: int
    columns: int


class Terms(Contract):
    """What a site decided about de-identification: the Basic Profile, and options of E.3.

    Attributes:
        dates: "remove" (Basic Profile), or "shift" by a number of days that is the patient's own
            and the same in all their files (E.3.6, modified dates).
        keep_times: Keep the time of day; with shifted dates only. PET needs it for decay.
        retain_device: Keep serial numbers, station names and software versions (E.3.8).
        retain_patient: Keep sex, age (90 for all above 89), size, weight (E.3.7).
        cleared: Images that may pass although their pixels look as if they held text.
    """

    dates: Literal["remove", "shift"] = "shift"
    keep_times: bool = False
    retain_device: bool = False
    retain_patient: bool = False
    cleared: tuple[Clearance, ...] = ()

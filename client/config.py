"""``site.toml``: one hospital's own settings, secret and its alone.

Relative paths are relative to the file's folder. Privacy and policy settings stand apart from
performance settings: changing the latter never changes the ledger.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, ValidationError, model_validator

from client.ingest.pacs import PacsSettings, Query, WebPacs
from client.ingest.terms import Terms
from shared_models.contracts import (
    Address,
    Contract,
    MetricName,
    Name,
    NonNegative,
    Positive,
    Probability,
    PublicKey,
    SiteName,
)
from shared_models.errors import DocumentError
from shared_models.plan import Purpose, read_text, sentences


class LinkSettings(Contract):
    """How the site reaches the coordinator: outbound only, TLS, at most two connections.

    ``address`` is its SuperLink's, where weights travel, by the ``node_key``. ``control`` is its
    control plane's, by the ``certificate``: one file with the site's certificate and its key, so
    that a renewal changes both in one step. Sites that never joined have neither. It is visited
    every ``visit_every_s`` seconds.
    """

    address: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")]
    root_certificates: Path
    node_key: Path
    control: Address | None = None
    certificate: Path | None = None
    visit_every_s: Annotated[float, Field(ge=1, le=3600)] = 20.0

    @model_validator(mode="after")
    def _check_that_control_has_its_certificate(self) -> Self:
        if (self.control is None) is not (self.certificate is None):
            raise ValueError("expected control and certificate together, or neither")
        return self


class DataSettings(Contract):
    """Where the images are. The coordinator never learns these paths.

    ``classes`` says what the labels' numbers mean here, in their order: from 0 where a label is a
    class, from 1 where it is a map, whose 0 is the background. Who labels with words needs none.
    ``mapping`` is what labels here are called in plans, signed (``mapping.py``).
    """

    manifest: Path
    root: Path
    classes: tuple[str, ...] = ()
    mapping: Path = Path("labels.json")


_DAY = "(mon|tue|wed|thu|fri|sat|sun)"
_TIME = r"([01]\d|2[0-3]):[0-5]\d"
#: One stretch of quiet: days of the week, if not all of them, and from when to when.
QuietHours = Annotated[
    str,
    Field(pattern=rf"^({_DAY}(-{_DAY})?(,{_DAY}(-{_DAY})?)* )?{_TIME}-({_TIME}|24:00)$"),
]


class PolicySettings(Contract):
    """What this hospital allows. Anything not allowed here is refused.

    ``min_cell``: where a fingerprint has no noise, fewer patients than that are not told of.
    ``peers`` names the file of the hospitals it trusts for secure aggregation (``peers.py``).
    ``quiet_hours`` are when nothing is trained, by the clocks of ``time_zone`` (an IANA name) or
    else of this machine: ``"07:00-19:00"``, ``"mon-fri 07:00-19:00"``, ``"sat,sun 00:00-24:00"``. A
    stretch that ends before it begins ends on the next day.
    """

    coordinators: tuple[PublicKey, ...]
    purposes: tuple[Purpose, ...]
    tasks: tuple[Name, ...]
    nets: tuple[Name, ...]
    max_rounds: Annotated[int, Field(ge=1)]
    min_patients: Annotated[int, Field(ge=2)] = 10
    min_test_patients: Annotated[int, Field(ge=1)] = 5
    max_epsilon_per_study: Positive
    max_epsilon_lifetime: Positive
    max_delta: Probability
    max_update_mb: Positive = 200.0
    metrics: tuple[MetricName, ...]
    allow_without_privacy: bool = False
    allow_fingerprint: bool = False
    min_cell: Annotated[int, Field(ge=3)] = 5
    plugins: tuple[str, ...] = ()
    peers: Path = Path("peers.toml")
    quiet_hours: tuple[QuietHours, ...] = ()
    time_zone: str = ""

    @model_validator(mode="after")
    def _check_that_the_hours_can_be_told(self) -> Self:
        if any(hours[-11:-6] == hours[-5:] for hours in self.quiet_hours):
            raise ValueError("expected quiet_hours that end at another time than they begin")
        if self.time_zone and not _is_time_zone(self.time_zone):
            raise ValueError(
                "expected a time_zone known to this machine, such as Europe/Berlin; leave it empty "
                "to go by the machine's own clock"
            )
        return self


class PerformanceSettings(Contract):
    """Speed only. ``device``: auto uses CUDA where there is one. ``autocast``: bfloat16 on CUDA.

    ``engine``: how private gradients are made, in one backward pass or Opacus's way.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    autocast: bool = False
    most_images: Annotated[int, Field(ge=1)] = 32
    threads: Annotated[int, Field(ge=1)] = 1
    engine: Literal["bookkeeping", "opacus"] = "bookkeeping"


class LimitSettings(Contract):
    """What the process that trains may take, and read, before it is ended.

    ``max_minutes_per_round`` bounds a round of training or an evaluation, and training alone once
    for each of its rounds; no order is worked on after it expired. ``max_memory_gb`` is of main
    memory; 0 is three quarters of the machine's. ``readable`` are files and folders outside
    ``data.root`` that images lie in or links lead to.
    """

    max_minutes_per_round: Positive = 120.0
    max_memory_gb: NonNegative = 0.0
    readable: tuple[Path, ...] = ()


class IngestSettings(Contract):
    """How images come to the site's own store, de-identified (``client.ingest``).

    ``folder`` holds the store, which the worker reads, and beside it what it must not: the key of
    the pseudonyms, their register and the catalogue. ``labels`` says what the manifest's labels
    are: ``words`` from a table, or ``maps`` beside the images. ``modalities`` are those trained on;
    none means all. ``query`` narrows what a PACS is asked for. In watch mode a source is looked at
    every ``poll_s``, and a series is judged once nothing came of it for ``settle_s``.
    """

    folder: Path = Path("ingest")
    labels: Literal["words", "maps"] = "words"
    modalities: tuple[Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")], ...] = ()
    poll_s: Positive = 10.0
    settle_s: NonNegative = 60.0
    terms: Terms = Terms()
    query: Query = Query()

    @property
    def store(self) -> Path:
        """The images a worker may read, and the manifest that lists them."""
        return self.folder / "store"

    @property
    def manifest(self) -> Path:
        """The list of what may be trained on."""
        return self.store / "manifest.csv"

    @property
    def private(self) -> Path:
        """What a worker must not read."""
        return self.folder / "private"


class CacheSettings(Contract):
    """Prepared images, so that each is prepared once; ``most_gb`` 0 keeps none."""

    folder: Path = Path("cache")
    most_gb: NonNegative = 20.0


class SiteConfig(Contract):
    """Everything a site agent needs to know."""

    schema_version: Literal[1] = 1
    name: SiteName
    state_dir: Path
    signing_key: Path
    coordinator: PublicKey
    link: LinkSettings
    data: DataSettings
    policy: PolicySettings
    performance: PerformanceSettings = PerformanceSettings()
    limits: LimitSettings = LimitSettings()
    ingest: IngestSettings = IngestSettings()
    pacs: PacsSettings = PacsSettings()
    cache: CacheSettings = CacheSettings()


def read(file: Path) -> SiteConfig:
    """Read ``site.toml``.

    Raises:
        DocumentError: with every objection at once; it never repeats a value.
    """
    try:
        config = parse(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise DocumentError(f"{file} is not TOML: {error}") from error
    return _absolute(config, file.resolve().parent)


def parse(text: str) -> SiteConfig:
    """Read the text of a ``site.toml``; its relative paths stay relative.

    Raises:
        tomllib.TOMLDecodeError: if it is not TOML.
        DocumentError: with every objection at once; it never repeats a value.
    """
    try:
        return SiteConfig.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise DocumentError(sentences(error, model=SiteConfig)) from error


def _is_time_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (KeyError, OSError, ValueError):  # no such zone, a folder of zones, no name at all
        return False
    return True


def _absolute(config: SiteConfig, base: Path) -> SiteConfig:
    link, data, limits = config.link, config.data, config.limits
    return config.model_copy(
        update={
            "state_dir": base / config.state_dir,
            "signing_key": base / config.signing_key,
            "link": link.model_copy(
                update={
                    "root_certificates": base / link.root_certificates,
                    "node_key": base / link.node_key,
                    "certificate": link.certificate and base / link.certificate,
                }
            ),
            "policy": config.policy.model_copy(update={"peers": base / config.policy.peers}),
            "data": data.model_copy(
                update={
                    "manifest": base / data.manifest,
                    "root": base / data.root,
                    "mapping": base / data.mapping,
                }
            ),
            "limits": limits.model_copy(
                update={"readable": tuple(base / path for path in limits.readable)}
            ),
            "ingest": config.ingest.model_copy(update={"folder": base / config.ingest.folder}),
            "cache": config.cache.model_copy(update={"folder": base / config.cache.folder}),
            "pacs": config.pacs.model_copy(update={"web": _absolute_web(config.pacs.web, base)}),
        }
    )


def _absolute_web(web: WebPacs | None, base: Path) -> WebPacs | None:
    if web is None:
        return None
    files = {name: getattr(web, name) for name in ("token", "password", "authority")}
    return web.model_copy(update={name: file and base / file for name, file in files.items()})

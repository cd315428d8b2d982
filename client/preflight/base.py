"""What a check is: a function from a case to findings; and how all of them are run.

Guarantees:
    Every check runs, whatever the others find or break on.
    A check that breaks is a finding, of which only the kind of error is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from client.config import SiteConfig
from shared_models.plan import StudyPlan

if TYPE_CHECKING:
    from client.control import Probe
    from client.preflight.dry import Dry
    from client.preflight.line import Line
    from shared_models.cohort import Row

Owner = Literal["network", "server", "data", "this machine", "settings"]
Depth = Literal["quick", "sample", "all"]

MIB = 2**20


class Finding(NamedTuple):
    """What a check found.

    ``ok``: None is neither: not tried, not known, or worth a look. ``owner`` is who can put right
    what is not, by the ``cure``. ``figures`` are for machines. None of it is a patient's: counts
    and sizes, never a label's text, a name or a path of the data.
    """

    what: str
    ok: bool | None
    said: str
    owner: Owner
    cure: str = ""
    figures: Mapping[str, float] = {}


#: Measures the control plane with so many bytes up and down.
Measure = Callable[[int, int], "Probe"]
#: Told what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


class Case:
    """A site to be checked, and what checks found out for those that come after them.

    Args:
        config: the site's settings.
        plan: the study to check against; without one, what needs a plan is left out.
        depth: how many images are opened (``data.SAMPLES``); ``quick`` also leaves out the dry
            batch and the sustained bandwidth.
        measure: measures the control plane; by default by ``client.control``.
        progress: told of what takes long.
    """

    def __init__(
        self,
        config: SiteConfig,
        *,
        plan: StudyPlan | None = None,
        depth: Depth = "sample",
        measure: Measure | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.depth = depth
        self.measure = measure
        self.progress = progress
        self.rows: Sequence[Row] = ()
        self.image_size: tuple[int, ...] | None = None
        self.images_per_row = 1
        self.dry: Dry | None = None
        self.line: Line | None = None
        self.skew_s: float | None = None

    @property
    def secrets(self) -> dict[str, Path]:
        """The files that only their owner may read, by what they are called to people."""
        link = self.config.link
        found = {"signing key": self.config.signing_key, "node key": link.node_key}
        return found if link.certificate is None else {**found, "certificate": link.certificate}


Check = Callable[[Case], Iterator[Finding]]


def run(case: Case, checks: Sequence[Check]) -> Iterator[Finding]:
    """Yield what every one of ``checks`` finds, in their order."""
    for check in checks:
        what = check.__name__.replace("_", " ")
        try:
            yield from check(case)
        except Exception as error:  # its text may quote a file, a name or a label
            yield Finding(
                what,
                False,
                f"the check could not be made ({type(error).__name__})",
                "this machine",
                "put right what else was found and try again; if it stays, tell the platform's "
                "developers this line",
            )


def size(num_bytes: float) -> str:
    """Return a number of bytes for people."""
    if num_bytes >= 1024 * MIB:
        return f"{num_bytes / (1024 * MIB):.1f} GB"
    return f"{num_bytes / MIB:.1f} MB" if num_bytes >= MIB / 10 else f"{num_bytes / 1024:.0f} KB"


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def several(number: int, word: str) -> str:
    """Return ``1 image`` or ``3 images``."""
    return f"{number} {word}{'' if number == 1 else 's'}"

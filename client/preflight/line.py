"""How fast the way to the coordinator is, and how long a round of the plan will take over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from client.preflight.base import MIB, Case, Finding, Measure, Owner, duration, size
from client.preflight.network import clock_finding
from shared_models.errors import ConsiliaError, SignatureError

if TYPE_CHECKING:
    from client.control import Probe

FIRST_BYTES = MIB // 4
MOST_BYTES = 256 * MIB
EACH_WAY_S = 5.0  # sustained: longer than what buffers on the way can hide


class Line(NamedTuple):
    """Bytes a second, up and down, and the time of the shortest exchange."""

    up: float
    down: float
    round_trip_s: float


def control_plane(case: Case) -> Iterator[Finding]:
    """Yield whether the control plane answers, and how fast the way there is, each way."""
    what, measure = "control plane", case.measure or _measured_by(case)
    if case.config.link.control is None and case.measure is None:
        said = "none in site.toml; round trip and bandwidth are not measured"
        cure = "ask the coordinator for an invite, then: consilia-site join"
        yield Finding(what, None, said, "settings", cure)
        return
    try:
        first = measure(FIRST_BYTES, FIRST_BYTES)
    except ConsiliaError as error:
        owner: Owner = "server" if isinstance(error, SignatureError) else "network"
        said, _, cure = str(error).partition("; ")
        cure = cure or "see what was found of name, port and TLS; the same holds for link.control"
        yield Finding(what, False, said, owner, cure)
        return
    said = f"answers; a round trip takes {duration(first.round_trip_s)}"
    figures = {"round_trip_s": round(first.round_trip_s, 4)}
    yield Finding(what, True, said, "network", figures=figures)
    if case.skew_s is None:
        case.skew_s = first.clock_skew_s
        yield clock_finding(first.clock_skew_s, first.round_trip_s)
    yield _bandwidth(case, measure, _line(first, FIRST_BYTES, FIRST_BYTES))


def time_per_round(case: Case) -> Iterator[Finding]:
    """Yield how long a round of the plan is going to take here, and whether that is in time."""
    if case.plan is None:
        return
    what, dry, line = "time per round", case.dry, case.line
    if dry is None or dry.step_s is None or line is None:
        lacks = [
            text
            for text, is_there in (
                ("a dry batch", dry is not None and dry.step_s is not None),
                ("the bandwidth", line is not None),
            )
            if not is_there
        ]
        said = f"cannot be predicted without {' and '.join(lacks)}"
        yield Finding(what, None, said, "this machine")
        return
    steps = case.plan.training.steps_per_round
    down, up = dry.weights_bytes / line.down, dry.update_bytes / line.up
    training = steps * (dry.step_s or 0.0) + dry.evaluation_s
    total = down + up + training + 4 * line.round_trip_s
    said = (
        f"about {duration(total)}: {duration(down)} down, {duration(training)} of training, "
        f"{duration(up)} up"
    )
    figures = {
        "minutes": round(total / 60, 3),
        "down_s": round(down, 2),
        "training_s": round(training, 2),
        "up_s": round(up, 2),
    }
    deadline_s = case.plan.rounds.deadline_s
    if total <= deadline_s:
        yield Finding(what, True, said, "network", figures=figures)
        return
    is_slow_line = down + up > training
    cure = (
        "a faster line for this machine"
        if is_slow_line
        else "a GPU, or more threads in [performance]"
    )
    yield Finding(
        what,
        False,
        f"{said}; the plan waits {duration(deadline_s)}",
        "network" if is_slow_line else "this machine",
        f"{cure}; or ask for a plan with a longer deadline_s",
        figures,
    )


def _bandwidth(case: Case, measure: Measure, line: Line) -> Finding:
    """Measure again with as much as the model has, or as can be sent in some seconds."""
    if case.depth != "quick":
        most = MOST_BYTES if case.dry is None else min(case.dry.update_bytes, MOST_BYTES)
        up, down = (
            max(FIRST_BYTES, min(int(rate * EACH_WAY_S), most)) for rate in (line.up, line.down)
        )
        case.progress("measuring the bandwidth", 0, 0)
        line = _line(measure(up, down), up, down)
    case.line = line
    mbit = [8 * rate / 1e6 for rate in (line.up, line.down)]
    said = f"{mbit[0]:.1f} Mbit/s up, {mbit[1]:.1f} Mbit/s down"
    if case.dry is not None:
        said += f"; an update is {size(case.dry.update_bytes)}"
    figures = {"mbit_up": round(mbit[0], 2), "mbit_down": round(mbit[1], 2)}
    return Finding("bandwidth", True, said, "network", figures=figures)


def _line(found: Probe, up_bytes: int, down_bytes: int) -> Line:
    return Line(
        up_bytes / max(found.seconds_up, 1e-6),
        down_bytes / max(found.seconds_down, 1e-6),
        found.round_trip_s,
    )


def _measured_by(case: Case) -> Measure:
    def measure(up_bytes: int, down_bytes: int) -> Probe:
        from client import control

        with control.connect(case.config) as link:
            return control.probe(link, up_bytes=up_bytes, down_bytes=down_bytes, budget_s=60.0)

    return measure

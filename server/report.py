"""The study report: ``report.json`` first, the page and the terminal's last lines from it alone.

Guarantees:
    The page is one file that fetches nothing.
    The page depends on nothing but the report: the same report gives the same bytes.
    Text in the report is never markup on the page.
    An epsilon never stands without its unit, its delta and its accountant.

Design: the drawings are inline SVG filled in by the template from places computed in ``charts.py``,
not pictures from a plotting library: the text stays text, the file stays small, and the same
autoescaping that guards the prose guards the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError
from rich import box
from rich.table import Table
from rich.text import Text

from server import charts, findings, measures
from server.charts import Chart, Series
from shared_models import files
from shared_models.contracts import SiteResult, StudyReport
from shared_models.errors import DocumentError

TEMPLATES = Path(__file__).parent / "templates"
JSON_NAME = "report.json"
HTML_NAME = "report.html"
VALIDATION_LABEL = "held-out set"
PARTS = ("#0072B2", "#A9CBE0")


def render(report: StudyReport) -> str:
    """Return the page: one HTML file that needs nothing beside it."""
    compared = findings.gains(report)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            gains=compared,
            gain_sentences=findings.gain_sentences(compared),
            dots=_dots(compared, report.headline),
            weakest=findings.largest_epsilon(report),
            privacy_sentence=findings.privacy_sentence(report),
            statements=findings.statements_by_text(report),
            contradictions=findings.contradictions(report),
            absences=findings.absences(report),
            metrics=findings.metric_names(report),
            curves=_curves(report),
            loss=_loss(report),
            costs=_costs(report),
            pictures=[
                (one.caption, findings.png(one.png_base64)) for one in report.global_.pictures
            ],
        )
    )


def table(report: StudyReport) -> Table:
    """Return the terminal's last lines: a row per hospital, then the coordinator's held-out set."""
    unit = measures.measure(report.headline).unit
    lines = Table(
        title=_clean(report.name),
        caption=_caption(report),
        box=box.ASCII2,
        padding=(0, 0),
        show_edge=False,
    )
    lines.add_column("hospital", overflow="fold", min_width=8)
    lines.add_column("patients", justify="right", no_wrap=True)
    headline = f"{report.headline}{', ' if unit else ''}{unit} (95 %)"
    lines.add_column(headline, justify="right", overflow="fold", min_width=20)
    lines.add_column("alone", justify="right", no_wrap=True)
    lines.add_column("difference", justify="right", no_wrap=True)
    lines.add_column("epsilon per\npatient\n(delta)", justify="right", no_wrap=True)
    for gain in findings.gains(report):
        lines.add_row(*_row(gain, report.headline))
    lines.add_section()
    world = report.global_
    others = [(name, each.metrics, each.intervals) for name, each in world.baselines.items()]
    for name, found, intervals in [("held-out set", world.metrics, world.intervals), *others]:
        lines.add_row(
            name,
            str(world.num_patients),
            _with_interval(report.headline, found, intervals),
            *"--",
            "-",
        )
    return lines


def write(report: StudyReport, folder: Path) -> Path:
    """Write ``report.json`` and ``report.html`` into ``folder``; return the page's path.

    Each file is complete or absent. The JSON comes first, and the page can be made again from it.
    """
    document = report.model_dump_json(by_alias=True, indent=2) + "\n"
    files.replace(folder / JSON_NAME, document.encode())
    files.replace(folder / HTML_NAME, render(report).encode())
    return folder / HTML_NAME


def read(file: Path) -> StudyReport:
    """Read a ``report.json``.

    Raises:
        DocumentError: if the file cannot be read or is not a study report; the message is one
            sentence and repeats no content.
    """
    try:
        return StudyReport.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DocumentError(f"cannot read {file}: {error.strerror}") from error
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        where = ".".join(str(part) for part in problems[0]["loc"]) or "the document"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        sentence = f"{file} is not a study report: {where}: {problems[0]['msg']}{more}"
        raise DocumentError(sentence) from None


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": measures.count,
        "duration": measures.duration,
        "plain": measures.plain,
        "size": measures.size,
        "upward": measures.upward,
    }
    environment.globals |= {
        "DASH": measures.DASH,
        "figure": measures.figure,
        "interval": measures.interval,
        "measure": measures.measure,
        "signed": measures.signed,
    }
    return environment


def _dots(compared: tuple[findings.Gain, ...], name: str) -> dict[str, object]:
    """Place every hospital's two values with their intervals on one common track."""
    bounds = [
        bound
        for gain in compared
        for value, interval in _values(gain, name)
        if value is not None
        for bound in (value, *(interval or ()))
    ]
    if not bounds:
        return {"ticks": (), "rows": ()}
    across, ticks = charts.track(bounds)
    rows = [
        (
            gain,
            *(
                None if value is None else charts.whisker(value, interval, across)
                for value, interval in _values(gain, name)
            ),
        )
        for gain in compared
    ]
    return {"ticks": ticks, "rows": rows}


def _values(
    gain: findings.Gain, name: str
) -> tuple[tuple[float | None, tuple[float, float] | None], ...]:
    site = gain.site
    return (
        (gain.together, site.intervals.get(name)),
        (gain.alone, site.alone_intervals.get(name)),
    )


def _curves(report: StudyReport) -> list[Chart]:
    """Draw each metric that was followed over the rounds, the headline first."""
    drawn = []
    for name in findings.metric_names(report):
        world = {p.round_: p.validation[name] for p in report.rounds if name in p.validation}
        points = {
            site.name: {
                p.round_: p.sites[site.name][name]
                for p in report.rounds
                if name in p.sites.get(site.name, {})
            }
            for site in report.sites
        }
        series = [
            Series(VALIDATION_LABEL, world, charts.INK, is_bold=True),
            *_site_series(points),
        ]
        known = measures.measure(name)
        title = f"{known.label} per round" + (f", {known.unit}" if known.unit else "")
        if any(one.points for one in series):
            drawn.append(charts.curves(series, title=title))
    return drawn


def _loss(report: StudyReport) -> Chart | None:
    points = {
        site.name: {
            p.round_: p.train_loss[site.name] for p in report.rounds if site.name in p.train_loss
        }
        for site in report.sites
    }
    if not any(points.values()):
        return None
    return charts.curves(_site_series(points), title="Training loss per round")


def _site_series(points: Mapping[str, Mapping[int, float]]) -> list[Series]:
    return [
        Series(name, values, *charts.site_style(index))
        for index, (name, values) in enumerate(points.items())
    ]


def _costs(report: StudyReport) -> list[Chart]:
    """Draw what each round took: bytes over the network, and time."""
    if not report.rounds:
        return []
    factor, unit = measures.size_unit(max(p.sent_bytes + p.received_bytes for p in report.rounds))
    sent = {p.round_: p.sent_bytes / factor for p in report.rounds}
    received = {p.round_: p.received_bytes / factor for p in report.rounds}
    second, time_unit = measures.duration_unit(max(p.seconds for p in report.rounds))
    slowest = {p.round_: min(p.slowest_site_seconds, p.seconds) / second for p in report.rounds}
    rest = {p.round_: p.seconds / second - slowest[p.round_] for p in report.rounds}
    return [
        charts.stacks(
            [
                Series("sent to hospitals", sent, PARTS[0]),
                Series("received from hospitals", received, PARTS[1]),
            ],
            title=f"Data per round, {unit}",
        ),
        charts.stacks(
            [
                Series("slowest hospital", slowest, PARTS[0]),
                Series("everything else", rest, PARTS[1]),
            ],
            title=f"Time per round, {time_unit}",
        ),
    ]


def _row(gain: findings.Gain, name: str) -> tuple[str, ...]:
    site = gain.site
    difference = "-"
    if gain.difference is not None:
        sign = "-" if gain.difference < 0 else "+"
        difference = sign + measures.figure(name, abs(gain.difference), unit=False)
        difference += " worse" if gain.verdict == "worse" else ""
    return (
        site.name,
        str(site.num_patients),
        _with_interval(name, site.metrics, site.intervals),
        "-" if gain.alone is None else measures.figure(name, gain.alone, unit=False),
        difference,
        _epsilon(site),
    )


def _epsilon(site: SiteResult) -> str:
    if site.privacy is None:
        return "none"
    statement = site.privacy
    epsilon = measures.upward(statement.epsilon, places=2)
    return f"{epsilon} ({measures.plain(statement.delta)})"


def _with_interval(
    name: str, metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> str:
    if name not in metrics:
        return "-"
    value = measures.figure(name, metrics[name], unit=False)
    if name not in intervals:
        return value
    low, high = (measures.figure(name, bound, unit=False) for bound in intervals[name])
    return f"{value} [{low}, {high}]"


def _caption(report: StudyReport) -> Text:
    if not report.is_private:
        return Text("trained WITHOUT differential privacy")
    weakest = findings.largest_epsilon(report)
    if weakest is None:
        return Text("no hospital's privacy statement is in this report")
    return Text(f"epsilon per {weakest.unit}, counted by {weakest.accountant}")


def _clean(text: str) -> Text:
    """Return text without control characters and without markup."""
    return Text("".join(letter if letter.isprintable() else " " for letter in text))

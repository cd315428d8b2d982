"""The study report: one page that says what the JSON says, no more, no less and nothing kinder."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
import struct
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server import charts, findings, measures
from server.report import read, render, table, write
from shared_models.contracts import (
    REFUSALS,
    Picture,
    PrivacyStatement,
    Refusal,
    RefusalCode,
    RoundPoint,
    SiteResult,
    StudyReport,
    ValidationReport,
)
from shared_models.errors import DocumentError

STUDY, MODEL = "5a" * 32, "c3" * 32
HOSTILE = "<script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)>"
ACCOUNTANT = "dp_accounting PLD, pessimistic"
PLAN = f"""name = "chest-findings"
rounds = 12
net = "densenet"   # {HOSTILE}

[privacy]
epsilon = 8.0
delta = 1e-5
"""
HOSPITALS = {  # patients, tested, shared AUC, alone AUC, epsilon
    "university-hospital": (612, 122, 0.9214, 0.9027, 7.9312),
    "st-mary": (288, 58, 0.8951, 0.8433, 7.9655),
    "north-clinic": (171, 34, 0.8388, 0.8614, 7.9871),
    "lakeside": (94, 19, 0.8722, 0.7915, 7.9934),
}


def sample(*, is_private: bool = True) -> StudyReport:
    """Return a study of four hospitals and twelve rounds as it could have happened."""
    return StudyReport(
        study=STUDY,
        name="Findings on chest films",
        purpose="Find out whether four hospitals read chest films better together than alone.",
        description=f"tells a chest film with a finding from one without. {HOSTILE}",
        task="classification",
        headline="auc",
        created=datetime(2026, 3, 2, 14, 30, tzinfo=UTC),
        seed=20260302,
        data="1,165 patients of four hospitals, frontal films of 2015 to 2024, split by patient.",
        plan_toml=PLAN,
        software={"consilia": "0.4.1", "torch": "2.9.0", "dp_accounting": "0.6.0"},
        is_private=is_private,
        sites=tuple(_site(name, is_private=is_private) for name in HOSPITALS),
        rounds=tuple(_point(round_) for round_ in range(1, 13)),
        global_=ValidationReport(
            study=STUDY,
            weights_digest=MODEL,
            metrics={
                "auc": 0.9036,
                "accuracy": 0.8471,
                "sensitivity": 0.8125,
                "specificity": 0.8643,
            },
            intervals={
                "auc": (0.8702, 0.9341),
                "accuracy": (0.8054, 0.8873),
                "sensitivity": (0.7391, 0.8789),
                "specificity": (0.8167, 0.9082),
            },
            num_patients=241,
            num_images=307,
            pictures=_pictures(),
        ),
        model_digest=MODEL,
        model_bytes=6_412_884,
        seconds=5_127.4,
        notes=("Hyper-parameters were chosen on a public data set.",),
    )


def _site(name: str, *, is_private: bool) -> SiteResult:
    patients, tested, shared, alone, epsilon = HOSPITALS[name]
    half = 0.42 / tested**0.5
    privacy = _privacy(epsilon, patients) if is_private else None
    metrics = {
        "auc": shared,
        "accuracy": shared - 0.0513,
        "sensitivity": shared - 0.0821,
        "specificity": shared - 0.0346,
    }
    intervals = {key: (value - half, min(value + half, 0.9987)) for key, value in metrics.items()}
    if name == "lakeside":
        metrics.pop("specificity")
        intervals.pop("specificity")
    return SiteResult(
        name=name,
        num_patients=patients,
        metrics=metrics,
        intervals=intervals,
        num_test_patients=tested,
        alone={"auc": alone, "accuracy": alone - 0.0472},
        alone_intervals={"auc": (alone - half, min(alone + half, 0.9991))},
        epsilon=privacy.epsilon if privacy else None,
        delta=privacy.delta if privacy else None,
        unit="patient" if privacy else None,
        privacy=privacy,
        refusals=(
            (Refusal(study=STUDY, round_=7, kind="train", site=name, code="no-answer"),)
            if name == "st-mary"
            else ()
        ),
    )


def _privacy(epsilon: float, patients: int) -> PrivacyStatement:
    return PrivacyStatement(
        epsilon=epsilon,
        delta=1e-5,
        epsilon_rdp=round(epsilon * 1.1173, 4),
        noise_multiplier=1.3125,
        sample_rate=round(32 / patients, 4),
        max_grad_norm=0.75,
        images_per_patient=4,
        steps=257,
        covers="every update sent in this study and the model trained alone.",
        does_not_cover="evaluation metrics, patient counts and the choice of hyper-parameters.",
    )


def _point(round_: int) -> RoundPoint:
    refused: dict[str, RefusalCode] = {"st-mary": "no-answer"} if round_ == 7 else {}
    rise = 1 - 0.72**round_
    answering = [name for name in HOSPITALS if name not in refused]
    wobble = {name: ((round_ * 7 + i * 5) % 11 - 5) / 400 for i, name in enumerate(HOSPITALS)}
    return RoundPoint(
        round_=round_,
        validation={"auc": 0.55 + 0.355 * rise, "accuracy": 0.52 + 0.33 * rise},
        sites={
            name: {
                "auc": 0.53 + (HOSPITALS[name][2] - 0.53) * rise + wobble[name],
                "accuracy": 0.5 + (HOSPITALS[name][2] - 0.55) * rise + wobble[name],
            }
            for name in answering
        },
        train_loss={name: 0.71 - 0.38 * rise + wobble[name] for name in answering},
        seconds=398.0 + 13 * (round_ % 4) + (180 if refused else 0),
        slowest_site_seconds=371.0 + 11 * (round_ % 5) + (180 if refused else 0),
        sent_bytes=6_412_884 * len(HOSPITALS),
        received_bytes=6_412_884 * len(answering),
        refused=refused,
    )


def _pictures() -> tuple[Picture, ...]:
    captions = ("finding, 0.93 (expert: finding)", "no finding, 0.08 (expert: no finding)")
    good = [Picture(caption=c, png_base64=_png(7 + i)) for i, c in enumerate(captions)]
    return (*good, Picture(caption="broken", png_base64='"><script>alert(2)</script>'))


def _png(seed: int, *, side: int = 48) -> str:
    """Return a grey picture with a bright disc, encoded by hand."""
    rows = b"".join(
        b"\0" + bytes(_grey(x, y, seed=seed, side=side) for x in range(side)) for y in range(side)
    )
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return base64.b64encode(content).decode()


def _grey(x: int, y: int, *, seed: int, side: int) -> int:
    distance = ((x - side / 2) ** 2 + (y - side / 2 - seed % 5) ** 2) ** 0.5
    return max(0, min(255, int(215 - 6 * distance + (x * seed + y * 3) % 17)))


def changed(report: StudyReport, **fields: Any) -> StudyReport:
    return report.model_copy(update=fields)


def visible(page: str) -> str:
    """Return what a reader reads, spoken labels and titles included."""
    body = page.partition("<body>")[2]
    spoken = " ".join(re.findall(r'(?:aria-label|title|alt)="([^"]*)"', body))
    text = re.sub(r"<[^>]*>", " ", body) + " " + spoken
    return re.sub(r"\s+", " ", html.unescape(text))


def printed(report: StudyReport, *, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None, force_terminal=False)
    console.print(table(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_text_in_the_report_is_never_markup_on_the_page() -> None:
    page = render(sample())
    assert "<script" not in page.lower()
    assert "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", page)
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;") in page
    assert len(re.findall("<img ", page)) == 2


def test_every_text_field_is_escaped() -> None:
    report = sample()
    texts = dict.fromkeys(("name", "purpose", "description", "task", "data", "plan_toml"), HOSTILE)
    page = render(changed(report, **texts, notes=(HOSTILE,), software={HOSTILE: HOSTILE}))
    assert "<script" not in page.lower()
    assert "<img src=https" not in page


def test_the_page_fetches_nothing() -> None:
    page = re.sub(r"&lt;.*?&gt;", "", render(sample()))
    targets = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets
    assert all(target.startswith("data:image/png;base64,") for target in targets)
    assert not re.search(r"https?://|@import|url\(|<link|<iframe|<object|<embed", page)
    assert "default-src 'none'" in page


def test_the_same_report_gives_the_same_bytes() -> None:
    report = sample()
    again = StudyReport.model_validate_json(report.model_dump_json(by_alias=True))
    assert render(report) == render(again)


def test_a_picture_that_is_no_png_is_left_out_and_said_so() -> None:
    assert findings.png(base64.b64encode(b"GIF89a").decode()) is None
    assert findings.png("not base64!") is None
    assert findings.png(_png(3)) == _png(3)
    assert "left out: not a PNG picture" in render(sample())


@pytest.mark.parametrize("is_private", [True, False])
def test_every_figure_on_the_page_stems_from_the_report(is_private: bool) -> None:
    report = sample(is_private=is_private)
    page = render(report)
    without_axes = re.sub(r"<text (?!class).*?</text>", " ", page)
    shown = set(re.findall(r"\d+\.\d{2,}", visible(without_axes)))
    assert shown
    assert shown <= _figures(report) | set(re.findall(r"\d+\.\d{2,}", _texts(report)))


def _figures(report: StudyReport) -> set[str]:
    """Return every number of the JSON, and every difference to alone, in each way of writing it."""
    numbers = list(_leaves(json.loads(report.model_dump_json(by_alias=True)), float))
    numbers += [abs(g.difference) for g in findings.gains(report) if g.difference is not None]
    waits = [(p.seconds, p.slowest_site_seconds) for p in report.rounds]
    numbers += [minutes / 60 for a, b in waits for minutes in (a, b, a - b)]
    epsilons = [e for s in report.sites if s.privacy for e in (s.privacy.epsilon,)]
    rounded = {measures.upward(epsilon, places=2) for epsilon in epsilons}
    ways = (lambda v: f"{v:.3f}", measures.plain, measures.upward, lambda v: f"{v:.3g}")
    return rounded | {way(number) for number in numbers for way in ways}


def _texts(report: StudyReport) -> str:
    return " ".join(_leaves(json.loads(report.model_dump_json(by_alias=True)), str))


def _leaves(value: Any, kind: type) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in _leaves(one, kind)]
    if isinstance(value, list):
        return [leaf for one in value for leaf in _leaves(one, kind)]
    return [value] if isinstance(value, kind) else []


def test_every_figure_of_every_hospital_is_on_the_page() -> None:
    report = sample()
    text = visible(render(report))
    for site in report.sites:
        assert site.privacy is not None
        for name, value in site.metrics.items():
            assert measures.figure(name, value) in text
            assert measures.interval(name, site.intervals[name]) in text
        assert measures.upward(site.privacy.epsilon) in text
        assert measures.plain(site.privacy.sample_rate) in text


def test_an_epsilon_never_stands_without_unit_delta_and_accountant() -> None:
    report = sample()
    page = render(report)
    for site in report.sites:
        epsilon = measures.upward(site.epsilon or 0)
        cell = rf"{epsilon}</strong> per patient.*?delta 1e-5.*?{ACCOUNTANT}"
        assert re.search(cell, page, re.DOTALL)
    assert f"epsilon is at most 8.00 per patient at delta 1e-5, as counted by {ACCOUNTANT}" in page
    terminal = printed(report)
    assert "8.00 (1e-5)" in terminal
    assert "epsilon per" in terminal
    assert "(delta)" in terminal
    assert ACCOUNTANT in re.sub(r"\s+", " ", terminal)


def test_an_epsilon_is_never_rounded_down() -> None:
    assert measures.upward(7.9312, places=2) == "7.94"
    assert measures.upward(2.0) == "2.0000"
    assert measures.upward(1.00001) == "1.0001"


def test_a_study_without_privacy_says_so_unmistakably() -> None:
    page = render(sample(is_private=False))
    assert visible(page).count("trained WITHOUT differential privacy") >= 2
    assert "epsilon is at most" not in page
    assert "trained WITHOUT differential privacy" in printed(sample(is_private=False))
    assert "WITHOUT differential privacy" not in render(sample())


def test_a_hospital_worse_off_than_alone_is_named_in_the_summary() -> None:
    text = visible(render(sample()))
    assert "3 of the 4 hospitals compared did better" in text
    assert "Worse off with the shared model than alone: north-clinic." in text
    assert "worse" in next(line for line in printed(sample()).splitlines() if "north" in line)


def test_less_is_better_for_distances() -> None:
    report = sample()
    site = report.sites[0].model_copy(
        update={"metrics": {"hd95_liver": 9.1}, "alone": {"hd95_liver": 7.4}}
    )
    gain = findings.gains(changed(report, headline="hd95_liver", sites=(site,)))[0]
    assert gain.verdict == "worse"
    assert measures.signed("hd95_liver", 9.1 - 7.4) == "+1.7 mm"
    assert measures.measure("hd95_liver").label == "Hausdorff distance (95th percentile), liver"


def test_an_unknown_metric_is_shown_but_not_judged() -> None:
    report = sample()
    site = report.sites[0].model_copy(
        update={"metrics": {"novelty": 0.7}, "alone": {"novelty": 0.6}}
    )
    report = changed(report, headline="novelty", sites=(site,))
    assert findings.gains(report)[0].verdict == "unjudged"
    assert "+0.100" in visible(render(report))


def test_a_missing_metric_is_a_dash_with_its_reason() -> None:
    page = render(sample())
    assert re.search(rf'title="could not be computed[^"]*"[^>]*>{measures.DASH}<', page)
    assert "nan" not in re.findall(r"[a-z]+", visible(page).lower())


def test_refusals_are_told_once_with_their_sentence() -> None:
    absences = findings.absences(sample())
    assert [(one.site, one.rounds) for one in absences] == [("st-mary", (7,))]
    assert REFUSALS["no-answer"] in render(sample())


def test_a_report_that_contradicts_itself_says_so() -> None:
    report = sample()
    assert findings.contradictions(report) == []
    lie = report.sites[0].model_copy(update={"epsilon": 1.0})
    page = render(changed(report, sites=(lie, *report.sites[1:]), model_digest="00" * 32))
    assert "This report contradicts itself" in page
    assert "university-hospital has an epsilon that its privacy statement does not bear out" in page


def test_an_empty_study_still_makes_a_page() -> None:
    report = sample()
    site = report.sites[0].model_copy(
        update={"metrics": {}, "intervals": {}, "alone": None, "alone_intervals": {}}
    )
    world = report.global_.model_copy(update={"metrics": {}, "intervals": {}, "pictures": ()})
    empty = changed(report, sites=(site,), rounds=(), global_=world)
    text = visible(render(empty))
    assert "No round was recorded." in text
    assert "could not be computed" in text
    assert "-" in printed(empty)


def test_the_terminal_table_fits_80_columns() -> None:
    lines = printed(sample()).splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "lakeside" in line)
    assert all(part in row for part in ("94", "0.872 [", "0.791", "+0.081", "8.00"))
    assert any("held-out set" in line and "0.904 [0.870, 0.934]" in line for line in lines)


def test_the_terminal_table_swallows_control_characters_and_markup() -> None:
    text = printed(changed(sample(), name="\x1b[31mred\x07 [bold]x[/bold]"))
    assert "\x1b" not in text
    assert "[bold]x" in text


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    report = sample()
    page = write(report, tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text() == render(report)
    assert read(tmp_path / "report.json") == report
    assert "global" in json.loads((tmp_path / "report.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"secret": 1}'])
def test_a_file_that_is_no_report_is_refused_in_one_sentence(tmp_path: Path, content: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(content)
    with pytest.raises(DocumentError, match="is not a study report") as caught:
        read(file)
    assert len(caught.value.objections) == 1


def test_a_missing_report_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="cannot read"):
        read(tmp_path / "report.json")


def test_labels_beside_curves_do_not_cover_each_other() -> None:
    series = [charts.Series(str(i), {1: 0.9, 2: 0.9 + i / 1e4}, charts.INK) for i in range(15)]
    chart = charts.curves(series, title="AUC")
    heights = sorted(curve.label_y for curve in chart.curves)
    assert all(b - a >= charts.LINE_HEIGHT - 1e-6 for a, b in itertools.pairwise(heights))
    assert heights[-1] <= chart.bottom


def test_a_long_label_keeps_its_ending() -> None:
    assert charts.shorten("lakeside") == "lakeside"
    short = charts.shorten("hospital-of-the-long-name-7")
    assert short.endswith("-name-7")
    assert len(short) == charts.LONGEST_LABEL


def test_a_round_without_a_figure_interrupts_the_curve() -> None:
    series = [charts.Series("a", {1: 0.1, 3: 0.3}, charts.INK), charts.Series("b", {2: 0.2}, "red")]
    assert charts.curves(series, title="AUC").curves[0].path.count("M") == 2


def test_a_hospital_that_trained_without_a_statement_is_a_contradiction() -> None:
    report = sample()
    bare = {"epsilon": None, "delta": None, "unit": None, "privacy": None}
    silent = report.sites[0].model_copy(update=bare)
    told = changed(report, sites=(silent, *report.sites[1:]))
    assert len(findings.contradictions(told)) == 1
    assert findings.contradictions(changed(told, rounds=())) == []
    assert "no privacy statement of this hospital" in render(told)

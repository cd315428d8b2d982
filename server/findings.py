"""What a study report says: verdicts and sentences, from its figures only.

Design: the page shows what stands in ``report.json`` and nothing else, so everything here is a pure
function of the report. A verdict is never kinder than the figures: a hospital that lost is named,
and a report that contradicts itself says so.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Literal, NamedTuple

from server import measures
from shared_models.contracts import REFUSALS, PrivacyStatement, SiteResult, StudyReport

Verdict = Literal["better", "worse", "same", "unjudged", "not compared"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Gain(NamedTuple):
    """One hospital: the shared model against the one it trained alone, on its own test patients."""

    site: SiteResult
    together: float | None
    alone: float | None
    difference: float | None
    verdict: Verdict
    is_clear: bool


class Absence(NamedTuple):
    """A hospital that did not take part in some rounds, and why."""

    site: str
    code: str
    sentence: str
    rounds: tuple[int, ...]
    is_alone: bool


def gains(report: StudyReport) -> tuple[Gain, ...]:
    """Compare every hospital's headline metric with what it reached alone."""
    return tuple(_gain(site, report.headline) for site in report.sites)


def _gain(site: SiteResult, name: str) -> Gain:
    together, alone = site.metrics.get(name), (site.alone or {}).get(name)
    if together is None or alone is None:
        return Gain(site, together, alone, None, "not compared", False)
    difference = together - alone
    is_clear = _are_apart(site.intervals.get(name), site.alone_intervals.get(name))
    return Gain(site, together, alone, difference, _verdict(name, difference), is_clear)


def _verdict(name: str, difference: float) -> Verdict:
    better = measures.measure(name).better
    if round(difference, measures.decimals(name)) == 0:
        return "same"
    if better == "unknown":
        return "unjudged"
    return "better" if (difference > 0) == (better == "higher") else "worse"


def _are_apart(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    return one is not None and other is not None and (one[0] > other[1] or other[0] > one[1])


def gain_sentences(compared: Sequence[Gain]) -> list[str]:
    """Say who gained and who did not, by name; and how sure that is."""
    judged = [gain for gain in compared if gain.verdict in ("better", "worse", "same")]
    sentences = [_who_gained(judged)] if judged else []
    for verdict, words in (
        ("worse", "Worse off with the shared model than alone"),
        ("same", "No difference to training alone"),
        ("unjudged", "Compared, but the direction of this metric is not known here"),
        ("not compared", "Not compared with training alone"),
    ):
        names = [gain.site.name for gain in compared if gain.verdict == verdict]
        if names:
            sentences.append(f"{words}: {', '.join(names)}.")
    unsure = [gain for gain in judged if gain.verdict != "same" and not gain.is_clear]
    if unsure:
        which = (
            "all comparisons" if len(unsure) == len(judged) else f"{len(unsure)} of {len(judged)}"
        )
        sentences.append(
            f"The difference may be chance in {which}: the 95 % intervals overlap or are missing."
        )
    return sentences


def _who_gained(judged: Sequence[Gain]) -> str:
    better = sum(gain.verdict == "better" for gain in judged)
    if better == len(judged) == 1:
        return "The one hospital compared did better with the shared model than with its own."
    if better == len(judged):
        return (
            f"All {better} hospitals compared did better with the shared model than with a model"
            " trained on their own patients alone."
        )
    return (
        f"{better or 'None'} of the {len(judged)} hospitals compared did better with the shared"
        " model than with a model trained on its own patients alone."
    )


def largest_epsilon(report: StudyReport) -> PrivacyStatement | None:
    """Return the weakest of the hospitals' privacy statements, or nothing if there is none."""
    statements = [site.privacy for site in report.sites if site.privacy is not None]
    return max(statements, key=lambda statement: statement.epsilon, default=None)


def privacy_sentence(report: StudyReport) -> str:
    """Say in one sentence what holds for patients."""
    if not report.is_private:
        return (
            "The model was trained WITHOUT differential privacy: nothing bounds what it, or the"
            " updates it was made from, may reveal about a single patient."
        )
    weakest = largest_epsilon(report)
    if weakest is None:
        return (
            "The study was to be differentially private, but no hospital's privacy statement is in"
            " this report, so nothing can be claimed."
        )
    is_sum = weakest.noise_shares > 1
    what = (
        "The sum of the hospitals' updates, the only form in which the coordinator saw them,"
        if is_sum
        else "What the hospitals sent"
    )
    rests = (
        f" It holds as long as {weakest.noise_shares} of them keep their share of the noise to"
        " themselves."
    )
    return (
        f"{what} is differentially private for every patient: epsilon is at most"
        f" {measures.upward(weakest.epsilon, places=2)} per {weakest.unit} at delta"
        f" {measures.plain(weakest.delta)}, as counted by {weakest.accountant}."
        f"{rests if is_sum else ''}"
    )


def absences(report: StudyReport) -> tuple[Absence, ...]:
    """Collect refusals by hospital and reason, from the rounds and from the hospitals' lines."""
    found = {
        (site, code, False, point.round_)
        for point in report.rounds
        for site, code in point.refused.items()
    } | {
        (refusal.site, refusal.code, refusal.kind == "alone", refusal.round_)
        for site in report.sites
        for refusal in site.refusals
    }
    groups = sorted({entry[:3] for entry in found})
    return tuple(
        Absence(
            site,
            code,
            REFUSALS[code],
            tuple(sorted(entry[3] for entry in found if entry[:3] == (site, code, is_alone))),
            is_alone,
        )
        for site, code, is_alone in groups
    )


def contradictions(report: StudyReport) -> list[str]:
    """Say where the report's fields disagree; an honest report has none."""
    found = [
        text
        for is_so, text in (
            (
                report.global_.study != report.study,
                "the global validation belongs to another study",
            ),
            (
                report.global_.weights_digest != report.model_digest,
                "the global validation judged other weights than the model's",
            ),
        )
        if is_so
    ]
    return found + [text for site in report.sites for text in _site_contradictions(site, report)]


def _site_contradictions(site: SiteResult, report: StudyReport) -> list[str]:
    stated, found = site.privacy, []
    if stated is not None and not report.is_private:
        found.append(f"{site.name} states an epsilon although the study was not private")
    took_part = any(site.name in point.train_loss for point in report.rounds)
    if stated is None and report.is_private and took_part:
        found.append(
            f"{site.name} trained without a privacy statement although the study was private"
        )
    if site.epsilon is not None and (
        stated is None or (site.epsilon, site.delta) != (stated.epsilon, stated.delta)
    ):
        found.append(f"{site.name} has an epsilon that its privacy statement does not bear out")
    return found


def metric_names(report: StudyReport) -> list[str]:
    """Return every metric in the report, the headline first, then in the order of appearance."""
    names = dict.fromkeys([report.headline, *report.global_.metrics])
    for site in report.sites:
        names |= dict.fromkeys([*site.metrics, *(site.alone or {})])
    for point in report.rounds:
        for metrics in (point.validation, *point.sites.values()):
            names |= dict.fromkeys(metrics)
    return list(names)


def statements_by_text(report: StudyReport) -> list[tuple[str, str, list[str]]]:
    """Group hospitals whose epsilon covers, and does not cover, the same."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site in report.sites:
        if site.privacy is not None:
            key = (site.privacy.covers, site.privacy.does_not_cover)
            groups.setdefault(key, []).append(site.name)
    return [(covers, omits, names) for (covers, omits), names in groups.items()]


def png(encoded: str) -> str | None:
    """Return the picture as clean base64 if it is a PNG, else nothing."""
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return None
    return base64.b64encode(content).decode() if content.startswith(PNG_SIGNATURE) else None

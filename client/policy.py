"""Whether this hospital takes part in a plan: rules, each a function that objects or says nothing.

Adding a rule is adding a function to ``RULES``. All objections are collected; one is enough to
refuse. No rule can be overridden from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

from client import peers
from client.config import SiteConfig
from shared_models.catalogue import objections
from shared_models.plan import StudyPlan, fewest_honest, planned_events
from shared_models.privacy import epsilon

Rule = Callable[[StudyPlan, SiteConfig], str | None]


def judge(plan: StudyPlan, site: SiteConfig, *, today: date) -> list[str]:
    """Return every objection of this site to ``plan``; none means it may be approved."""
    return broken_rules(plan, site) + objections(plan, today=today, plugins=site.policy.plugins)


def broken_rules(plan: StudyPlan, site: SiteConfig) -> list[str]:
    """Return the objections of this site's own rules, which need nothing that the plan names."""
    return [objection for rule in RULES if (objection := rule(plan, site)) is not None]


def is_invited(plan: StudyPlan, site: SiteConfig) -> str | None:
    """The plan must name this site."""
    if site.name in plan.sites:
        return None
    return f"sites: the plan does not name this site, {site.name}"


def knows_coordinator(plan: StudyPlan, site: SiteConfig) -> str | None:
    """The plan's coordinator must be one this site trusts, by key."""
    if plan.coordinator in site.policy.coordinators:
        return None
    return (
        "coordinator: this site does not know the key; add it to policy.coordinators if it should"
    )


def allows_purpose(plan: StudyPlan, site: SiteConfig) -> str | None:
    """The purpose must be one this site allows."""
    return _among("purpose", plan.purpose, site.policy.purposes)


def allows_task(plan: StudyPlan, site: SiteConfig) -> str | None:
    """The task must be one this site allows."""
    return _among("task.name", plan.task.name, site.policy.tasks)


def allows_net(plan: StudyPlan, site: SiteConfig) -> str | None:
    """The net must be one this site allows."""
    return _among("net.name", plan.net.name, site.policy.nets)


def allows_rounds(plan: StudyPlan, site: SiteConfig) -> str | None:
    """The study may not be longer than this site allows."""
    if plan.training.num_rounds <= site.policy.max_rounds:
        return None
    return (
        f"training.num_rounds: expected at most {site.policy.max_rounds} at this site, "
        f"got {plan.training.num_rounds}"
    )


def demands_privacy(plan: StudyPlan, site: SiteConfig) -> str | None:
    """Without differential privacy nothing leaves, unless the site says so itself."""
    if plan.privacy is not None or site.policy.allow_without_privacy:
        return None
    return (
        "privacy: the plan has no privacy terms and this site does not allow that; add a [privacy] "
        "table to the plan"
    )


def allows_epsilon(plan: StudyPlan, site: SiteConfig) -> str | None:
    """The study may not cost a patient more than this site allows, whatever the plan claims."""
    if plan.privacy is None:
        return None
    cost = max(epsilon(planned_events(plan), delta=plan.privacy.delta), plan.privacy.epsilon)
    if cost <= site.policy.max_epsilon_per_study:
        return None
    return (
        f"privacy.epsilon: the study costs {cost:g} per patient, this site allows "
        f"{site.policy.max_epsilon_per_study:g} per study"
    )


def allows_delta(plan: StudyPlan, site: SiteConfig) -> str | None:
    """Delta must be as small as this site asks."""
    if plan.privacy is None or plan.privacy.delta <= site.policy.max_delta:
        return None
    return (
        f"privacy.delta: expected at most {site.policy.max_delta:g} at this site, "
        f"got {plan.privacy.delta:g}"
    )


def knows_peers(plan: StudyPlan, site: SiteConfig) -> str | None:
    """Secure aggregation hides an update only among sites this one trusts, by key."""
    if not plan.rounds.secure_aggregation:
        return None
    known = peers.read(site.policy.peers).keys() & {*plan.sites} - {site.name}
    if len(known) + 1 >= fewest_honest(plan):
        return None
    return (
        f"rounds.secure_aggregation: this site trusts {len(known)} of the plan's other sites, "
        f"it must hide among {fewest_honest(plan) - 1}; compare their keys and add them with "
        "consilia-site trust"
    )


RULES: tuple[Rule, ...] = (
    is_invited,
    knows_coordinator,
    allows_purpose,
    allows_task,
    allows_net,
    allows_rounds,
    demands_privacy,
    allows_epsilon,
    allows_delta,
    knows_peers,
)


def _among(where: str, value: str, allowed: tuple[str, ...]) -> str | None:
    if value in allowed:
        return None
    return (
        f"{where}: '{value}' is not allowed at this site; allowed: {', '.join(allowed) or 'none'}"
    )

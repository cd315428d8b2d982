"""Whether this hospital takes part in a plan: rules, each a function that objects or says nothing.

Adding a rule touches this file and no other: a function that returns its sentence or nothing, and
its name in ``RULES``. (A limit that a hospital sets for itself is a field of ``PolicySettings``
besides, with a comment in the template of ``site.toml``.) All objections are collected; one is
enough to refuse. No rule can be overridden from outside.

Rules in ``RULES`` hold for every order, and need nothing that the plan names: no net and no plug-in
is made before they are heard. Those in ``RULES_BEFOREHAND`` look ahead, at what a sound plan would
come to; once it is approved, the ledger and the gate decide of each order. What may be told of
results (their metrics, the number of patients) is the gate's business alone.

Guarantees:
    Every objection is told at once.
    Nothing is trained in quiet hours, whatever clocks do to them.
    A study that could not be finished within the cohort's lifetime is not approved.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

from client import ledger, peers
from client.config import PolicySettings, SiteConfig
from shared_models.allowlists import objections
from shared_models.plan import StudyPlan, fewest_honest, planned_events
from shared_models.privacy import epsilon, events_of
from shared_models.signing import digest

Rule = Callable[[StudyPlan, SiteConfig], str | None]

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def judge(plan: StudyPlan, site: SiteConfig, *, today: date) -> list[str]:
    """Return every objection of this site to ``plan``; none means it may be approved.

    Raises:
        LedgerError: if the ledger cannot be read, so that nobody knows what may still be spent.
    """
    unsound = objections(plan, today=today, plugins=site.policy.plugins)
    ahead = () if unsound else RULES_BEFOREHAND
    found = [objection for rule in ahead if (objection := rule(plan, site)) is not None]
    return broken_rules(plan, site) + found + unsound


def broken_rules(plan: StudyPlan, site: SiteConfig) -> list[str]:
    """Return the objections of this site's own rules, which need nothing that the plan names."""
    return [objection for rule in RULES if (objection := rule(plan, site)) is not None]


def is_quiet(policy: PolicySettings, now: datetime) -> bool:
    """Tell whether ``now``, a time with its zone, is in this site's quiet hours.

    Hours are read off the wall: where clocks are put back, an hour that comes twice is quiet twice.

    Raises:
        ValueError: if ``now`` is without a zone.
    """
    if now.tzinfo is None:
        raise ValueError("expected a time with its zone")
    local = now.astimezone(ZoneInfo(policy.time_zone) if policy.time_zone else None)
    return any(_holds(hours, local) for hours in policy.quiet_hours)


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


def allows_fingerprint(plan: StudyPlan, site: SiteConfig) -> str | None:
    """A fingerprint of the images is told only if this site says so."""
    if plan.fingerprint is None or site.policy.allow_fingerprint:
        return None
    return (
        "fingerprint: this site tells no fingerprints of its images; ask its people to set "
        "policy.allow_fingerprint, or leave the [fingerprint] table out"
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


def allows_lifetime(plan: StudyPlan, site: SiteConfig) -> str | None:
    """The study must fit into what the cohort's lifetime leaves; once begun, the ledger decides."""
    if plan.privacy is None:
        return None
    charged = ledger.read(site.state_dir).reservations
    if not charged or any(entry.study == digest(plan) for entry in charged):
        charged = ()
    delta = min([plan.privacy.delta, *(entry.delta for entry in charged)])
    cost = epsilon((*events_of(charged), *planned_events(plan)), delta=delta)
    if cost <= site.policy.max_epsilon_lifetime:
        return None
    return (
        f"privacy.epsilon: with what was spent before, this cohort's lifetime would come to "
        f"{cost:g} of {site.policy.max_epsilon_lifetime:g} at delta {delta:g}; ask for a cheaper "
        "study, or take part with other patients"
    )


def agrees_on_classes(plan: StudyPlan, site: SiteConfig) -> str | None:
    """Where labels are numbers, the plan must mean the same by them as this site."""
    here, theirs = site.data.classes, plan.task.params.get("classes")
    if not here or here == theirs:
        return None
    meant = ", ".join(map(str, theirs)) if isinstance(theirs, tuple) else "none"
    return (
        f"task.params.classes: this site's labels number {', '.join(here)}, the plan's {meant}; "
        "ask for this order, or correct data.classes if it is not what the labels mean"
    )


def allows_size(plan: StudyPlan, site: SiteConfig) -> str | None:
    """An update of the plan's net may not be larger than what this site lets leave."""
    size_mb = update_bytes(plan, plugins=site.policy.plugins) / 2**20
    if size_mb <= site.policy.max_update_mb:
        return None
    return (
        f"net: an update is {size_mb:.1f} MB, this site lets {site.policy.max_update_mb:g} leave; "
        "ask for a smaller net, or raise policy.max_update_mb"
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
    agrees_on_classes,
    knows_peers,
    allows_fingerprint,
)

RULES_BEFOREHAND: tuple[Rule, ...] = (allows_lifetime, allows_size)


def update_bytes(plan: StudyPlan, *, plugins: tuple[str, ...] = ()) -> int:
    """Return the bytes of an update of the plan's net, which is made for that.

    Raises:
        Exception: whatever keeps task or net from being made; see ``allowlists.objections``.
    """
    from shared_models import nets, tasks
    from shared_models.nets.base import weights_of
    from shared_models.registry import find
    from shared_models.weights import schema_of, size_of

    task = find("tasks", plan.task.name, builtin=tasks.BUILTIN, plugins=plugins)(**plan.task.params)
    net = nets.make(
        plan.net.name, plan.net.params, seed=0, num_outputs=task.num_outputs, plugins=plugins
    )
    return size_of(schema_of(weights_of(net))) * (8 if plan.rounds.secure_aggregation else 4)


def _among(where: str, value: str, allowed: tuple[str, ...]) -> str | None:
    if value in allowed:
        return None
    return (
        f"{where}: '{value}' is not allowed at this site; allowed: {', '.join(allowed) or 'none'}"
    )


def _holds(hours: str, local: datetime) -> bool:
    """Tell whether a stretch such as ``mon-fri 07:00-19:00`` holds the local time."""
    days, _, times = hours.rpartition(" ")
    start, end = times.split("-")
    now, today = local.strftime("%H:%M"), DAYS[local.weekday()]
    quiet_days = _days(days)
    if start < end:
        return today in quiet_days and start <= now < end
    yesterday = DAYS[(local - timedelta(days=1)).weekday()]
    return (today in quiet_days and now >= start) or (yesterday in quiet_days and now < end)


def _days(text: str) -> set[str]:
    """Return the days of ``mon-fri``, ``sat,sun`` or ``fri-mon,wed``; all of them of no text."""
    found: set[str] = set()
    for part in text.split(",") if text else ("mon-sun",):
        first, _, last = part.partition("-")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found |= {DAYS[(begin + i) % 7] for i in range((end - begin) % 7 + 1)}
    return found

"""What ``consilia-site`` prints for people: studies, a plan in plain words, the status.

Text of the coordinator's is printed without its control characters and never as markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.status import Cost, Left, Refused, Status, StudyStatus
from client.studies import SHORT, Known
from shared_models.fingerprint import layouts, sensitivity, terms_of
from shared_models.plan import PrivacyTerms, StudyPlan, fewest_honest, planned_events
from shared_models.privacy import epsilon, sentences_for
from shared_models.terminal import downward, printable, size, upward

STYLES = {
    "offered": "bold yellow",
    "approved": "green",
    "refused": "red",
    "withdrawn": "red",
    "expired": "dim",
    "closed": "dim",
}
WORDS = {
    "offered": "to be decided",
    "approved": "approved",
    "refused": "refused",
    "withdrawn": "withdrawn",
    "expired": "expired",
    "closed": "closed",
}
BAR = 20
NEWEST = 8  # so many of what left or was refused are shown
LABEL = 14
SHORTER = 8


def studies_table(known: Sequence[Known]) -> Table:
    """Return the studies this site was offered or decided about."""
    table = _table("study", "name", "decision", "since", "coordinator")
    for one in known:
        table.add_row(
            one.study[:SHORTER],
            Text(one.plan.name),
            _decision(one.status),
            "" if one.decision is None else _day(one.decision.when),
            "" if one.word is None else _word(one.word.state, one.word.num_rounds_done, one.plan),
        )
    return table


def plan_in_words(known: Known, *, test_floor: int) -> RenderableType:
    """Return what a plan asks of this hospital, what leaves, and what it costs its patients."""
    plan = known.plan
    rows, decided = _rows(), known.decision
    if decided is not None:
        why = "" if decided.reason is None else f"; {decided.reason}"
        by = f"{known.status} by {printable(decided.who)}, {_day(decided.when)}{why}"
        rows.add_row("Decision", Text(by))
    for label, text in _facts(plan, test_floor=test_floor):
        rows.add_row(label, Text(text))
    head = Text.assemble((plan.name, "bold"), f"  study {known.study[:SHORT]}  ")
    return Group(head + _decision(known.status), Text(), rows)


def status_in_words(status: Status) -> RenderableType:
    """Return the whole status, for a terminal of 80 columns or more."""
    parts: list[RenderableType] = [_head(status), Text()]
    parts += [_attention(status.attention), Text()]
    parts += [_health(status), Text()]
    parts += [_title("Privacy spent, per patient"), *_budget(status), Text()]
    parts += [_title("Studies"), *_studies(status.studies), Text()]
    total = f"{status.num_left} replies, {size(status.sent_bytes)} in all"
    parts += [_title("What left the building", total), _left(status.left)]
    if status.refused:
        parts += [Text(), _title("Orders not obeyed", f"{status.num_refused} in all")]
        parts += [_refused(status.refused)]
    return Group(*parts)


def meaning(cost: Cost) -> str:
    """Return what makes an epsilon mean something."""
    at = "" if cost.delta is None else f", delta {cost.delta:g}"
    return f"per {cost.unit}{at}; {cost.accountant}; Poisson; add or remove one patient"


def _facts(plan: StudyPlan, *, test_floor: int) -> Iterator[tuple[str, str]]:
    training, rounds = plan.training, plan.rounds
    yield "Purpose", plan.purpose
    if plan.description:
        yield "In its words", f"“{printable(plan.description)}”"
    yield "Sites", f"{', '.join(plan.sites)}; at least {rounds.quorum} in every round"
    if plan.fingerprint is not None:
        yield from _fingerprint_facts(plan)
        return
    yield "Learns", f"{plan.task.name}{_params(plan.task.params)}"
    yield "Net", f"{plan.net.name}{_params(plan.net.params)}"
    yield "Images", ", then ".join(f"{c.name}{_params(c.params)}" for c in plan.imaging) or "as is"
    yield (
        "Rounds",
        f"{training.num_rounds} of {training.steps_per_round} steps; each step draws every "
        f"patient with probability {training.sample_rate:g} and at most "
        f"{training.images_per_patient} image{'' if training.images_per_patient == 1 else 's'} "
        "of each",
    )
    yield "Patients", f"at least {plan.min_patients} to train on, or this site stays out"
    yield "Expires", f"{plan.expires}"
    yield "What leaves", " ".join(_leaves(plan, test_floor=test_floor))
    yield "Stays here", "images, patients' names and numbers, labels, paths, the ledger"
    yield from _privacy(plan)


def _fingerprint_facts(plan: StudyPlan) -> Iterator[tuple[str, str]]:
    """Say what a plan asks that trains nothing; its net and training are a draft."""
    terms, steps = terms_of(plan), ", then ".join(c.name for c in plan.imaging)
    names = ", ".join(layout.name for layout in layouts(plan))
    yield "Learns", "nothing: it asks for a fingerprint of the images, and no net is trained"
    yield "Counts", f"{len(layouts(plan))} histograms: {names}"
    yield "Images", f"one of each training patient, {f'after {steps}' if steps else 'as is'}"
    yield "Patients", f"at least {plan.min_patients} to train on, or this site stays out"
    yield "Expires", f"{plan.expires}"
    what = (
        "with noise added here to every count"
        if plan.privacy is not None
        else f"WITHOUT any noise, none of fewer than {terms.min_cell} patients or this site's own "
        "floor if that is larger"
    )
    yield "What leaves", f"Once: these counts of patients, {what}; and how many they are."
    yield "Stays here", "images, patients' names and numbers, labels, paths, the ledger"
    yield from _privacy(plan)


def _leaves(plan: StudyPlan, *, test_floor: int) -> Iterator[str]:
    yield "In every round: the change of the model's weights"
    if plan.privacy is not None:
        yield "with noise added here" + ("," if plan.rounds.secure_aggregation else "; also")
    else:
        yield "WITHOUT any noise; the training loss; also"
    if plan.rounds.secure_aggregation:
        yield (
            f"hidden among at least {fewest_honest(plan)} sites, so that only their sum can be "
            "read; also"
        )
    yield (
        "the number of training patients, and metrics over the test patients if there are at "
        f"least {test_floor}."
    )
    if plan.compare_alone:
        yield "Once: the metrics of a model trained here alone, which costs as much again."


def _privacy(plan: StudyPlan) -> Iterator[tuple[str, str]]:
    terms = plan.privacy
    if terms is None and plan.fingerprint is not None:
        yield "Privacy", "NONE: counts are gathered, which is not differential privacy"
        return
    if terms is None:
        yield "Privacy", "NONE: nothing bounds what the model may reveal about a single patient"
        return
    cost = epsilon(planned_events(plan), delta=terms.delta)
    is_told = plan.fingerprint is not None
    covers, not_covered = sentences_for(terms.noise_shares, is_fingerprint=is_told)
    spare = f", {plan.rounds.spare} rounds asked again included" if plan.rounds.spare else ""
    yield (
        "Privacy cost",
        f"epsilon {upward(cost)} per patient at delta {terms.delta:g} for the whole study"
        f"{spare}; at most {terms.epsilon:g}",
    )
    yield (
        "How counted",
        f"dp_accounting PLD, pessimistic, rounded up; {_mechanism(plan, terms)}",
    )
    yield "Covers", covers
    yield "Does not cover", not_covered


def _mechanism(plan: StudyPlan, terms: PrivacyTerms) -> str:
    if plan.fingerprint is None:
        return (
            "Poisson sampling; add or remove one patient; noise multiplier "
            f"{terms.noise_multiplier:g}, gradients clipped to {terms.max_grad_norm:g} "
            f"({terms.clipping})"
        )
    return (
        f"add or remove one patient; noise multiplier {plan.fingerprint.noise_multiplier or 0:g} "
        f"on histograms that one patient changes by {sensitivity(plan):.4g} together"
    )


def _params(params: object) -> str:
    found = dict(params) if isinstance(params, dict) else {}
    shown = ", ".join(f"{name} {_value(value)}" for name, value in found.items())
    return f" ({shown})" if shown else ""


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(_value(part) for part in value)
    return printable(str(value))


def _head(status: Status) -> Text:
    agent = ("agent running", "green") if status.is_running else ("agent not running", "red")
    return Text.assemble(
        (status.name, "bold"), "  ", agent, (f"  {status.when:%Y-%m-%d %H:%M} UTC", "dim")
    )


def _attention(sentences: Sequence[str]) -> RenderableType:
    if not sentences:
        return Text("Nothing needs anybody's attention.", style="green")
    rows = Table.grid(padding=(0, 1))
    for sentence in sentences:
        rows.add_row(Text("!", style="bold yellow"), Text(sentence))
    return rows


def _health(status: Status) -> Table:
    found, rows = status.journal, _rows()
    if found.fault is not None:
        rows.add_row("Journal", Text(f"BROKEN: {found.fault}", style="bold red"))
    else:
        last = "" if found.last is None else f", the last {_ago(found.last, status.when)}"
        text = f"{found.num_entries} entries, all signed and in order{last}"
        rows.add_row("Journal", text if found.num_entries else "nothing was written down yet")
    if found.receipt_when is not None:
        when = _ago(found.receipt_when, status.when)
        text = f"the coordinator signed for entry {found.receipt_index}, {when}"
        rows.add_row("Receipts", text)
    visited = "never" if status.last_visit is None else _ago(status.last_visit, status.when)
    rows.add_row("Coordinator", f"{fingerprint(status.coordinator)}; last visit {visited}")
    if status.certificate_days is not None:
        rows.add_row("Certificate", f"{status.certificate_days} days left")
    rows.add_row("Worker", _worker(status))
    rows.add_row("Disk", f"{size(status.free_mb * 2**20)} free")
    return rows


def _worker(status: Status) -> Text:
    """Return what the process that reads images gave up."""
    found = status.worker
    if found is None:
        return Text("what it gives up is known once the agent has started one")
    given = f"gave up: {', '.join(found.given_up) or 'nothing'}"
    if not found.lacking:
        return Text(given)
    lacking = ", ".join(f"{one.step} ({one.why})" for one in found.lacking)
    return Text.assemble(given, "; ", (f"not allowed here: {lacking}", "bold yellow"))


def fingerprint(key: str) -> str:
    """Return the beginning of a key, in groups that can be read out."""
    return " ".join(key[at : at + 4] for at in range(0, 16, 4))


def _budget(status: Status) -> Iterator[RenderableType]:
    if status.lifetime is None:
        yield Text("the ledger cannot be read", style="bold red")
        return
    rows = Table.grid(padding=(0, 2))
    rows.add_row("all studies", _bar(status.lifetime), _amount(status.lifetime))
    for one in status.studies:
        if one.cost is not None and one.cost.epsilon:
            bar = _bar(one.cost, is_over=one.is_over)
            rows.add_row(Text(one.name, overflow="ellipsis"), bar, _amount(one.cost))
    yield rows
    yield Text(meaning(status.lifetime), style="dim")


def _bar(cost: Cost, *, is_over: bool = False) -> Text:
    done = round(cost.share * BAR)
    high = "red" if cost.share >= 0.9 else "yellow" if cost.share >= 0.7 else "cyan"
    return Text.assemble(("━" * done, "white" if is_over else high), ("─" * (BAR - done), "dim"))


def _amount(cost: Cost) -> Text:
    left = f" of {cost.limit:g}, {downward(cost.left)} left"
    return Text.assemble((upward(cost.epsilon), "bold"), left)


def _studies(found: Sequence[StudyStatus]) -> Iterator[RenderableType]:
    if not found:
        yield Text("none was offered yet", style="dim")
        return
    table = _table("study", "name", "decision", "since", "rounds", "sent")
    for one in found:
        table.add_row(
            one.study[:SHORTER],
            Text(one.name, overflow="ellipsis"),
            _decision(one.status),
            "" if one.when is None else _day(one.when),
            f"{one.num_rounds_done}/{one.num_rounds}",
            size(one.sent_bytes) if one.num_replies else "nothing",
        )
    yield table


def _left(found: Sequence[Left]) -> RenderableType:
    if not found:
        return Text("nothing has left", style="dim")
    table = _table("when (UTC)", "study", "round", "what", "size", "digest")
    for one in found[:NEWEST]:
        table.add_row(
            f"{one.when:%m-%d %H:%M}",
            Text(one.name),
            str(one.round_),
            KINDS[one.kind],
            size(one.size_bytes),
            one.digest[:8],
        )
    return table


KINDS = {
    "train": "an update",
    "evaluate": "metrics",
    "alone": "metrics (alone)",
    "fingerprint": "a fingerprint",
}


def _refused(found: Sequence[Refused]) -> RenderableType:
    table = _table("when (UTC)", "study", "round", "why")
    for one in found[:NEWEST]:
        table.add_row(f"{one.when:%m-%d %H:%M}", Text(one.name), str(one.round_), Text(one.meaning))
    return table


def _title(text: str, beside: str = "") -> Text:
    return Text.assemble((text, "bold"), (f"  {beside}" if beside else "", "dim"))


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for header in headers:
        justify = "right" if header in ("rounds", "round", "sent", "size") else "left"
        is_whole = header in ("study", "name", "decision", "since", "size")
        table.add_column(header, justify=justify, overflow="fold", no_wrap=is_whole)  # type: ignore[arg-type]
    return table


def _rows() -> Table:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", width=LABEL)
    rows.add_column(overflow="fold")
    return rows


def _decision(status: str) -> Text:
    return Text(WORDS[status], style=STYLES[status])


def _word(state: str, done: int, plan: StudyPlan) -> str:
    has_rounds = state != "offered" and plan.fingerprint is None
    return f"{state}, {done}/{plan.training.num_rounds}" if has_rounds else state


def _day(when: datetime) -> str:
    return f"{when:%Y-%m-%d}"


def _ago(when: datetime, now: datetime) -> str:
    seconds = max((now - when).total_seconds(), 0)
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{int(seconds)} seconds ago"

"""A coordinator killed at any instant and started again comes to the same end.

The sites are plain functions here, honest and deterministic; they remember their masks as real
ones do. Run as a script, this file is a coordinator to be killed: it runs the study in the folder
it is given.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from server import report, rounds, store, study
from server.rounds import Ask
from server.simulate import ask_functions
from shared_models import plan as plans
from shared_models.audit import audit_run
from shared_models.contracts import (
    Approval,
    Countersignature,
    Evaluation,
    Refusal,
    RoundOrder,
    SiteReply,
    StudyReport,
)
from shared_models.errors import DocumentError, MachineError, RunError
from shared_models.masking import masked, public_mask_key
from shared_models.plan import StudyPlan
from shared_models.signing import digest as digest_of
from shared_models.signing import public_key, sign
from shared_models.weights import digest
from shared_models.wire import Letter, seal, unseal

NAMES = ("east", "north", "west")
COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"c" * 32)
KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.ljust(32).encode()) for name in NAMES}
MASKS = {name: X25519PrivateKey.from_private_bytes(name.rjust(32).encode()) for name in NAMES}
TRAINING = {"num_rounds": 3, "steps_per_round": 1, "sample_rate": 0.1, "learning_rate": 0.01}
MOMENTUM = {"strategy": {"name": "fedavgm", "params": {"momentum": 0.5}}}
AVERAGED = MOMENTUM | {"rounds": {"quorum": 3, "averaging": 0.9}}
SECURE = {"rounds": {"quorum": 3, "secure_aggregation": True}} | MOMENTUM
PLANS = {"fedavg": {}, "fedavgm": MOMENTUM, "averaged": AVERAGED, "secure": SECURE}
#: How long a site of the script below takes to answer.
SLOWLY_S = 0.15


class Killed(BaseException):
    """Stands for the end of the process."""


class Site:
    """A deterministic site: what it sends follows from the weights and the round."""

    def __init__(self, name: str, *, used: set[str] | None = None, takes_s: float = 0.0) -> None:
        self.name, self.takes_s = name, takes_s
        self.used = set() if used is None else used
        self.orders = list[RoundOrder]()

    def answer(self, letter: Letter) -> Letter:
        order, vector = unseal(letter, key=public_key(COORDINATOR))
        assert isinstance(order, RoundOrder) and vector is not None
        self.orders.append(order)
        time.sleep(self.takes_s)
        label = order.model_dump_json(exclude={"site", "issued_at", "expires_at"})
        if order.participants and label in self.used:
            refused = Refusal(
                study=order.study,
                round_=order.round_,
                kind=order.kind,
                site=self.name,
                code="out-of-order",
            )
            return seal(refused, key=KEYS[self.name])
        self.used.add(label)
        sent = self._update(order, vector, label) if order.kind == "train" else None
        reply = SiteReply(
            study=order.study,
            round_=order.round_,
            kind=order.kind,
            attempt=order.attempt,
            site=self.name,
            num_patients=10 + len(self.name),
            update_digest=None if sent is None else digest(sent),
            is_masked=bool(order.participants),
            evaluation=Evaluation(
                metrics={"auc": float(np.abs(vector).mean())}, num_patients=5, num_images=5
            ),
            seconds=0.5,
        )
        return seal(reply, key=KEYS[self.name], vector=sent)

    def _update(self, order: RoundOrder, vector: Any, label: str) -> Any:
        random = np.random.default_rng([order.round_, NAMES.index(self.name)])
        update = (random.normal(size=vector.shape) * 0.01 - 0.1 * vector).astype(np.float32)
        if not order.participants:
            return update
        peers = [str(c.approval.mask_key) for c in order.participants]
        peers.remove(public_mask_key(MASKS[self.name]))
        exact = (10 + len(self.name)) * update.astype(np.float64)
        return masked(exact, own=MASKS[self.name], peers=peers, label=label)


def sites_of(takes_s: float = 0.0) -> dict[str, Site]:
    return {name: Site(name, takes_s=takes_s) for name in NAMES}


def plan_of(**changes: Any) -> StudyPlan:
    fields: dict[str, Any] = {
        "name": "toy",
        "purpose": "research",
        "coordinator": public_key(COORDINATOR),
        "sites": NAMES,
        "expires": date(2099, 1, 1),
        "task": {"name": "classification", "params": {"classes": ["clear", "opaque"]}},
        "net": {
            "name": "densenet",
            "params": {"init_features": 4, "growth_rate": 4, "block_config": [1]},
        },
        "imaging": [{"name": "resize", "params": {"size": [8, 8]}}],
        "strategy": {"name": "fedavg"},
        "training": TRAINING,
        "rounds": {"quorum": 3},
        "compare_alone": True,
    }
    return StudyPlan.model_validate(fields | changes)


def laid_out(run_dir: Path, plan: StudyPlan) -> Path:
    """Make the run directory of ``plan``, approved by all."""
    (run_dir / "approvals").mkdir(parents=True)
    (run_dir / "plan.toml").write_text(plans.render(plan, sign(plan, key=COORDINATOR)))
    key_file = run_dir.with_name(f"{run_dir.name}.pem")
    key_file.write_bytes(
        COORDINATOR.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    for name in NAMES:
        decide(run_dir, name, "approved")
    keys = {name: store.SiteKeys(signing=public_key(key)) for name, key in KEYS.items()}
    store.write_settings(run_dir, store.RunSettings(signing_key=key_file, sites=keys))
    return run_dir


def decide(run_dir: Path, name: str, decision: Any) -> None:
    """Put a site's decision about the plan of ``run_dir`` on file."""
    approval = Approval(
        study=digest_of(store.read_plan(run_dir).plan),
        site=name,
        who="test",
        when=datetime(2026, 1, 1, tzinfo=UTC),
        decision=decision,
        mask_key=public_mask_key(MASKS[name]) if decision == "approved" else None,
    )
    signed = Countersignature(approval=approval, signature=sign(approval, key=KEYS[name]))
    (run_dir / "approvals" / f"{name}.json").write_text(signed.model_dump_json())


def asking(sites: Mapping[str, Site]) -> Ask:
    return ask_functions({name: site.answer for name, site in sites.items()})


def run(run_dir: Path, sites: Mapping[str, Site]) -> StudyReport:
    return study.run(run_dir, lambda _: asking(sites))


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return all that a run says, but for how long it took and when."""
    told = report.read(run_dir / "report.json").model_dump(exclude={"created", "seconds"})
    told["rounds"] = [{**point, "seconds": 0} for point in told["rounds"]]
    records = [r.model_dump(exclude={"seconds"}) for r in store.read_rounds(run_dir)]
    for record in records if store.read_plan(run_dir).plan.rounds.secure_aggregation else []:
        for reply in record["replies"]:  # a mask of another attempt
            del reply["update_digest"], reply["attempt"]
    model = (run_dir / "model" / "weights.safetensors").read_bytes()
    return {"report": told, "records": records, "model": model}


def check_resumed(run_dir: Path, undisturbed: Path) -> None:
    assert outcome(run_dir) == outcome(undisturbed)
    assert not audit_run(run_dir).failed
    told = report.read(run_dir / "report.json")
    assert told.seconds >= round(sum(r.seconds for r in store.read_rounds(run_dir)), 1) - 0.1
    assert not (run_dir / "failed.txt").exists()
    assert not (run_dir / "checkpoints").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, changes in PLANS.items():
        made[name] = laid_out(tmp_path_factory.mktemp(name) / "run", plan_of(**changes))
        run(made[name], sites_of())
    return made


# --- killed at every step


def killing(real: Callable[..., Any], *, at: int, after: bool) -> Callable[..., Any]:
    """Return ``real``, but for its call number ``at``, before or after which the process ends."""
    calls = iter(range(1000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        is_last = next(calls) == at
        if is_last and not after:
            raise Killed
        result = real(*args, **kwargs)
        if is_last:
            raise Killed
        return result

    return wrapped


#: module, function and number of its call, and whether the process ends before or after it
POINTS = [
    *((rounds, "train_round", n, False) for n in range(3)),
    *((store, "keep_checkpoint", n, after) for n in range(3) for after in (False, True)),
    *((store, "append_round", n, True) for n in range(5)),
    (store, "append_round", 3, False),
    (store, "append_round", 4, False),
    (study, "release", 0, True),
    (report, "render", 0, False),
    (store, "drop_checkpoints", 3, False),
]


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "averaged"])
def test_killed_at_any_point_and_run_again_a_study_ends_as_if_undisturbed(
    name: str, undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = POINTS if name == "averaged" else POINTS[1:10:2]
    for number, (module, function, at, after) in enumerate(points):
        run_dir = laid_out(tmp_path / str(number), plan_of(**PLANS[name]))
        with monkeypatch.context() as patch:
            patch.setattr(module, function, killing(getattr(module, function), at=at, after=after))
            with pytest.raises(Killed):
                run(run_dir, sites_of())
        run(run_dir, sites_of())
        check_resumed(run_dir, undisturbed[name])


def test_what_has_its_line_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of())
    sites = sites_of()
    for _ in range(2):  # after the second round, then after the evaluation that follows the third
        with monkeypatch.context() as patch:
            patch.setattr(store, "append_round", killing(store.append_round, at=1, after=True))
            with pytest.raises(Killed):
                run(run_dir, sites)
    run(run_dir, sites)
    asked = [(order.kind, order.round_, order.attempt) for order in sites["east"].orders]
    trained = [("train", n, 0) for n in range(3)]
    assert asked == [*trained, ("evaluate", 3, 0), ("alone", 3, 0)]


def test_a_torn_line_and_a_checkpoint_without_its_line_are_as_if_never_written(
    undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of(**MOMENTUM))
    monkeypatch.setattr(store, "append_round", killing(store.append_round, at=1, after=True))
    with pytest.raises(Killed):
        run(run_dir, sites_of())
    monkeypatch.undo()
    lines = (run_dir / "rounds.jsonl").read_bytes()
    (run_dir / "rounds.jsonl").write_bytes(lines[:-1])
    assert len(list((run_dir / "checkpoints").iterdir())) == 2
    run(run_dir, sites_of())
    check_resumed(run_dir, undisturbed["fedavgm"])


# --- what is refused, and what is not run again


def interrupted(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    laid_out(run_dir, plan_of(**AVERAGED))
    with monkeypatch.context() as patch:
        patch.setattr(store, "append_round", killing(store.append_round, at=1, after=True))
        with pytest.raises(Killed):
            run(run_dir, sites_of())
    return run_dir


def test_a_checkpoint_of_other_weights_than_recorded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = interrupted(tmp_path / "run", monkeypatch)
    found = store.read_progress(run_dir, store.read_rounds(run_dir))
    assert found is not None
    name = min(found.average)
    other = {**found.average, name: found.average[name] + 1}
    store.keep_checkpoint(run_dir, found._replace(average=other))
    with pytest.raises(DocumentError, match=r"does not hold the weights .* restore both"):
        run(run_dir, sites_of())
    assert "restore both from a copy" in (run_dir / "failed.txt").read_text()


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file"])
def test_a_checkpoint_that_is_missing_or_unreadable_is_refused(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = interrupted(tmp_path / "run", monkeypatch)
    file = run_dir / "checkpoints" / "00001.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DocumentError, match="restore it from a copy"):
        run(run_dir, sites_of())


def test_rounds_of_another_plan_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = interrupted(tmp_path / "run", monkeypatch)
    other = laid_out(tmp_path / "other", plan_of(seed=7))
    (other / "rounds.jsonl").write_bytes((run_dir / "rounds.jsonl").read_bytes())
    with pytest.raises(DocumentError, match="another plan"):
        run(other, sites_of())


def test_a_finished_study_is_not_run_again(undisturbed: dict[str, Path]) -> None:
    run_dir = undisturbed["fedavg"]
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    sites = sites_of()
    assert run(run_dir, sites) == report.read(run_dir / "report.json")
    assert not any(site.orders for site in sites.values())
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before


def test_a_study_that_failed_goes_on_and_its_failure_is_forgotten(
    undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of())
    sites = sites_of()

    def lost(letters: Mapping[str, Letter], deadline_s: float) -> Iterator[Any]:
        for site, said in asking(sites)(letters, deadline_s):
            yield site, None if '"round_":1' in letters[site].document else said

    with pytest.raises(RunError, match="round 1: 0 of 3 sites"):
        study.run(run_dir, lambda _: lost)
    assert (run_dir / "failed.txt").exists()
    run(run_dir, sites)
    check_resumed(run_dir, undisturbed["fedavg"])


# --- who takes part, from one round to the next


def refuse(run_dir: Path) -> None:
    decide(run_dir, "west", "refused")


def remove(run_dir: Path) -> None:
    (run_dir / "approvals" / "west.json").unlink()


def revoke(run_dir: Path) -> None:
    settings = store.read_settings(run_dir)
    left = {name: key for name, key in settings.sites.items() if name != "west"}
    store.write_settings(run_dir, settings.model_copy(update={"sites": left}))


def acting(
    sites: Mapping[str, Site], act: Callable[[], Any], *, in_round: int
) -> Callable[[Any], Ask]:
    """Return what reaches ``sites``, and lets ``act`` happen while orders to train are out."""

    def ask(letters: Mapping[str, Letter], deadline_s: float) -> Iterator[Any]:
        for site, said in asking(sites)(letters, deadline_s):
            order = json.loads(letters[site].document)
            if (order["kind"], order["round_"]) == ("train", in_round):
                act()
            yield site, said

    return lambda _: ask


@pytest.mark.parametrize("act", [refuse, remove, revoke])
def test_a_site_that_approves_no_longer_gets_no_further_order_and_is_named(
    act: Callable[[Path], None], tmp_path: Path
) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of(rounds={"quorum": 2}))
    sites, acts = sites_of(), iter([lambda: act(run_dir)])
    study.run(run_dir, acting(sites, lambda: next(acts, lambda: None)(), in_round=1))
    assert [(o.kind, o.round_) for o in sites["west"].orders] == [("train", 0), ("train", 1)]
    refused = [{r.site: r.code for r in record.refusals} for record in store.read_rounds(run_dir)]
    assert refused == [{}, {}, *[{"west": "not-approved"}] * 3]
    west = {site.name: site for site in report.read(run_dir / "report.json").sites}["west"]
    assert [refusal.code for refusal in west.refusals] == ["not-approved"] * 3


def test_a_site_that_approves_later_takes_part_from_the_next_round(tmp_path: Path) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of(rounds={"quorum": 2}))
    remove(run_dir)
    sites = sites_of()
    study.run(run_dir, acting(sites, lambda: decide(run_dir, "west", "approved"), in_round=0))
    assert next((o.kind, o.round_) for o in sites["west"].orders) == ("train", 1)
    assert not audit_run(run_dir).failed


def test_too_few_approvals_end_the_run_and_it_goes_on_once_there_are_enough(
    undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of())
    sites = sites_of()
    with pytest.raises(RunError, match=r"2 sites have approved .* needs 3; ask .*\nwest: no appro"):
        study.run(run_dir, acting(sites, lambda: refuse(run_dir), in_round=1))
    assert store.read_failure(run_dir)[0].startswith("2 sites have approved")
    assert max(order.round_ for order in sites["east"].orders) == 1
    decide(run_dir, "west", "approved")
    run(run_dir, sites)
    check_resumed(run_dir, undisturbed["fedavg"])


def test_an_expired_plan_ends_the_run_before_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of())
    sites = sites_of()

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2099, 1, 2, tzinfo=tz)

    def expire() -> None:
        monkeypatch.setattr(study, "datetime", Later)

    with pytest.raises(RunError, match=r"the plan expired on 2099-01-01, .* approve a new plan"):
        study.run(run_dir, acting(sites, expire, in_round=1))
    assert len(store.read_rounds(run_dir)) == 2
    assert max(order.round_ for order in sites["east"].orders) == 1


# --- one process at a time


def test_two_coordinators_do_not_run_one_study_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_S", 0.1)
    run_dir = laid_out(tmp_path / "run", plan_of())
    sites = sites_of()
    with (
        store.lock(run_dir),
        pytest.raises(MachineError, match=r"another coordinator runs .*; stop it, or wait"),
    ):
        run(run_dir, sites)
    assert not (run_dir / "failed.txt").exists(), "it is not for a stranger to say so"
    assert not any(site.orders for site in sites.values())
    assert not store.is_running(run_dir)


def test_a_process_that_dies_of_something_else_leaves_no_failure_and_no_lock(
    undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of())

    def dying() -> None:
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        study.run(run_dir, acting(sites_of(), dying, in_round=1))
    assert store.read_failure(run_dir) == ()
    run(run_dir, sites_of())
    check_resumed(run_dir, undisturbed["fedavg"])


# --- secure aggregation


@pytest.mark.parametrize("answered", [1, 3])
def test_a_masked_round_is_asked_again_under_an_attempt_never_used(
    answered: int, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """Killed when so many sites have answered round 1, and their masks are used."""
    run_dir = laid_out(tmp_path / "run", plan_of(**SECURE))
    sites = sites_of()

    def dying(letters: Mapping[str, Letter], deadline_s: float) -> Iterator[Any]:
        for number, (site, said) in enumerate(asking(sites)(letters, deadline_s), start=1):
            yield site, said
            if number == answered and '"round_":1' in letters[site].document:
                raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            study.run(run_dir, lambda _: dying)
    run(run_dir, sites)
    check_resumed(run_dir, undisturbed["secure"])
    trained = [order for order in sites["east"].orders if order.kind == "train"]
    assert [(o.round_, o.attempt) for o in trained] == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    noted = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    assert [(a["round_"], a["attempt"]) for a in noted] == [(o.round_, o.attempt) for o in trained]


def test_a_round_without_masks_is_asked_again_as_the_same_attempt(tmp_path: Path) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of())
    sites = sites_of()

    def dying(letters: Mapping[str, Letter], deadline_s: float) -> Iterator[Any]:
        yield next(asking(sites)(letters, deadline_s))
        raise Killed

    with pytest.raises(Killed):
        study.run(run_dir, lambda _: dying)
    run(run_dir, sites)
    first, again = sites["east"].orders[:2]
    times = {"issued_at", "expires_at"}
    assert first.model_dump(exclude=times) == again.model_dump(exclude=times)
    assert not (run_dir / "attempts.jsonl").exists()


# --- a real process and kill -9


def started(run_dir: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, __file__, str(run_dir)], cwd=root)


def kill_at(run_dir: Path, *, lines: int, later_s: float) -> None:
    """Start the coordinator and kill it ``later_s`` after that many lines stand."""
    process = started(run_dir)
    file, until = run_dir / "rounds.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    time.sleep(later_s)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


def test_a_process_killed_with_sigkill_amid_its_rounds_comes_to_the_same_weights(
    undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = laid_out(tmp_path / "run", plan_of(**AVERAGED))
    kill_at(run_dir, lines=1, later_s=0.2)
    assert not (run_dir / "report.json").exists()
    kill_at(run_dir, lines=2, later_s=0.0)
    assert started(run_dir).wait(120) == 0
    check_resumed(run_dir, undisturbed["averaged"])


if __name__ == "__main__":
    run(Path(sys.argv[1]), sites_of(SLOWLY_S))

"""Layers that stay in the hospital: where training begins, what of it leaves, what is kept."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import personal
from client.answer import Site, answer
from client.work import Job, Outcome
from shared_models import nets
from shared_models.contracts import Refusal, RoundOrder, SiteReply
from shared_models.errors import MachineError
from shared_models.nets.base import weights_of
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, public_key, sign
from shared_models.weights import (
    Array,
    Flat,
    Weights,
    flat_of,
    flatten,
    schema_of,
    unflatten,
    vector_of,
)
from shared_models.weights import digest as digest_of
from shared_models.wire import Letter, seal, unseal

NORM = "features.norm0"
HERE = {"training.personal": [NORM]}
OPEN = HERE | {"privacy": None}


class Spied:
    """A trainer that notes the weights each job began with, and trains."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.began = trainer, list[tuple[str, Array]]()

    def __call__(self, job: Job, weights: Flat | None) -> tuple[Outcome, Array | None]:
        if weights is not None:
            self.began.append((job.step, vector_of(weights)))
        found: tuple[Outcome, Array | None] = self.trainer(job, weights)
        return found


class Ward:
    """A hospital that approved a plan whose first normalization stays there."""

    def __init__(self, hospital: Any, plan: StudyPlan, coordinator: Any) -> None:
        from client import config as configs
        from client import studies

        config = configs.read(hospital.config_file)
        policy = config.policy.model_copy(update={"allow_without_privacy": True})
        self.config = config.model_copy(update={"policy": policy})
        self.plan, self.coordinator, self.key = plan, coordinator, hospital.key
        signed = SignedPlan(plan, sign(plan, key=coordinator))
        studies.approve(signed, self.config, key=hospital.key, who="Dr. Reed")
        net = nets.make(plan.net.name, plan.net.params, seed=1, num_outputs=2)
        self.schema = schema_of(weights_of(net))
        self.sent = flatten(weights_of(net))
        self.start_agent()

    def start_agent(self) -> None:
        self.site = Site(self.config, key=self.key)
        self.spied = self.site.trainer = Spied(self.site.trainer)

    def letter(self, kind: str = "train", round_: int = 0) -> Letter:
        return seal(
            order_of(self.plan, self.sent, kind, round_), key=self.coordinator, vector=self.sent
        )

    def ask(self, kind: str = "train", round_: int = 0) -> tuple[Any, dict[str, Array]]:
        """Return what is said, and the update by name; none by no update."""
        said, vector = unseal(
            answer(self.letter(kind, round_), self.site), key=public_key(self.key)
        )
        return said, {} if vector is None else unflatten(vector, self.schema)

    def began(self) -> dict[str, Array]:
        return unflatten(self.spied.began[-1][1], self.schema)

    @property
    def folder(self) -> Path:
        return self.config.state_dir / personal.FOLDER / digest(self.plan)


def order_of(plan: StudyPlan, sent: Array, kind: str = "train", round_: int = 0) -> RoundOrder:
    now = datetime.now(UTC)
    return RoundOrder.model_validate(
        {
            "study": digest(plan),
            "round_": round_,
            "kind": kind,
            "site": "north",
            "weights_digest": digest_of(sent),
            "issued_at": now,
            "expires_at": now.replace(year=now.year + 1),
        }
    )


@pytest.fixture
def ward(hospital, plan_of, coordinator_key) -> Ward:
    return Ward(hospital, plan_of(OPEN), coordinator_key)


def of_norm(weights: Weights) -> dict[str, Array]:
    return {name: value for name, value in weights.items() if name.startswith(NORM)}


@pytest.mark.parametrize("changes", [OPEN, HERE])
def test_nothing_trained_of_a_layer_that_stays_is_in_the_update(
    changes: dict[str, Any], hospital, plan_of, coordinator_key
) -> None:
    ward = Ward(hospital, plan_of(changes), coordinator_key)
    said, update = ward.ask()
    assert isinstance(said, SiteReply)
    assert of_norm(update)
    assert not any(value.any() for value in of_norm(update).values())
    assert all(value.any() for name, value in update.items() if not name.startswith(NORM))
    ward.ask(round_=1)
    sent = unflatten(ward.sent, ward.schema)
    moved = {name: value - sent[name] for name, value in ward.began().items()}
    assert all(value.any() for value in of_norm(moved).values())
    assert not any(value.any() for name, value in moved.items() if not name.startswith(NORM))


def test_a_site_that_was_killed_goes_on_with_the_layers_it_had(ward: Ward) -> None:
    ward.ask()
    ward.start_agent()
    ward.ask("evaluate", round_=3)
    step, vector = ward.spied.began[-1]
    assert step == "evaluate"
    assert any(
        (value != sent).any()
        for value, sent in zip(
            of_norm(unflatten(vector, ward.schema)).values(),
            of_norm(unflatten(ward.sent, ward.schema)).values(),
            strict=True,
        )
    )


def test_a_round_asked_again_begins_with_the_layers_it_began_with(ward: Ward) -> None:
    ward.ask()
    _, first = ward.ask(round_=1)
    began = ward.began()
    for file in (ward.config.state_dir / "outbox").iterdir():  # killed before it was kept
        file.unlink()
    ward.start_agent()
    _, again = ward.ask(round_=1)
    assert all(np.array_equal(began[name], value) for name, value in ward.began().items())
    assert all(np.array_equal(first[name], value) for name, value in again.items())


def test_training_alone_begins_with_what_was_sent(ward: Ward) -> None:
    ward.ask()
    ward.ask("alone", round_=3)
    assert np.array_equal(ward.spied.began[-1][1], ward.sent)
    assert [file.name for file in ward.folder.iterdir()] == ["0.safetensors"]


def test_the_layers_of_the_last_two_rounds_are_kept_and_only_their_owner_reads_them(
    ward: Ward,
) -> None:
    for round_ in range(3):
        ward.ask(round_=round_)
    files = sorted(ward.folder.iterdir())
    assert [file.name for file in files] == ["1.safetensors", "2.safetensors"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


def of_another_net(file: Path) -> None:
    from safetensors.numpy import save_file

    save_file({f"{NORM}.weight": np.ones(99, np.float32)}, file)


@pytest.mark.parametrize("damage", [cut_short, of_another_net])
def test_kept_layers_that_cannot_be_read_stop_the_round(damage: Any, ward: Ward) -> None:
    ward.ask()
    damage(ward.folder / "0.safetensors")
    said, _ = ward.ask(round_=1)
    assert isinstance(said, Refusal)
    assert said.code == "failed"
    with pytest.raises(MachineError, match="restore the folder personal"):
        personal.begin(
            flat_of(ward.sent),
            order_of(ward.plan, ward.sent, round_=1),
            plan=ward.plan,
            schema=ward.schema,
            state_dir=ward.config.state_dir,
        )


def test_layers_that_cannot_be_kept_let_no_reply_leave(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(personal, "replace", full)
    said, _ = ward.ask()
    assert isinstance(said, Refusal)
    assert not (ward.config.state_dir / "outbox").exists()

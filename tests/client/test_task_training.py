"""Each task's own way of training, in the one loop that all share, on made-up patients."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from client.dp import Batch
from client.train import ENGINES, Performance, train
from shared_models import nets
from shared_models.cohort import Patient
from shared_models.evaluation import evaluate, evaluate_baselines
from shared_models.randomness import seeded
from shared_models.tasks import Box, Task, anomaly, detection, embedding, generation, localization

# --- localization

SHAPE = (12, 14, 16)
LOCALIZATION = localization.make(
    classes=("spot", "rest"), size=5, stride=2, shift=3, num_moves=20, tolerance_mm=3
)


def marked(place: tuple[int, int, int], *, number: int = 1) -> tuple[Tensor, Tensor]:
    """Return an image that grows brighter towards ``place``, and its label map."""
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in SHAPE), indexing="ij")
    distance = torch.stack([a - p for a, p in zip(axes, place, strict=True)]).norm(dim=0)
    target = torch.zeros(SHAPE, dtype=torch.long)
    target[place] = number
    return (-distance / 4)[None], target


def spots(count: int) -> list[Patient]:
    made = []
    for n in range(count):
        image, target = marked((5 + n % 3, 6 + n % 2, 8 - n % 3))
        made.append(Patient(image[None], target[None], ((1.0, 1.0, 1.0),)))
    return made


def test_an_agent_learns_to_find_it_and_beats_the_mean_position(plan_of) -> None:
    plan = plan_of(
        {
            "privacy": None,
            "training.num_rounds": 1,
            "training.steps_per_round": 120,
            "training.sample_rate": 1.0,
            "training.views": 16,
            "training.optimizer": "adamw",
            "training.learning_rate": 0.003,
        }
    )
    params = {"spatial_dims": 3, "channels": [8], "hidden": 32}
    net = nets.make("walker", params, seed=0, num_outputs=6)
    train(
        net,
        spots(4),
        plan=plan,
        task=LOCALIZATION,
        rounds=[0],
        randomness=seeded(0),
        performance=Performance(most_images=256),
    )
    found = evaluate(net, spots(12), task=LOCALIZATION).metrics
    guessed = evaluate_baselines(spots(12), task=LOCALIZATION)["mean position"].metrics
    assert found["found"] > 0.7 > guessed["found"]
    assert found["distance_mm"] < 3 < guessed["distance_mm"]


# --- generation

GENERATION = generation.make(classes=("dark", "bright"), num_generated=16)
PARAMS = {"size": 16, "channels": 8, "latent": 8}


def pair() -> nn.Module:
    return nets.make("gan", PARAMS, seed=0, num_outputs=2)


def patients(count: int, *, seed: int = 0) -> list[Patient]:
    """Return pictures with a light half: the upper one, or the lower one in the second class."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        image = 0.2 + 0.1 * torch.rand((1, 1, 16, 16), generator=generator)
        image[..., 8 * (n % 2) : 8 * (n % 2) + 8, :] += 0.6
        made.append(Patient(image, torch.tensor([n % 2]), ((1.0, 1.0),)))
    return made


@pytest.mark.parametrize("is_private", [False, True])
def test_the_generator_is_trained_without_seeing_a_patient(is_private: bool, plan_of) -> None:
    """Its gradient is the free loss's alone; with patients or without, it is the same."""
    plan = plan_of(
        {"training.steps_per_round": 1, "training.optimizer": "sgd", "training.sample_rate": 1.0}
        | ({} if is_private else {"privacy": None})
    )
    after = []
    for shown in (patients(8), patients(8, seed=1)):
        net = pair()
        train(
            net,
            shown,
            plan=plan,
            task=GENERATION,
            rounds=[0],
            randomness=seeded(1),
            performance=Performance(),
            noise_multiplier=1.0 if is_private else 0.0,
        )
        after.append({n: p.detach().clone() for n, p in net.named_parameters()})
    before = dict(pair().named_parameters())
    for name, value in after[0].items():
        if name.startswith("generator."):
            assert torch.equal(value, after[1][name])
    assert not torch.equal(after[0]["generator.0.weight"], before["generator.0.weight"]), (
        "the generator did not move"
    )
    moved = after[0]["discriminator.0.weight"] - after[1]["discriminator.0.weight"]
    assert float(moved.abs().max()) > 0


def test_pictures_of_each_class_are_learned(plan_of) -> None:
    plan = plan_of(
        {
            "privacy": None,
            "training.num_rounds": 1,
            "training.steps_per_round": 150,
            "training.sample_rate": 1.0,
            "training.optimizer": "adamw",
            "training.learning_rate": 0.003,
        }
    )
    net, test = pair(), patients(40, seed=2)
    before = evaluate(net, test, task=GENERATION).metrics
    train(
        net,
        patients(24),
        plan=plan,
        task=GENERATION,
        rounds=[0],
        randomness=seeded(0),
        performance=Performance(),
    )
    after = evaluate(net, test, task=GENERATION).metrics
    assert after["frechet"] < 0.8 * before["frechet"]
    assert after["auc_synthetic"] > 0.9


# --- embedding and anomaly

EMBEDDING = embedding.make(classes=("dark", "bright"), divergence_weight=0.01)
ANOMALY = anomaly.make(classes=("dark", "bright"))
SMALL = {"size": 16, "channels": [4, 8], "latent": 4}


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", [EMBEDDING, ANOMALY], ids=lambda task: task.name)
def test_a_patient_who_teaches_nothing_is_one_unit_like_any_other(
    task: Task, engine: str, clipping: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The sum is that of a plain loop; a gradient of zero is finite, and nothing is slow for it."""
    net = nets.make(
        "autoencoder", SMALL | {"variational": task is EMBEDDING}, seed=0, num_outputs=1
    )
    shown = [(p.images[0], p.targets[0]) for p in patients(6)]
    views = [task.view(*pair, seeded(n), True) for n, pair in enumerate(shown)]
    images, targets = (torch.stack(part) for part in zip(*views, strict=True))
    owner = torch.tensor([0, 1, 2, 2, 3, 4])  # the third has both classes
    expected = [torch.zeros_like(p) for p in net.parameters()]
    norms = []
    for patient in range(5):
        ours = owner == patient
        mean = task.loss(net(images[ours]), targets[ours]).mean()
        found = torch.autograd.grad(mean, list(net.parameters()))
        norm = torch.stack([g.double().norm() for g in found]).norm()
        factor = 0.05 / (norm + 0.01) if clipping == "automatic" else min(1.0, 0.05 / norm)
        expected = [e + factor * g for e, g in zip(expected, found, strict=True)]
        norms.append(float(norm))
    assert (0.0 in norms) == (task is ANOMALY)
    with (
        caplog.at_level(logging.WARNING),
        ENGINES[engine](net, task.loss, max_grad_norm=0.05, clipping=clipping) as gradient_of,
    ):
        sums = gradient_of(Batch(images, targets, owner, 5))
    assert sums.num_non_finite == 0
    assert "slow" not in caplog.text
    for total, wanted in zip(sums.gradients, expected, strict=True):
        assert torch.allclose(total, wanted.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("task", [EMBEDDING, ANOMALY], ids=lambda task: task.name)
def test_pictures_are_given_back_and_what_was_never_shown_is_not(task: Task, plan_of) -> None:
    plan = plan_of(
        {
            "privacy": None,
            "training.num_rounds": 1,
            "training.steps_per_round": 80,
            "training.sample_rate": 1.0,
            "training.optimizer": "adamw",
            "training.learning_rate": 0.01,
        }
    )
    net = nets.make(
        "autoencoder", SMALL | {"variational": task is EMBEDDING}, seed=0, num_outputs=1
    )
    test, shown = patients(20, seed=2), patients(12)
    if task is ANOMALY:  # the other half is normal: before training the residual ranks all wrong
        test, shown = ([p._replace(targets=1 - p.targets) for p in part] for part in (test, shown))
    before = evaluate(net, test, task=task).metrics[task.headline]
    train(
        net,
        shown,
        plan=plan,
        task=task,
        rounds=[0],
        randomness=seeded(0),
        performance=Performance(),
    )
    after = evaluate(net, test, task=task).metrics[task.headline]
    assert after > max(0.7, before + 0.2)


# --- detection

DETECTION = detection.make(classes=("wide", "high"), most_boxes=4)


def with_boxes(count: int, *, seed: int) -> list[Patient]:
    """Return dark pictures with bright things on them, wider than high or higher than wide."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        image, boxes = 0.1 * torch.rand((1, 1, 32, 48), generator=generator), list[Box]()
        for part in range(number % 3):
            width, height = ((12, 6), (6, 12))[(number + part) % 2]
            x = 24 * part + int(torch.randint(24 - width, (1,), generator=generator))
            y = int(torch.randint(32 - height, (1,), generator=generator))
            image[..., y : y + height, x : x + width] += 1
            name = "wide" if width > height else "high"
            boxes.append(Box(name, (x, y), (x + width, y + height)))
        target = DETECTION.encode_boxes(boxes, (32, 48))
        made.append(Patient(image, target[None], ((1.0, 1.0),)))
    return made


def test_boxes_are_found_and_move_with_their_images(plan_of) -> None:
    plan = plan_of(
        {
            "privacy": None,
            "training.num_rounds": 1,
            "training.steps_per_round": 60,
            "training.sample_rate": 0.5,
            "training.flips": True,
            "training.shift": 4,
            "training.optimizer": "adamw",
            "training.learning_rate": 0.01,
        }
    )
    params = {"stem": [8, 16], "channels": [16, 16]}
    net = nets.make("centernet", params, seed=0, num_outputs=6)
    test = with_boxes(12, seed=1)
    before = evaluate(net, test, task=DETECTION).metrics
    train(
        net,
        with_boxes(24, seed=0),
        plan=plan,
        task=DETECTION,
        rounds=[0],
        randomness=seeded(0),
        performance=Performance(),
    )
    after = evaluate(net, test, task=DETECTION).metrics
    assert after["map50"] > 0.8 > 0.2 > before["map50"]
    assert after["froc"] > 0.8

"""Who is drawn, what is stepped along, and what can be repeated by whom."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from client.adam import AdamCorrected
from client.dp import opacus_engine, trainable
from client.noise import secure
from client.train import (
    ENGINES,
    Performance,
    Trained,
    _engine,
    _optimizer,
    draw,
    freeze,
    learning_rate,
    randomness_of,
    train,
)
from shared_models import nets
from shared_models.cohort import Patient
from shared_models.plan import StudyPlan, Training
from shared_models.randomness import Randomness, seeded
from shared_models.tasks import Free, classification, moved_map

TASK = classification.make(classes=("clear", "opaque"))
TERMS = Training(num_rounds=3, steps_per_round=2, sample_rate=0.3, learning_rate=0.1)
NUM_DRAWS = 4000


def patients_of(counts: list[int], *, maps: bool = False) -> list[Patient]:
    """Return patients of ``counts`` images; each pixel tells its patient, image and column."""
    made = []
    for patient, count in enumerate(counts):
        columns = torch.arange(4.0).expand(count, 1, 3, 4)
        number = torch.arange(count).view(count, 1, 1, 1)
        images = 1000.0 * patient + 10 * number + columns
        targets = images[:, 0].long() if maps else torch.full((count,), patient % 2)
        made.append(Patient(images, targets, ((1.0, 1.0),) * count))
    return made


def noise_patients(num_patients: int = 6) -> list[Patient]:
    generator = torch.Generator().manual_seed(0)
    return [
        Patient(
            torch.randn((2, 1, 16, 16), generator=generator) + i % 2,
            torch.full((2,), i % 2),
            ((1.0, 1.0),) * 2,
        )
        for i in range(num_patients)
    ]


def net_of(plan: StudyPlan) -> nn.Module:
    return nets.make(plan.net.name, plan.net.params, seed=1, num_outputs=2)


def one_round(
    net: nn.Module,
    plan: StudyPlan,
    randomness: Randomness,
    *,
    patients: list[Patient] | None = None,
    round_: int = 0,
    most_images: int = 32,
) -> Trained:
    return train(
        net,
        patients or noise_patients(),
        plan=plan,
        task=TASK,
        rounds=[round_],
        randomness=randomness,
        performance=Performance(most_images=most_images),
        noise_multiplier=0.0 if plan.privacy is None else plan.privacy.noise_multiplier,
    )


def trained(plan: StudyPlan, randomness: Randomness, *, most_images: int = 32) -> torch.Tensor:
    """Return the weights after one round, as one vector."""
    net = net_of(plan)
    one_round(net, plan, randomness, most_images=most_images)
    return weights(net)


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainable(net)])


def nobody(n: int) -> np.ndarray:
    return np.ones(n)


def everybody(n: int) -> np.ndarray:
    return np.zeros(n)


# --- drawing


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Return who was drawn in many draws of 12 patients: bool (draws, patients)."""
    patients, randomness = patients_of([1] * 12), seeded(7)
    found = np.zeros((NUM_DRAWS, len(patients)), dtype=bool)
    for row in found:
        batch = draw(patients, terms=TERMS, randomness=randomness)
        row[(batch.images[:, 0, 0, 0] // 1000).long().numpy()] = True
    return found


def test_the_number_of_patients_drawn_is_binomial(drawn: np.ndarray) -> None:
    counts = np.bincount(drawn.sum(axis=1), minlength=13)
    expected = NUM_DRAWS * stats.binom(12, 0.3).pmf(np.arange(13))
    counts, expected = (
        np.append(counts[:8], counts[8:].sum()),
        np.append(expected[:8], expected[8:].sum()),
    )
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


def test_the_number_drawn_varies_as_poisson_sampling_does_and_batches_of_fixed_size_do_not() -> (
    None
):
    """What shuffling accounted as Poisson would show: a dispersion of 0 where 1 belongs."""
    patients, source, num_draws = patients_of([1] * 100), secure(), 1000
    counts = [draw(patients, terms=TERMS, randomness=source).num_patients for _ in range(num_draws)]
    dispersion = np.var(counts) / (100 * 0.3 * 0.7)
    assert abs(dispersion - 1) < 6 * np.sqrt(2 / num_draws)
    assert abs(np.mean(counts) - 30) < 6 * np.sqrt(100 * 0.3 * 0.7 / num_draws)


def test_a_draw_drops_nobody_however_many_there_are() -> None:
    patients = patients_of([1] * 500)
    batch = draw(patients, terms=TERMS, randomness=Randomness(everybody, nobody))
    assert batch.num_patients == len(batch.owner.unique()) == 500


def test_every_patient_is_drawn_with_the_sample_rate(drawn: np.ndarray) -> None:
    shares = drawn.mean(axis=0)
    assert np.abs(shares - 0.3).max() < 4 * np.sqrt(0.3 * 0.7 / NUM_DRAWS)


def test_patients_are_drawn_independently_of_each_other(drawn: np.ndarray) -> None:
    for one, other in combinations(drawn.T, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(NUM_DRAWS)


def test_draws_do_not_depend_on_the_draw_before(drawn: np.ndarray) -> None:
    for patient in drawn.T:
        assert abs(np.corrcoef(patient[:-1], patient[1:])[0, 1]) < 4.5 / np.sqrt(NUM_DRAWS)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 5),
    st.floats(0.01, 1),
    st.integers(0, 2**32),
)
def test_no_patient_gives_more_images_than_images_per_patient(
    counts: list[int], cap: int, rate: float, seed: int
) -> None:
    terms = TERMS.model_copy(update={"images_per_patient": cap, "sample_rate": rate})
    patients = patients_of(counts)
    batch = draw(patients, terms=terms, randomness=seeded(seed))
    first = batch.images[:, 0, 0, 0]
    whose = (first // 1000).long()
    assert len(first.unique()) == len(first)  # no image twice
    assert batch.num_patients == len(whose.unique())
    assert torch.equal(whose.unique(return_inverse=True)[1], batch.owner)
    assert torch.equal(batch.targets, whose % 2)
    given_each = torch.bincount(whose, minlength=len(counts)).tolist()
    assert all(g in (0, min(cap, count)) for g, count in zip(given_each, counts, strict=True))


def test_every_image_of_a_patient_has_the_same_chance() -> None:
    patients, randomness = patients_of([5]), seeded(2)
    terms = TERMS.model_copy(update={"images_per_patient": 2, "sample_rate": 1.0})
    given_ = np.zeros(5)
    for _ in range(NUM_DRAWS):
        first = draw(patients, terms=terms, randomness=randomness).images[:, 0, 0, 0]
        given_[(first // 10).long().numpy()] += 1
    assert stats.chisquare(given_).pvalue > 1e-3


@pytest.mark.parametrize("maps", [False, True])
def test_an_empty_draw_has_the_shapes_of_images(maps: bool) -> None:
    batch = draw(patients_of([2, 3], maps=maps), terms=TERMS, randomness=Randomness(nobody, nobody))
    assert batch.num_patients == 0
    assert batch.images.shape == (0, 1, 3, 4)
    assert batch.targets.shape == ((0, 3, 4) if maps else (0,))
    assert batch.owner.dtype == torch.int64


@pytest.mark.parametrize("flips", [False, True])
def test_flips_turn_label_maps_with_their_images(flips: bool) -> None:
    terms = TERMS.model_copy(update={"flips": flips, "sample_rate": 1.0})
    patients, randomness, is_flipped = patients_of([2, 3], maps=True), seeded(1), []
    for _ in range(200):
        batch = draw(patients, terms=terms, randomness=randomness)
        assert torch.equal(batch.images[:, 0].long(), batch.targets)
        for steps in batch.images.diff(dim=-1):
            is_flipped.append(bool((steps == -1).all()))
            assert is_flipped[-1] or (steps == 1).all()
    assert 400 < sum(is_flipped) < 600 if flips else not any(is_flipped)


def test_a_target_that_is_no_map_moves_as_its_task_says() -> None:
    """Told by the task's own function, which is given what was done to the image."""
    terms = TERMS.model_copy(update={"flips": True, "shift": 2, "sample_rate": 1.0})
    patients, told = patients_of([2, 3], maps=True), []

    def moved(
        target: torch.Tensor, is_mirrored: bool, steps: tuple[int, ...], size: tuple[int, ...]
    ) -> torch.Tensor:
        told.append((is_mirrored, *steps))
        assert size == tuple(target.shape)
        return moved_map(target, is_mirrored, steps, size)

    for seed in range(40):
        batch = draw(patients, terms=terms, randomness=seeded(seed), moved=moved)
        assert torch.equal(batch.images[:, 0].long(), batch.targets)
    assert {is_mirrored for is_mirrored, *_ in told} == {False, True}
    assert {step for _, *steps in told for step in steps} == {-2, -1, 0, 1, 2}


def test_each_image_is_flipped_by_its_own_chance() -> None:
    terms = TERMS.model_copy(update={"flips": True, "sample_rate": 1.0})
    patients, randomness = patients_of([2, 3]), seeded(1)
    batches = [draw(patients, terms=terms, randomness=randomness).images for _ in range(2000)]
    flipped = np.array([(images.diff(dim=-1) < 0).all((1, 2, 3)).numpy() for images in batches])
    for one, other in combinations(flipped.T, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(len(flipped))


def test_flips_leave_the_patients_own_images_alone() -> None:
    terms = TERMS.model_copy(update={"flips": True, "sample_rate": 1.0})
    patients = patients_of([2, 3])
    before = copy.deepcopy(patients)
    for seed in range(10):
        batch = draw(patients, terms=terms, randomness=seeded(seed))
        assert batch.targets.tolist() == [0, 0, 1, 1, 1]
    assert all(torch.equal(a.images, b.images) for a, b in zip(before, patients, strict=True))


# --- what can be repeated


def test_without_privacy_the_same_seed_gives_the_same_weights_bit_for_bit(plan_of) -> None:
    plan = plan_of({"privacy": None, "training.flips": True, "training.optimizer": "adamw"})
    results = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        randomness = randomness_of(plan, site="north", round_=0, purpose="train")
        results.append(trained(plan, randomness))
    assert torch.equal(*results)
    assert not torch.equal(results[0], weights(net_of(plan)))


@pytest.mark.parametrize(
    "other",
    [{"site": "south"}, {"round_": 1}, {"purpose": "alone"}],
    ids=["site", "round", "purpose"],
)
def test_another_site_round_or_purpose_draws_otherwise(other: dict[str, Any], plan_of) -> None:
    plan = plan_of({"privacy": None})
    asked = {"site": "north", "round_": 0, "purpose": "train"}
    one, two = randomness_of(plan, **asked), randomness_of(plan, **asked | other)
    assert not np.array_equal(one.uniform(8), two.uniform(8))


def test_another_seed_draws_otherwise(plan_of) -> None:
    one, two = (
        randomness_of(plan_of({"privacy": None, "seed": s}), site="a", round_=0, purpose="train")
        for s in (1, 2)
    )
    assert not np.array_equal(one.uniform(8), two.uniform(8))


def test_private_runs_of_one_plan_differ_in_draws_and_noise(plan_of) -> None:
    plan = plan_of()
    sources = [randomness_of(plan, site="north", round_=0, purpose="train") for _ in range(2)]
    assert not np.array_equal(*[s.uniform(8) for s in sources])
    assert not np.array_equal(*[s.normal(8) for s in sources])
    assert not torch.equal(*[trained(plan, s) for s in sources])


# --- the step


def test_an_empty_draw_still_takes_a_step_of_pure_noise(plan_of) -> None:
    plan = plan_of({"training.steps_per_round": 1, "net.params": {}})
    net = net_of(plan)
    before = weights(net)
    result = one_round(net, plan, Randomness(nobody, seeded(4).normal))
    # sgd: rate times noise, whose deviation is multiplier times norm over the expected 0.5 * 6
    steps = ((weights(net) - before) / (0.05 * 2.0 * 1.0 / 3)).double().numpy()
    assert len(steps) > 3000
    assert 1e-3 < stats.chi2(len(steps)).cdf(float((steps**2).sum())) < 1 - 1e-3
    assert stats.kstest(steps, "norm").pvalue > 1e-3
    assert result == (0.0, 0)


@pytest.mark.parametrize(("uniform", "num_drawn"), [(everybody, 6), (nobody, 0)])
def test_the_noisy_sum_is_divided_by_the_patients_expected_not_drawn(
    uniform: Any, num_drawn: int, plan_of
) -> None:
    plan = plan_of({"training.steps_per_round": 1, "privacy.noise_multiplier": 0.3})
    net, patients = net_of(plan), noise_patients()
    before, untouched = weights(net), copy.deepcopy(net).train()
    randomness = Randomness(uniform, seeded(4).normal)
    one_round(net, plan, randomness, patients=patients)
    batch = draw(patients, terms=plan.training, randomness=Randomness(uniform, nobody))
    assert batch.num_patients == num_drawn
    with opacus_engine(untouched, TASK.loss, max_grad_norm=1.0) as gradient_of:
        sums = gradient_of(batch).gradients
    source = seeded(4)
    noisy = torch.cat(
        [s.flatten() + 0.3 * torch.from_numpy(source.normal(s.numel())) for s in sums]
    )
    assert weights(net).numpy() == pytest.approx(
        (before - 0.05 * noisy / (0.5 * 6)).numpy(), abs=1e-6
    )


def test_without_privacy_the_step_is_the_mean_over_those_drawn(plan_of) -> None:
    plan = plan_of({"privacy": None, "training.steps_per_round": 1, "training.sample_rate": 0.1})
    net, patients = net_of(plan), noise_patients()
    before, untouched = weights(net), copy.deepcopy(net)
    randomness = Randomness(everybody, nobody)
    one_round(net, plan, randomness, patients=patients)
    means = [TASK.loss(untouched(p.images), p.targets).mean() for p in patients]
    mean = torch.stack(means).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(mean, trainable(untouched))])
    assert weights(net).numpy() == pytest.approx((before - 0.05 * gradient).numpy(), abs=1e-6)


@pytest.mark.parametrize("pull", [0.0, 2.0])
def test_fedprox_pulls_towards_the_weights_received(pull: float, plan_of) -> None:
    plan = plan_of({"training.proximal_mu": pull, "training.steps_per_round": 3})
    net = net_of(plan)
    before = [p.detach().clone().double() for p in net.parameters()]
    one_round(net, plan, Randomness(nobody, seeded(4).normal))
    source, expected = seeded(4), [b.clone() for b in before]
    for _ in range(3):
        for value, start in zip(expected, before, strict=True):
            noise = torch.from_numpy(source.normal(value.numel())).view_as(value) * 2.0 / 3
            value -= 0.05 * (noise + pull * (value - start))
    for found, wanted in zip(net.parameters(), expected, strict=True):
        assert found.detach().numpy() == pytest.approx(wanted.numpy(), abs=1e-6)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_lowers_the_loss(optimizer: str, private: bool, plan_of) -> None:
    changes: dict[str, Any] = {
        "training.optimizer": optimizer,
        "training.learning_rate": 0.02 if optimizer == "adamw" else 0.2,
        "training.sample_rate": 1.0,
        "training.steps_per_round": 15,
    }
    privacy = {"privacy.noise_multiplier": 0.01} if private else {"privacy": None}
    plan = plan_of(changes | privacy)
    net, losses = net_of(plan), []
    for round_ in range(2):
        losses.append(one_round(net, plan, seeded(round_), round_=round_).loss)
    assert losses[1] < 0.7 * losses[0]


def test_a_patient_whose_gradient_is_not_finite_is_left_out_and_counted(plan_of) -> None:
    plan = plan_of({"training.sample_rate": 1.0})
    patients = noise_patients()
    patients[2].images[0, 0, 3, 3] = torch.nan
    net = net_of(plan)
    result = one_round(net, plan, seeded(0), patients=patients)
    assert result.num_non_finite == plan.training.steps_per_round
    assert np.isfinite(result.loss)
    assert weights(net).isfinite().all()


@pytest.mark.parametrize("private", [False, True])
def test_performance_changes_nothing_but_the_last_digits(private: bool, plan_of) -> None:
    plan = plan_of({} if private else {"privacy": None})
    one, many = (trained(plan, seeded(3), most_images=most) for most in (1, 32))
    assert one.numpy() == pytest.approx(many.numpy(), abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_to_the_same_weights(engine: str, plan_of) -> None:
    nets_of_engines = []
    for name in ("opacus", engine):
        net = net_of(plan_of())
        train(
            net,
            noise_patients(),
            plan=plan_of(),
            task=TASK,
            rounds=[0],
            randomness=seeded(3),
            performance=Performance(engine=name),
            noise_multiplier=1.0,
        )
        nets_of_engines.append(weights(net).numpy())
    assert nets_of_engines[0] == pytest.approx(nets_of_engines[1], abs=1e-5)


def test_the_loss_is_the_mean_over_the_steps_that_drew_anybody(plan_of) -> None:
    plan = plan_of({"privacy": None, "training.learning_rate": 1e-9})
    numbers = iter([np.ones(6), np.zeros(6), *[np.zeros(2)] * 6])
    once = one_round(net_of(plan), plan, Randomness(lambda n: next(numbers), nobody))
    twice = one_round(net_of(plan), plan, Randomness(everybody, nobody))
    assert once.loss == pytest.approx(twice.loss, rel=1e-4)
    assert next(numbers, None) is None


def test_private_training_draws_its_noise_from_the_randomness_given(plan_of) -> None:
    assert torch.equal(*[trained(plan_of(), seeded(3)) for _ in range(2)])
    assert not torch.equal(*[trained(plan_of(), secure()) for _ in range(2)])


# --- the learning rate


@settings(deadline=None, derandomize=True)
@given(st.integers(2, 300), st.floats(1e-5, 1), st.floats(0.01, 1))
def test_the_learning_rate_falls_from_its_first_to_its_last_value(
    num_rounds: int, first: float, share: float
) -> None:
    last = first * share
    terms = TERMS.model_copy(
        update={"num_rounds": num_rounds, "learning_rate": first, "learning_rate_end": last}
    )
    rates = [learning_rate(terms, round_) for round_ in range(num_rounds)]
    assert rates[0] == pytest.approx(first)
    assert rates[-1] == pytest.approx(last)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(rates))


@pytest.mark.parametrize("round_", [0, 1, 2])
def test_without_an_end_the_learning_rate_is_constant(round_: int) -> None:
    assert learning_rate(TERMS, round_) == 0.1


def test_a_single_round_has_the_first_learning_rate() -> None:
    terms = TERMS.model_copy(update={"num_rounds": 1, "learning_rate_end": 0.01})
    assert learning_rate(terms, 0) == 0.1


def test_the_rounds_learning_rate_is_the_one_stepped_with(plan_of) -> None:
    plan = plan_of({"training.learning_rate_end": 0.005, "training.steps_per_round": 1})
    moved = []
    for round_ in (0, 2):
        net = net_of(plan)
        before = weights(net)
        one_round(net, plan, Randomness(nobody, seeded(4).normal), round_=round_)
        moved.append(float((weights(net) - before).norm()))
    assert moved[1] / moved[0] == pytest.approx(0.1, rel=1e-3)


class Counter(nn.Module):
    """A layer without parameters that keeps a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + images.detach().mean()
        return images


def test_under_privacy_terms_a_buffer_that_training_changed_stops_the_round(
    plan_of,
) -> None:
    net = nn.Sequential(Counter(), nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(ValueError, match=r"0\.seen"):
        one_round(net, plan_of(), secure())


def test_autocast_sees_the_weights_of_the_step_and_not_of_the_one_before(plan_of) -> None:
    plan, performance = plan_of({"privacy": None}), Performance(autocast=True)
    net = net_of(plan)
    batch = draw(noise_patients(), terms=TERMS, randomness=Randomness(everybody, nobody))
    with _engine(net, TASK, None, performance) as gradient_of:
        gradient_of(batch)
        with torch.no_grad():
            for parameter in trainable(net):
                parameter *= -3
        later = gradient_of(batch).gradients
    with _engine(net, TASK, None, performance) as gradient_of:
        afresh = gradient_of(batch).gradients
    assert all(torch.equal(one, other) for one, other in zip(later, afresh, strict=True))


# --- views


def with_terms(plan: StudyPlan, **changed: Any) -> StudyPlan:
    return plan.model_copy(update={"training": plan.training.model_copy(update=changed)})


@pytest.mark.parametrize("views", [1, 3])
def test_an_image_drawn_enters_as_its_views_one_after_the_other(views: int) -> None:
    terms = TERMS.model_copy(update={"views": views, "sample_rate": 1.0, "images_per_patient": 2})
    for maps in (False, True):
        patients = patients_of([1, 5], maps=maps)
        batch = draw(patients, terms=terms, randomness=seeded(3))
        assert batch.num_patients == 2
        assert torch.bincount(batch.owner).tolist() == [views, 2 * views]
        first = batch.images[:, 0, 0, 0]
        assert first.unique_consecutive(return_counts=True)[1].tolist() == [views] * 3
        assert len(batch.targets) == len(batch.images)


@pytest.mark.parametrize("private", [False, True])
def test_views_of_an_image_that_is_not_augmented_change_nothing(private: bool, plan_of) -> None:
    """A patient's gradient is the mean over views: of equal ones, that of the image."""
    plan = plan_of({"training.sample_rate": 1.0} | ({} if private else {"privacy": None}))
    one, three = (trained(with_terms(plan, views=views), seeded(3)) for views in (1, 3))
    assert one.numpy() == pytest.approx(three.numpy(), abs=1e-5)


def test_a_patients_gradient_is_the_mean_over_its_views(plan_of) -> None:
    """Two views of one image, one of them mirrored, weigh as two images of the patient."""
    plan = plan_of({"privacy": None, "training.steps_per_round": 1, "training.sample_rate": 1.0})
    patients = [p._replace(images=p.images[:1], targets=p.targets[:1]) for p in noise_patients()]
    both = [
        Patient(torch.cat([p.images, p.images.flip(-1)]), p.targets.repeat(2), p.spacing_mm)
        for p in patients
    ]
    flips = iter([np.zeros(6), *[np.zeros(1), np.zeros(1), np.ones(1)] * 6])
    viewed, doubled = net_of(plan), net_of(plan)
    twice = with_terms(plan, views=2, flips=True)
    one_round(viewed, twice, Randomness(lambda _: next(flips), nobody), patients=patients)
    one_round(doubled, plan, Randomness(everybody, nobody), patients=both)
    assert next(flips, None) is None
    assert weights(viewed).numpy() == pytest.approx(weights(doubled).numpy(), abs=1e-6)


def test_views_of_an_image_are_changed_each_by_its_own_chance() -> None:
    terms = TERMS.model_copy(update={"views": 8, "flips": True, "shift": 3, "sample_rate": 1.0})
    batch = draw(squares(), terms=terms, randomness=seeded(0))
    assert len(batch.images.flatten(1).unique(dim=0)) > 4


# --- shifts

SIDE = 11


def squares(*, dims: int = 2) -> list[Patient]:
    """Return a patient of one image in which every place has a number of its own, and its map."""
    image = torch.arange(float(SIDE**dims)).view(1, 1, *[SIDE] * dims)
    return [Patient(image, image[:, 0].long(), ((1.0,) * dims,))]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("shift", [1, 3])
def test_a_shift_moves_image_and_label_map_together_and_by_no_more_than_it_says(
    shift: int, dims: int
) -> None:
    terms = TERMS.model_copy(update={"shift": shift, "sample_rate": 1.0})
    patients, randomness = squares(dims=dims), seeded(1)
    axes = tuple(range(dims))
    seen = set()
    for _ in range(600):
        batch = draw(patients, terms=terms, randomness=randomness)
        assert torch.equal(batch.images[0, 0].long(), batch.targets[0])
        place = tuple(int(i) for i in np.argwhere(batch.targets[0].numpy() == 0)[0])
        by = tuple((i + SIDE // 2) % SIDE - SIDE // 2 for i in place)
        assert torch.equal(batch.images[0, 0], patients[0].images[0, 0].roll(by, axes))
        seen.add(by)
    for axis in axes:
        assert {by[axis] for by in seen} == set(range(-shift, shift + 1))


def test_every_shift_has_the_same_chance() -> None:
    terms = TERMS.model_copy(update={"shift": 2, "sample_rate": 1.0})
    patients, randomness, counts = squares(), seeded(1), np.zeros((5, 5))
    for _ in range(NUM_DRAWS):
        batch = draw(patients, terms=terms, randomness=randomness)
        down, right = np.argwhere(batch.targets[0].numpy() == 0)[0]
        counts[(down + 2) % SIDE, (right + 2) % SIDE] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_a_class_is_no_map_and_is_left_as_it_is() -> None:
    terms = TERMS.model_copy(update={"shift": 1, "flips": True, "sample_rate": 1.0})
    patients = patients_of([3, 3])
    before = copy.deepcopy(patients)
    assert draw(patients, terms=terms, randomness=seeded(1)).targets.tolist() == [0] * 3 + [1] * 3
    assert all(torch.equal(a.images, b.images) for a, b in zip(before, patients, strict=True))


# --- frozen parameters


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam-bc"])
@pytest.mark.parametrize("private", [False, True])
def test_frozen_parameters_do_not_move_and_get_no_noise(
    private: bool, optimizer: str, engine: str, plan_of
) -> None:
    plan = plan_of({"training.optimizer": optimizer} | ({} if private else {"privacy": None}))
    plan = with_terms(plan, frozen=("features.",), weight_decay=0.1)
    net = net_of(plan)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    drawn_numbers = list[int]()
    source = seeded(3)

    def counted(n: int) -> np.ndarray:
        drawn_numbers.append(n)
        return source.normal(n)

    train(
        net,
        noise_patients(),
        plan=plan,
        task=TASK,
        rounds=[0],
        randomness=Randomness(source.uniform, counted),
        performance=Performance(engine=engine),
        noise_multiplier=2.0 if private else 0.0,
    )
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("features.")
    free = [p.numel() for name, p in net.named_parameters() if not name.startswith("features.")]
    assert drawn_numbers == (free * 2 if private else [])


@pytest.mark.parametrize(
    ("frozen", "left"),
    [
        ((), {"one.weight", "one.bias", "onemore.weight", "onemore.bias"}),
        (("one.",), {"onemore.weight", "onemore.bias"}),
        (("one",), set()),
        (("one.weight", "onemore.bias"), {"one.bias", "onemore.weight"}),
        (("more",), {"one.weight", "one.bias", "onemore.weight", "onemore.bias"}),
    ],
)
def test_parameters_are_frozen_by_the_beginning_of_their_names(
    frozen: tuple[str, ...], left: set[str]
) -> None:
    net = nn.ModuleDict({"one": nn.Linear(2, 2), "onemore": nn.Linear(2, 2)})
    freeze(net, frozen)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == left


# --- Adam that knows the noise


def stepped(optimizer: Any, parameter: nn.Parameter, gradients: np.ndarray) -> np.ndarray:
    """Return where the parameter is after each step along ``gradients`` (steps, n)."""
    found = []
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        found.append(parameter.detach().clone().numpy())
    return np.array(found)


def by_hand(gradients: np.ndarray, *, lr: float, deviation: float) -> np.ndarray:
    """Algorithm 1 of the paper, as it is written there."""
    x, m, v = (np.zeros(gradients.shape[1]) for _ in range(3))
    found = []
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        corrected = np.maximum(v / (1 - 0.999**t) - deviation**2, 1e-8)
        x = x - lr * m / (1 - 0.9**t) / np.sqrt(corrected)
        found.append(x)
    return np.array(found)


@pytest.mark.parametrize(("signal", "deviation"), [(0.0, 0.5), (0.3, 0.5), (0.3, 0.0)])
def test_adam_bc_steps_as_its_formula_says(signal: float, deviation: float) -> None:
    noise = seeded(5).normal(40 * 30).reshape(40, 30) * max(deviation, 0.1)
    gradients = signal + noise
    parameter = nn.Parameter(torch.zeros(30, dtype=torch.float64))
    optimizer = AdamCorrected([parameter], lr=0.01, deviation=deviation)
    found = stepped(optimizer, parameter, gradients)
    assert found == pytest.approx(by_hand(gradients, lr=0.01, deviation=deviation), rel=1e-9)


def test_adam_bc_without_noise_is_adam() -> None:
    gradients = seeded(5).normal(40 * 30).reshape(40, 30)
    ours, theirs = (nn.Parameter(torch.zeros(30, dtype=torch.float64)) for _ in range(2))
    found = stepped(AdamCorrected([ours], lr=0.01, deviation=0.0), ours, gradients)
    expected = stepped(torch.optim.Adam([theirs], lr=0.01, eps=0.0), theirs, gradients)
    assert found == pytest.approx(expected, rel=1e-9)


def test_adam_bc_leaves_a_parameter_without_a_gradient_alone() -> None:
    one, other = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = AdamCorrected([one, other], lr=0.01, deviation=0.1)
    one.grad = torch.ones(3)
    optimizer.step()
    assert one.detach().abs().min() > 0
    assert other.tolist() == [0.0] * 3


def test_adam_bc_is_told_the_noise_of_the_mean_gradient(plan_of) -> None:
    """The deviation of noise over the expected batch, which is what it steps along."""
    plan = plan_of({"training.optimizer": "adam-bc", "privacy.max_grad_norm": 0.5})
    optimizer = _optimizer(list(net_of(plan).parameters()), plan, 2.0, 6)
    assert isinstance(optimizer, AdamCorrected)
    assert optimizer.param_groups[0]["deviation"] == pytest.approx(2.0 * 0.5 / (0.5 * 6))


# --- views, and a loss that sees no patient


def test_the_net_is_given_the_task_s_view_of_an_image_drawn() -> None:
    def view(image, target, randomness, is_training):  # type: ignore[no-untyped-def]
        assert is_training
        return image + 1, torch.from_numpy(randomness.uniform(2))

    patients = patients_of([2, 1])
    batch = draw(patients, terms=TERMS, view=view, randomness=Randomness(everybody, nobody))
    plain = draw(patients, terms=TERMS, randomness=Randomness(everybody, nobody))
    assert torch.equal(batch.images, plain.images + 1)
    assert batch.targets.shape == (3, 2)
    empty = draw(patients, terms=TERMS, view=view, randomness=Randomness(nobody, nobody))
    assert (empty.images.shape[0], empty.targets.shape) == (0, (0, 2))


class Pair(torch.nn.Module):
    """A part that images reach, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unseen = torch.nn.Linear(4, 2), torch.nn.Linear(2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.seen(images.flatten(1)[:, :4])


def free_loss(net: torch.nn.Module, randomness: Randomness) -> torch.Tensor:
    assert isinstance(net, Pair)
    drawn = torch.from_numpy(randomness.normal(2)).float()
    return (net.unseen(drawn) * 3 + net.seen.weight.sum()).sum()


@pytest.mark.parametrize("engine", ["opacus", "bookkeeping"])
@pytest.mark.parametrize("is_private", [False, True])
def test_a_loss_that_sees_no_patient_moves_its_parameters_and_is_not_noised(
    engine: str, is_private: bool, plan_of
) -> None:
    """Beside the patients' gradients; those alone have the noise."""
    changes = {"training.optimizer": "sgd", "training.learning_rate": 1.0}
    changes |= {"training.steps_per_round": 1} | ({} if is_private else {"privacy": None})
    net, patients = Pair(), noise_patients()
    before = weights(net).clone()
    drawn = list[np.ndarray]()

    def normal(n: int) -> np.ndarray:
        drawn.append(np.full(n, 0.5))
        return drawn[-1]

    task = TASK._replace(
        free=Free(free_loss, only=("unseen.",)), loss=lambda outputs, targets: outputs.sum(1) * 0
    )
    train(
        net,
        patients,
        plan=plan_of(changes),
        task=task,
        rounds=[0],
        randomness=Randomness(everybody, normal),
        noise_multiplier=1.0 if is_private else 0.0,
        performance=Performance(engine=engine),
    )
    moved = before - weights(net)
    assert moved[10:].tolist() == pytest.approx([1.5, 1.5, 3.0])  # 3 x (the draws, 1)
    assert [len(n) for n in drawn] == [8, 2, 2] if is_private else [2]
    noise = moved[:8] - 1
    assert bool((noise.abs() > 1e-3).all()) == is_private


# --- what is refused


@pytest.mark.parametrize(("private", "noise_multiplier"), [(True, 0.0), (False, 1.0)])
def test_training_is_given_noise_under_privacy_terms_and_only_then(
    private: bool, noise_multiplier: float, plan_of
) -> None:
    plan = plan_of({} if private else {"privacy": None})
    net = net_of(plan)
    before = weights(net)
    with pytest.raises(ValueError, match="expected noise under privacy terms, and only then"):
        train(
            net,
            noise_patients(),
            plan=plan,
            task=TASK,
            rounds=[0],
            randomness=seeded(0),
            performance=Performance(),
            noise_multiplier=noise_multiplier,
        )
    assert torch.equal(weights(net), before)


def test_rounds_on_end_have_each_its_learning_rate_and_one_optimizer(plan_of) -> None:
    """Momentum goes on from round to round: what it is with one optimizer made anew."""
    plan = plan_of({"training.steps_per_round": 1, "training.momentum": 0.5})
    plan = with_terms(plan, learning_rate_end=0.005)
    net = net_of(plan)
    before = [p.detach().clone().double() for p in net.parameters()]
    train(
        net,
        noise_patients(),
        plan=plan,
        task=TASK,
        rounds=range(3),
        randomness=Randomness(nobody, seeded(4).normal),
        performance=Performance(),
        noise_multiplier=2.0,
    )
    source, expected = seeded(4), [b.clone() for b in before]
    speed = [torch.zeros_like(b) for b in before]
    for rate in (0.05, (0.05 + 0.005) / 2, 0.005):
        for value, velocity in zip(expected, speed, strict=True):
            noise = torch.from_numpy(source.normal(value.numel())).view_as(value) * 2.0 / 3
            velocity.mul_(0.5).add_(noise)
            value -= rate * velocity
    for found, wanted in zip(net.parameters(), expected, strict=True):
        assert found.detach().numpy() == pytest.approx(wanted.numpy(), abs=1e-6)

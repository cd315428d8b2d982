"""Patient gradients against a plain loop over patients, and what one patient can change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from client import dp
from client.dp import Batch, add_noise, opacus_engine, plain_engine, trainable
from shared_models import nets
from shared_models.randomness import seeded
from shared_models.tasks import Box, classification, detection, segmentation

CLASSES = classification.make(classes=("a", "b", "c"))
ORGANS = segmentation.make(classes=("a", "b"))
FINDS = detection.make(classes=("a", "b"), most_boxes=4)

NETS = {
    "densenet in 2-D": (
        "densenet",
        {"init_features": 8, "block_config": [2, 2]},
        CLASSES,
        (32, 32),
    ),
    "densenet in 3-D": (
        "densenet",
        {"spatial_dims": 3, "init_features": 8, "block_config": [1, 1]},
        CLASSES,
        (16, 16, 16),
    ),
    "unet in 2-D": ("unet", {"channels": [4, 8, 8]}, ORGANS, (16, 16)),
    "unet in 3-D": ("unet", {"spatial_dims": 3, "channels": [4, 8, 8]}, ORGANS, (8, 8, 8)),
}


def small_net(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


def batch_of(
    counts: Sequence[int], *, size: Sequence[int] = (6, 6), maps: bool = False, seed: int = 0
) -> Batch:
    """Draw a batch of patients with ``counts`` images each, some brighter than others."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = len(owner)
    images = torch.randn((n, 1, *size), generator=generator)
    images = images * (0.5 + owner).view(n, *[1] * (len(size) + 1))
    targets = torch.randint(0, 3, (n, *size) if maps else (n,), generator=generator)
    return Batch(images, targets, owner, len(counts))


def without(batch: Batch, patient: int) -> Batch:
    kept = batch.owner != patient
    owner = batch.owner[kept]
    return Batch(
        batch.images[kept],
        batch.targets[kept],
        owner - (owner > patient).long(),
        batch.num_patients - 1,
    )


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).double()


def patient_by_patient(net: nn.Module, loss: dp.Loss, batch: Batch, *, norm: float) -> Tensor:
    """Clip and add up in the plainest way: one patient, one call of autograd, one clipping."""
    net = copy.deepcopy(net)
    total = torch.zeros(sum(p.numel() for p in trainable(net))).double()
    for patient in range(batch.num_patients):
        ours = batch.owner == patient
        mean = loss(net(batch.images[ours]), batch.targets[ours]).mean()
        gradient = flat(torch.autograd.grad(mean, trainable(net)))
        total += gradient * min(1.0, norm / float(gradient.norm()))
    return total


def clipped(net: nn.Module, loss: dp.Loss, batch: Batch, *, norm: float, most: int = 32) -> Tensor:
    with opacus_engine(net.train(), loss, max_grad_norm=norm, most_images=most) as gradient_of:
        return flat(gradient_of(batch).gradients)


def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- the sum of clipped patient gradients


@pytest.mark.parametrize("most_images", [1, 5, 100])
@pytest.mark.parametrize("name", NETS)
def test_the_sum_equals_a_plain_loop_over_patients(name: str, most_images: int) -> None:
    family, params, task, size = NETS[name]
    net = nets.make(family, params, seed=1, num_outputs=3)
    batch = batch_of([1, 4, 2, 6], size=size, maps=task is ORGANS)
    for norm in (0.1, 2.0, 1e6):  # all are clipped, some are, none is
        found = clipped(net, task.loss, batch, norm=norm, most=most_images)
        assert relative(found, patient_by_patient(net, task.loss, batch, norm=norm)) < 1e-5


def test_the_sum_of_a_detector_equals_a_plain_loop_over_patients() -> None:
    """Its loss weighs places by the boxes, and some images have none."""
    params = {"stem": [4], "channels": [8, 8]}
    net = nets.make("centernet", params, seed=1, num_outputs=6).train()
    boxes = [Box("a", (2, 3), (9, 12)), Box("b", (5, 8), (15, 14))]
    listed = [FINDS.encode_boxes(boxes[n % 2 :][: n % 3], (16, 16)) for n in range(6)]
    batch = batch_of([1, 3, 2], size=(16, 16))._replace(targets=torch.stack(listed))
    for norm in (0.1, 1e6):
        found = clipped(net, FINDS.loss, batch, norm=norm, most=4)
        assert relative(found, patient_by_patient(net, FINDS.loss, batch, norm=norm)) < 1e-5


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(1, 12),
    st.floats(0.05, 20),
)
def test_neither_counts_nor_chunks_nor_norm_change_what_is_summed(
    counts: list[int], most_images: int, norm: float
) -> None:
    net, batch = small_net(), batch_of(counts)
    found = clipped(net, entropy, batch, norm=norm, most=most_images)
    assert relative(found, patient_by_patient(net, entropy, batch, norm=norm)) < 1e-5


def test_without_privacy_the_sum_is_the_same_but_for_the_clipping() -> None:
    net, batch = small_net(), batch_of([3, 1, 5])
    with plain_engine(net, entropy, most_images=4) as gradient_of:
        found = flat(gradient_of(batch).gradients)
    assert relative(found, patient_by_patient(net, entropy, batch, norm=1e9)) < 1e-5


@pytest.mark.parametrize("engine", [opacus_engine, plain_engine])
def test_whole_patients_of_most_images_at_a_time_pass_through_the_net(engine: dp.Engine) -> None:
    sizes: list[int] = []

    def counted(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return entropy(outputs, targets)

    with engine(small_net(), counted, max_grad_norm=1.0, most_images=4) as gradient_of:
        gradient_of(batch_of([2, 1, 1, 2, 7, 3, 1]))
    assert sizes == [4, 2, 7, 4]  # a patient of more than that is alone


@pytest.mark.parametrize("engine", [opacus_engine, plain_engine])
def test_the_loss_is_the_mean_over_patients(engine: dp.Engine) -> None:
    net, batch = small_net(), batch_of([3, 1])
    with engine(net, entropy, max_grad_norm=1.0, most_images=2) as gradient_of:
        loss = gradient_of(batch).loss
    with torch.no_grad():
        each = entropy(net(batch.images), batch.targets)
    assert loss == pytest.approx(float((each[:3].mean() + each[3]) / 2), rel=1e-5)


# --- one patient's influence


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 8),
    st.floats(1e-3, 10),
    st.floats(1e-3, 1e4),
)
def test_one_patient_changes_the_sum_before_noise_by_at_most_max_grad_norm(
    counts: list[int], most_images: int, norm: float, brightness: float
) -> None:
    net, batch = small_net(), batch_of(counts)
    batch = batch._replace(images=batch.images * brightness)
    whole = clipped(net, entropy, batch, norm=norm, most=most_images)
    for patient in range(len(counts)):
        rest = clipped(net, entropy, without(batch, patient), norm=norm, most=most_images)
        assert float((whole - rest).norm()) <= norm * (1 + 1e-5)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 4), st.floats(1e-3, 0.5))
def test_rounding_never_lifts_a_clipped_patient_over_the_bound(images: int, norm: float) -> None:
    found = clipped(small_net(), entropy, batch_of([images]), norm=norm)
    assert norm * (1 - 1e-5) < float(found.norm()) <= norm


def test_more_images_of_a_patient_do_not_weigh_more() -> None:
    net, once = small_net(), batch_of([1])
    often = Batch(once.images.repeat(8, 1, 1, 1), once.targets.repeat(8), once.owner.repeat(8), 1)
    for norm in (0.1, 1e6):
        found = clipped(net, entropy, often, norm=norm)
        assert relative(found, clipped(net, entropy, once, norm=norm)) < 1e-5


# --- patients whose gradient is not finite


@pytest.mark.parametrize("most_images", [1, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_patient_with_a_non_finite_gradient_contributes_nothing(
    value: float, most_images: int
) -> None:
    net, batch = small_net().train(), batch_of([2, 3, 1])
    batch.images[3, 0, 2, 2] = value  # one pixel of one image of the second patient
    with opacus_engine(net, entropy, max_grad_norm=1.0, most_images=most_images) as gradient_of:
        sums = gradient_of(batch)
    others = patient_by_patient(net, entropy, without(batch, 1), norm=1.0)
    assert relative(flat(sums.gradients), others) < 1e-5
    assert sums.num_non_finite == 1


def test_patients_without_a_gradient_are_not_counted_as_non_finite() -> None:
    net = small_net()
    with opacus_engine(net, lambda o, t: 0 * entropy(o, t), max_grad_norm=1.0) as gradient_of:
        sums = gradient_of(batch_of([1, 2]))
    assert sums.num_non_finite == 0
    assert float(flat(sums.gradients).norm()) == 0


# --- noise


@pytest.mark.parametrize("engine", [opacus_engine, plain_engine])
def test_an_empty_draw_has_a_sum_of_zero(engine: dp.Engine) -> None:
    net, empty = small_net(), Batch(torch.zeros(0, 1, 6, 6), torch.zeros(0), torch.zeros(0), 0)
    with engine(net, entropy, max_grad_norm=1.0, most_images=4) as gradient_of:
        sums = gradient_of(empty)
    assert [g.shape for g in sums.gradients] == [p.shape for p in net.parameters()]
    assert float(flat(sums.gradients).abs().max()) == 0
    assert sums.loss == 0


@pytest.mark.parametrize(("noise_multiplier", "norm"), [(1.0, 1.0), (0.5, 3.0), (4.0, 0.25)])
def test_the_noise_has_the_deviation_multiplier_times_norm(
    noise_multiplier: float, norm: float
) -> None:
    zeros = [torch.zeros(200, 100), torch.zeros(30_000)]
    noisy = add_noise(
        zeros, noise_multiplier=noise_multiplier, max_grad_norm=norm, randomness=seeded(5)
    )
    draws = flat(noisy).numpy() / (noise_multiplier * norm)
    spread = float((draws**2).sum())
    share = stats.chi2(len(draws)).cdf(spread)
    assert 1e-3 < share < 1 - 1e-3
    assert stats.kstest(draws, "norm").pvalue > 1e-3


def test_noise_is_added_to_the_sums_and_is_its_own_in_every_place() -> None:
    sums = [torch.full((2, 3), 7.0), torch.zeros(4), torch.tensor(1.0)]
    noisy = add_noise(sums, noise_multiplier=2.0, max_grad_norm=1.5, randomness=seeded(5))
    expected = seeded(5)
    for before, after in zip(sums, noisy, strict=True):
        noise = torch.from_numpy(expected.normal(before.numel())).view_as(before)
        exact = before.double() + 3.0 * noise
        assert (after.double() - exact).abs().max() <= 3.0 * 2.0**-20
        assert after.dtype == before.dtype
        assert after.shape == before.shape
    assert len(flat(noisy).unique()) == 11
    assert [float(before.max()) for before in sums] == [7.0, 0.0, 1.0]


@pytest.mark.parametrize(("deviation", "grid"), [(1.0, 2.0**-19), (3.0, 2.0**-18), (0.3, 2.0**-21)])
@pytest.mark.parametrize("total", [0.0, 1e-30, 0.7, 1.9])
def test_no_digit_released_is_finer_than_the_grid_whatever_the_sum(
    deviation: float, grid: float, total: float
) -> None:
    sums = [torch.full((100_000,), total * deviation)]
    (noisy,) = add_noise(sums, noise_multiplier=deviation, max_grad_norm=1.0, randomness=seeded(1))
    near = noisy[noisy.abs() < 4 * deviation] / grid
    assert len(near) > 90_000
    assert torch.equal(near, near.round())
    far = noisy[noisy.abs() >= 4 * deviation] / (grid / 2)
    assert torch.equal(far, far.round())


def test_noise_of_any_size_keeps_its_deviation() -> None:
    for deviation in (1e-12, 1e12):
        (noisy,) = add_noise(
            [torch.zeros(20_000)],
            noise_multiplier=deviation,
            max_grad_norm=1.0,
            randomness=seeded(1),
        )
        assert float(noisy.double().std() / deviation) == pytest.approx(1, abs=0.03)


# --- every parameter, or none


class OutsideTheLayer(nn.Module):
    """Uses its layer's weight without calling the layer, which no hook can see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(36, 8)
        self.unseen = nn.Linear(8, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return functional.linear(self.seen(images.flatten(1)), self.unseen.weight)


class NeverUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(36, 3)
        self.idle = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.used(images.flatten(1))


@pytest.mark.parametrize(
    ("make", "name"), [(OutsideTheLayer, "unseen.weight"), (NeverUsed, "idle.weight")]
)
def test_every_trainable_parameter_has_a_per_patient_gradient_or_training_stops_with_its_name(
    make: Callable[[], nn.Module], name: str
) -> None:
    with pytest.raises(ValueError, match=f"'{name}' received no per-image gradient"):
        clipped(make(), entropy, batch_of([2, 1]), norm=1.0)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(36, 36)
        self.last = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        once = torch.tanh(self.inner(images.flatten(1)))
        return self.last(torch.tanh(self.inner(once)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(36, 36)
        self.second = nn.Linear(36, 36)
        self.second.weight = self.first.weight
        self.last = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(images.flatten(1))))))


class Bare(nn.Module):
    """Holds a parameter of its own beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))
        self.last = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images.flatten(1) * self.scale)


@pytest.mark.parametrize("make", [UsedTwice, Tied, Bare])
@pytest.mark.parametrize("norm", [0.1, 1e6])
def test_a_parameter_used_twice_or_by_no_layer_has_its_whole_gradient(
    make: Callable[[], nn.Module], norm: float
) -> None:
    torch.manual_seed(0)
    net, batch = make(), batch_of([2, 1, 3])
    found = clipped(net, entropy, batch, norm=norm)
    assert relative(found, patient_by_patient(net, entropy, batch, norm=norm)) < 1e-5


def test_the_uses_of_a_parameter_add_up() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.grad_sample = [torch.full((4, 1, 1), 2.0), torch.full((4, 1, 1), 3.0)]
    assert dp._grad_sample(net, net.weight).tolist() == [[[5.0]]] * 4


def test_frozen_parameters_are_left_alone() -> None:
    net, batch = small_net(), batch_of([2, 1])
    net[0].weight.requires_grad_(False)
    net[1].requires_grad_(False)
    with opacus_engine(net, entropy, max_grad_norm=0.1) as gradient_of:
        sums = gradient_of(batch)
    assert [g.shape for g in sums.gradients] == [p.shape for p in trainable(net)]
    assert len(sums.gradients) == 3
    expected = patient_by_patient(net, entropy, batch, norm=0.1)
    assert relative(flat(sums.gradients), expected) < 1e-5


# --- what is refused, and what is left behind


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(36, 3))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


MEETING = {
    "batch normalization": nn.BatchNorm2d(3),
    "batch normalization without parameters": nn.BatchNorm2d(3, affine=False),
    "batch normalization without statistics": nn.BatchNorm2d(3, track_running_stats=False),
    "running statistics": nn.InstanceNorm2d(3, track_running_stats=True),
    "running statistics and parameters": nn.InstanceNorm2d(
        3, affine=True, track_running_stats=True
    ),
}


@pytest.mark.parametrize("name", MEETING)
def test_a_net_in_which_patients_meet_by_batch_normalization_or_running_statistics_is_refused(
    name: str,
) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), MEETING[name], nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(ValueError, match=r"that keep no statistics over images.* in 1;"):
        clipped(net, entropy, batch_of([1, 1]), norm=1.0)


def test_a_layer_with_a_buffer_beside_its_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="buffers"):
        clipped(Counting(), entropy, batch_of([1]), norm=1.0)


def test_without_a_norm_there_is_nothing_to_clip_to() -> None:
    with (
        pytest.raises(ValueError, match="expected a max_grad_norm"),
        opacus_engine(small_net(), entropy, max_grad_norm=None),
    ):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_the_net_is_left_as_it_was(fails: bool) -> None:
    net = OutsideTheLayer() if fails else small_net()
    net.train()
    before, names = copy.deepcopy(net.state_dict()), set(vars(net))
    try:
        clipped(net, entropy, batch_of([2, 1]), norm=1.0)
    except ValueError:
        assert fails
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    for parameter in net.parameters():
        assert parameter.grad is None
        assert getattr(parameter, "grad_sample", None) is None
    assert set(vars(net)) == names
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_engine_can_be_opened_again() -> None:
    net, batch = small_net(), batch_of([2, 1])
    once, again = (clipped(net, entropy, batch, norm=1.0) for _ in range(2))
    assert torch.equal(once, again)


# --- what gradients are multiplied by

norms = st.floats(0, 2.0**100, width=32) | st.sampled_from([1e-30, 1e-9, 0.01, 1.0, 3e38])


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.lists(norms, min_size=1, max_size=8),
    st.floats(1e-4, 1e4),
    st.sampled_from(["flat", "automatic"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_no_clipped_norm_is_over_the_bound(
    found: list[float], bound: float, clipping: dp.Clipping, dtype: torch.dtype
) -> None:
    given_ = torch.tensor(found, dtype=dtype)
    factors = dp.clip_factors(given_, max_grad_norm=bound, clipping=clipping)
    assert (factors >= 0).all()
    assert (factors.double() * given_.double() <= bound).all()


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-9, 1e6), st.floats(1e-3, 1e3))
def test_automatic_clipping_lifts_large_gradients_to_the_bound_and_leaves_small_ones_small(
    norm: float, bound: float
) -> None:
    """Between nothing and the bound, ever nearer to it, and half of it where the norm is 0.01."""

    def clipped_norm(value: float) -> float:
        norms = torch.tensor([value], dtype=torch.float64)
        return value * float(dp.clip_factors(norms, max_grad_norm=bound, clipping="automatic"))

    assert clipped_norm(norm) == pytest.approx(bound * norm / (norm + 0.01), rel=1e-5)
    assert clipped_norm(0.0) == 0.0
    assert clipped_norm(0.01) == pytest.approx(bound / 2, rel=1e-5)
    assert clipped_norm(norm) < clipped_norm(2 * norm) <= bound


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_has_the_factor_zero(value: float, clipping: dp.Clipping) -> None:
    norms = torch.tensor([1.0, value, 2.0])
    factors = dp.clip_factors(norms, max_grad_norm=1.0, clipping=clipping)
    assert factors.tolist()[1] == 0.0
    assert (factors[[0, 2]] > 0).all()

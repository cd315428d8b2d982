"""The one-pass engine against a plain loop over patients, layer by layer and net by net."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from client.bookkeeping import bookkeeping_engine, layers
from client.bookkeeping.book import Book
from client.dp import Batch, Engine, Loss, Sums, opacus_engine, trainable
from shared_models import nets
from shared_models.nets.base import made_private_ready
from shared_models.tasks import Box, classification, detection, segmentation

CLASSES = classification.make(classes=("a", "b", "c"))
ORGANS = segmentation.make(classes=("a", "b"))
FINDS = detection.make(classes=("a", "b"), most_boxes=4)
COUNTS = {"one each": [1] * 4, "alike": [3, 3], "unlike": [1, 3, 2], "far apart": [1, 1, 9, 1]}
Make = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_of(
    counts: Sequence[int],
    *,
    shape: Sequence[int] = (1, 6, 6),
    maps: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Draw a batch of patients with ``counts`` images each, some brighter than others."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = len(owner)
    images = torch.randn((n, *shape), generator=generator, dtype=dtype)
    images = images * (0.5 + owner).view(n, *[1] * len(shape))
    targets = torch.randint(0, 3, (n, *shape[1:]) if maps else (n,), generator=generator)
    return Batch(images, targets, owner, len(counts))


def without(batch: Batch, patient: int) -> Batch:
    kept = batch.owner != patient
    owner = batch.owner[kept]
    owner = owner - (owner > patient).long()
    return Batch(batch.images[kept], batch.targets[kept], owner, batch.num_patients - 1)


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).double()


def patient_by_patient(net: nn.Module, loss: Loss, batch: Batch, *, norm: float) -> Tensor:
    """Clip and add up in the plainest way: one patient, one call of autograd, one clipping."""
    net = copy.deepcopy(net)
    total = torch.zeros(sum(p.numel() for p in trainable(net))).double()
    for patient in range(batch.num_patients):
        ours = batch.owner == patient
        mean = loss(net(batch.images[ours]), batch.targets[ours]).mean()
        gradient = flat(torch.autograd.grad(mean, trainable(net)))
        total += gradient * min(1.0, norm / max(float(gradient.norm()), 1e-12))
    return total


def summed(net: nn.Module, loss: Loss, batch: Batch, *, norm: float, most: int = 32) -> Sums:
    with bookkeeping_engine(net, loss, max_grad_norm=norm, most_images=most) as gradient_of:
        return gradient_of(batch)


def clipped(net: nn.Module, loss: Loss, batch: Batch, *, norm: float, most: int = 32) -> Tensor:
    return flat(summed(net, loss, batch, norm=norm, most=most).gradients)


def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def energy(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss for outputs of any shape, whose gradient differs at every place."""
    rows = outputs.flatten(1)
    weights = torch.linspace(-1, 2, rows.shape[1], dtype=rows.dtype)
    return (rows.tanh() * weights).sum(1) + 0.1 * rows.square().mean(1) * (1 + targets)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_equals_the_loop(
    net: nn.Module, batch: Batch, *, loss: Loss = energy, exact: float = 1e-9
) -> None:
    """Compare without clipping to ``exact``, with some clipped and with all clipped to 1e-5."""
    free = patient_by_patient(net, loss, batch, norm=1e12)
    assert relative(clipped(net, loss, batch, norm=1e12), free) < exact
    for norm in (0.5 * float(free.norm()) / batch.num_patients, 1e-3):
        expected = patient_by_patient(net, loss, batch, norm=norm)
        assert relative(clipped(net, loss, batch, norm=norm), expected) < 1e-5


def small_net(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


# --- layers of every kind, in float64

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
counts = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(st.data())
def test_a_convolution_of_any_settings_equals_the_loop(data: st.DataObject) -> None:
    draw = data.draw
    dims = draw(st.integers(1, 3))
    size = draw(st.integers(2, 6 if dims < 3 else 4))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    padding: Any = draw(st.sampled_from([0, 1, "valid", "same"]))
    stride = 1 if padding == "same" else draw(st.integers(1, 3))
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    reach = dilation * (kernel - 1)
    around = {"valid": 0, "same": (reach + 1) // 2}.get(padding, padding)
    assume(size + 2 * around > reach and around < size)
    layer = CONVS[dims](
        2,
        draw(st.sampled_from([2, 40])),  # many channels make the ghost norm the cheaper form
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    ).double()
    first = nn.PReLU().double()  # so that the convolution is not the first layer
    net = nn.Sequential(first, layer) if draw(st.booleans()) else nn.Sequential(layer)
    batch = batch_of(draw(counts), shape=(2, *[size] * dims), dtype=torch.float64)
    assert_equals_the_loop(net, batch)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.data())
def test_a_transposed_convolution_of_any_settings_equals_the_loop(data: st.DataObject) -> None:
    draw = data.draw
    dims, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel, padding = draw(st.integers(1, 3)), draw(st.integers(0, 1))
    extra = draw(st.integers(0, max(stride, dilation) - 1))
    assume((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1 > 0)
    layer = TRANSPOSED[dims](
        2,
        draw(st.sampled_from([2, 40])),
        kernel,
        stride=stride,
        padding=padding,
        output_padding=extra,
        dilation=dilation,
        groups=draw(st.sampled_from([1, 1, 2])),
        bias=draw(st.booleans()),
    ).double()
    batch = batch_of(draw(counts), shape=(2, *[size] * dims), dtype=torch.float64)
    assert_equals_the_loop(layer, batch)


def test_a_transposed_convolution_told_its_output_size_equals_the_loop() -> None:
    class Told(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(1, channels, 3, stride=2)

        def forward(self, images: Tensor) -> Tensor:
            return self.up(input=images, output_size=[8, 7])

    for channels in (2, 40):
        batch = batch_of([1, 2], shape=(1, 3, 3), dtype=torch.float64)
        assert_equals_the_loop(Told(channels).double(), batch)


def norm_layer(kind: str, dims: int, affine: bool) -> nn.Module:
    if kind == "instance":
        return {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims](
            4, affine=affine
        )
    if kind == "layer":
        return nn.LayerNorm([3] * dims, elementwise_affine=affine)
    if kind == "layer without bias":
        return nn.LayerNorm(3, elementwise_affine=affine, bias=False)
    return nn.GroupNorm(int(kind), 4, affine=affine)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.sampled_from(["1", "2", "4", "instance", "layer", "layer without bias"]),
    st.integers(1, 3),
    st.booleans(),
    counts,
)
def test_a_normalization_of_any_settings_equals_the_loop(
    kind: str, dims: int, affine: bool, images: list[int]
) -> None:
    torch.manual_seed(0)
    norm = norm_layer(kind, dims, affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    net = nn.Sequential(CONVS[dims](1, 4, 1), norm, nn.Flatten(), nn.Linear(4 * 3**dims, 3))
    batch = batch_of(images, shape=(1, *[3] * dims), dtype=torch.float64)
    assert_equals_the_loop(net.double(), batch)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.sampled_from([1, 3]), st.integers(0, 3), counts)
def test_a_prelu_of_one_slope_or_one_for_each_channel_equals_the_loop(
    slopes: int, dims: int, images: list[int]
) -> None:
    net = nn.Sequential(nn.PReLU(slopes), nn.Flatten(), nn.Linear(3 * 2**dims, 3)).double()
    assert_equals_the_loop(net, batch_of(images, shape=(3, *[2] * dims), dtype=torch.float64))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 2), st.sampled_from([2, 30]), st.booleans(), counts)
def test_a_fully_connected_layer_over_any_axes_equals_the_loop(
    axes: int, features: int, bias: bool, images: list[int]
) -> None:
    net = nn.Sequential(nn.Linear(5, features, bias=bias), nn.Tanh(), nn.Linear(features, 4))
    batch = batch_of(images, shape=(*[3] * axes, 5), dtype=torch.float64)
    assert_equals_the_loop(net.double(), batch)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.sampled_from([None, 0, 2]), st.integers(0, 2), counts)
def test_an_embedding_with_repeats_and_padding_equals_the_loop(
    padding_idx: int | None, axes: int, images: list[int]
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(4, 3, padding_idx=padding_idx), nn.Linear(3, 2)).double()
    batch = batch_of(images, shape=[5] * axes)
    batch = batch._replace(images=batch.images.abs().long() % 4)
    found = clipped(net, energy, batch, norm=1e12)
    assert relative(found, patient_by_patient(net, energy, batch, norm=1e12)) < 1e-6


class Sequences(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], *, with_state: bool = False, **settings: Any):
        super().__init__()
        self.with_state = with_state
        self.rnn = kind(6, 5, **settings)
        self.last = nn.Linear(5 * (1 + self.rnn.bidirectional), 3)

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, 0] if self.rnn.batch_first else images[:, 0].transpose(0, 1)
        hx = None
        if self.with_state:
            size = (self.rnn.num_layers * (1 + self.rnn.bidirectional), len(images), 5)
            hx = images.mean().detach() * torch.ones(size, dtype=x.dtype) * 0 + 0.3
            hx = (hx, hx) if isinstance(self.rnn, nn.LSTM) else hx
        outputs, state = self.rnn(x, hx)
        states = torch.cat(state) if isinstance(state, tuple) else state
        mean = outputs.mean(1 if self.rnn.batch_first else 0)
        return self.last(mean) + states.square().sum((0, 2))[:, None]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize(
    "settings_",
    [
        {"batch_first": True},
        {"batch_first": False, "num_layers": 2},
        {"batch_first": True, "bidirectional": True, "num_layers": 2},
        {"batch_first": True, "bias": False, "with_state": True},
        {"batch_first": False, "bidirectional": True, "with_state": True},
    ],
)
@pytest.mark.parametrize("images", [[1, 1, 1, 1], [1, 3, 1]])
def test_a_recurrent_layer_equals_the_loop(
    kind: type[nn.RNNBase], settings_: dict[str, Any], images: list[int]
) -> None:
    torch.manual_seed(0)
    net = Sequences(kind, **settings_).double()
    batch = batch_of(images, dtype=torch.float64)
    assert_equals_the_loop(net, batch, loss=entropy)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0"])
def test_a_recurrent_layer_frozen_in_part_equals_the_loop(
    kind: type[nn.RNNBase], frozen: str
) -> None:
    net = Sequences(kind, batch_first=True).double()
    for name, parameter in net.rnn.named_parameters():
        parameter.requires_grad_(name.startswith("weight") and name != frozen)
    assert_equals_the_loop(net, batch_of([1, 2], dtype=torch.float64), loss=entropy)


def test_a_recurrent_layer_with_dropout_takes_it_between_its_layers() -> None:
    net = Sequences(nn.GRU, batch_first=True, num_layers=2, dropout=0.5).double().train()
    batch = batch_of([1], dtype=torch.float64)
    clipped(net, entropy, batch, norm=1e9)  # the first batch tries one image, with its own draws
    torch.manual_seed(3)
    found = clipped(net.eval(), entropy, batch, norm=1e9)
    assert relative(found, patient_by_patient(net, entropy, batch, norm=1e9)) < 1e-9
    assert relative(clipped(net.train(), entropy, batch, norm=1e9), found) > 1e-3


# --- nets

DENSE = {"init_features": 8, "block_config": [2, 2]}
NETS: dict[str, tuple[str, dict[str, Any], Any, tuple[int, ...]]] = {
    "densenet 2-D": ("densenet", DENSE, CLASSES, (1, 32, 32)),
    "densenet 3-D": (
        "densenet",
        {"spatial_dims": 3, "init_features": 8, "block_config": [1, 1]},
        CLASSES,
        (1, 16, 16, 16),
    ),
    **{
        f"unet {dims}-D {norm} {units}": (
            "unet",
            {
                "spatial_dims": dims,
                "channels": [4, 8, 16],
                "norm": norm,
                "num_res_units": units,
                "num_groups": 1,
            },
            ORGANS,
            (1, *[16 if dims == 2 else 8] * dims),
        )
        for dims in (2, 3)
        for norm in ("group", "instance")
        for units in (0, 2)
    },
}


@pytest.mark.parametrize("images", COUNTS)
@pytest.mark.parametrize("name", NETS)
def test_the_sum_equals_a_plain_loop_over_patients(name: str, images: str) -> None:
    family, params, task, shape = NETS[name]
    net = nets.make(family, params, seed=1, num_outputs=3).train()
    batch = batch_of(COUNTS[images], shape=shape, maps=task is ORGANS)
    for norm, most in ((0.1, 4), (2.0, 100), (1e6, 5)):  # all are clipped, some are, none is
        found = clipped(net, task.loss, batch, norm=norm, most=most)
        assert relative(found, patient_by_patient(net, task.loss, batch, norm=norm)) < 1e-5


def test_the_sum_of_a_detector_equals_a_plain_loop_over_patients() -> None:
    """Its loss weighs places by the boxes, and some images have none."""
    params = {"stem": [4], "channels": [8, 8]}
    net = nets.make("centernet", params, seed=1, num_outputs=6).train()
    boxes = [Box("a", (2, 3), (9, 12)), Box("b", (5, 8), (15, 14))]
    listed = [FINDS.encode_boxes(boxes[n % 2 :][: n % 3], (16, 16)) for n in range(6)]
    batch = batch_of([1, 3, 2], shape=(1, 16, 16))._replace(targets=torch.stack(listed))
    for norm in (0.1, 1e6):
        found = clipped(net, FINDS.loss, batch, norm=norm, most=4)
        assert relative(found, patient_by_patient(net, FINDS.loss, batch, norm=norm)) < 1e-5


@pytest.mark.parametrize("name", ["densenet 2-D", "unet 2-D group 2", "unet 3-D instance 0"])
def test_the_sum_equals_that_of_opacus(name: str) -> None:
    family, params, task, shape = NETS[name]
    net = nets.make(family, params, seed=1, num_outputs=3).train()
    batch = batch_of([1, 4, 2], shape=shape, maps=task is ORGANS)
    for norm in (0.1, 1e6):
        with opacus_engine(net, task.loss, max_grad_norm=norm, most_images=5) as gradient_of:
            theirs = gradient_of(batch)
        ours = summed(net, task.loss, batch, norm=norm, most=5)
        assert relative(flat(ours.gradients), flat(theirs.gradients)) < 1e-5
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


RESTORING: dict[str, tuple[str, dict[str, Any], int, tuple[int, ...]]] = {
    "dncnn 2-D": ("dncnn", {"channels": 4, "depth": 3}, 1, (1, 9, 8)),
    "dncnn 3-D": ("dncnn", {"spatial_dims": 3, "channels": 4, "depth": 3}, 1, (1, 5, 6, 7)),
    "unrolled 2-D": ("unrolled", {"channels": 4, "depth": 2, "cascades": 2}, 2, (3, 8, 7)),
    "unrolled 3-D": ("unrolled", {"spatial_dims": 3, "channels": 4, "depth": 2}, 2, (3, 3, 6, 5)),
}


@pytest.mark.parametrize("images", ["unlike", "far apart"])
@pytest.mark.parametrize("name", RESTORING)
def test_the_sum_of_a_net_that_gives_an_image_back_equals_the_loop_in_one_pass(
    name: str, images: str, caplog: pytest.LogCaptureFixture
) -> None:
    family, params, outputs, shape = RESTORING[name]
    net = nets.make(family, params, seed=1, num_outputs=outputs).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(net):  # the last layers begin at zero
            parameter += 0.1 * torch.randn_like(parameter)
    assert_equals_the_loop(net, batch_of(COUNTS[images], shape=shape), exact=1e-5)
    assert not caplog.records


GROUP = ("group", {"num_groups": 2})


def monai_net(name: str) -> nn.Module:
    from monai.networks import nets as monai

    torch.manual_seed(0)
    if name == "BasicUNet":
        return monai.BasicUNet(2, 1, 3, features=(4, 4, 8, 8, 8, 4), norm=GROUP)
    if name == "SegResNet":
        return monai.SegResNet(
            2, 4, 1, 3, norm=GROUP, blocks_down=(1, 1), blocks_up=(1,), act=("PRELU", {})
        )
    if name == "BasicUNetPlusPlus":
        features = (4, 4, 8, 8, 8, 4)
        return Heads(monai.BasicUNetPlusPlus(2, 1, 3, features, deep_supervision=True, norm=GROUP))
    if name == "AutoEncoder":
        return monai.AutoEncoder(2, 1, 4, (4, 8), (2, 2), num_res_units=2, norm=GROUP)
    if name == "ResNet":
        return monai.ResNet("basic", [1] * 4, [4] * 4, spatial_dims=2, n_input_channels=1)
    return monai.AttentionUnet(2, 1, 3, channels=(4, 8), strides=(2,))


class Heads(nn.Module):
    """A net of several outputs, which are added up."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return sum(self.inner(images))


@pytest.mark.parametrize("name", ["BasicUNet", "BasicUNetPlusPlus", "SegResNet", "AutoEncoder"])
@pytest.mark.parametrize("in_place", [False, True])
def test_nets_of_monai_with_group_normalization_equal_the_loop(name: str, in_place: bool) -> None:
    net = monai_net(name) if in_place else made_private_ready(monai_net(name))
    batch = batch_of([1, 2, 1], shape=(1, 32, 32))
    for norm in (0.1, 1e6):
        found = clipped(net, energy, batch, norm=norm)
        assert relative(found, patient_by_patient(net, energy, batch, norm=norm)) < 1e-5


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 12), st.floats(0.05, 20))
def test_neither_counts_nor_chunks_nor_norm_change_what_is_summed(
    images: list[int], most_images: int, norm: float
) -> None:
    net, batch = small_net(), batch_of(images)
    found = clipped(net, entropy, batch, norm=norm, most=most_images)
    assert relative(found, patient_by_patient(net, entropy, batch, norm=norm)) < 1e-5


def test_whole_patients_of_most_images_at_a_time_pass_through_the_net() -> None:
    sizes: list[int] = []

    def counted(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return entropy(outputs, targets)

    summed(small_net(), counted, batch_of([2, 1, 1, 2, 7, 3, 1]), norm=1.0, most=4)
    assert sizes == [4, 2, 7, 4]


def test_the_loss_is_the_mean_over_patients() -> None:
    net, batch = small_net(), batch_of([3, 1])
    with torch.no_grad():
        each = entropy(net(batch.images), batch.targets)
    found = summed(net, entropy, batch, norm=1.0, most=2).loss
    assert found == pytest.approx(float((each[:3].mean() + each[3]) / 2), rel=1e-5)


def test_an_empty_draw_has_a_sum_of_zero() -> None:
    empty = Batch(torch.zeros(0, 1, 6, 6), torch.zeros(0), torch.zeros(0), 0)
    sums = summed(small_net(), entropy, empty, norm=1.0)
    assert [g.shape for g in sums.gradients] == [p.shape for p in small_net().parameters()]
    assert float(flat(sums.gradients).abs().max()) == 0
    assert (sums.loss, sums.num_non_finite) == (0, 0)


# --- one patient's influence


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 8),
    st.floats(1e-3, 10),
    st.floats(1e-3, 1e4),
)
def test_one_patient_changes_the_sum_before_noise_by_at_most_max_grad_norm(
    images: list[int], most_images: int, norm: float, brightness: float
) -> None:
    net, batch = small_net(), batch_of(images)
    batch = batch._replace(images=batch.images * brightness)
    whole = clipped(net, entropy, batch, norm=norm, most=most_images)
    for patient in range(len(images)):
        rest = clipped(net, entropy, without(batch, patient), norm=norm, most=most_images)
        assert float((whole - rest).norm()) <= norm * (1 + 1e-5)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 4), st.floats(1e-3, 0.5), st.integers(0, 9))
def test_rounding_never_lifts_a_clipped_patient_over_the_bound(
    images: int, norm: float, seed: int
) -> None:
    found = clipped(small_net(seed=seed), entropy, batch_of([images], seed=seed), norm=norm)
    assert norm * (1 - 2e-5) < float(found.norm()) <= norm


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 64), st.integers(1, 60), st.floats(0, 1), st.integers(0, 1000))
def test_a_ghost_norm_is_never_too_small_however_much_cancels(
    positions: int, size: int, common: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(3, size, positions, generator=generator)
    columns = columns * (1 - common) + common  # nearly the same at all positions
    grads = torch.randn(3, size, positions, generator=generator)
    grads = grads - common * grads.mean(2, keepdim=True)  # adding up to nearly nothing
    true = (grads.double() @ columns.mT.double()).flatten(1).square().sum(1)
    found = layers.ghost_norm(columns, grads).double()
    assert bool((found >= true * (1 - 2e-6)).all())
    scale = columns.double().square().sum((1, 2)) * grads.double().square().sum((1, 2))
    assert bool((found <= true + 1e-5 * scale).all())


# --- patients whose gradient is not finite


@pytest.mark.parametrize("most_images", [1, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("images", [[2, 3, 1], [1, 1, 1, 1], [2, 2]])
def test_a_patient_with_a_non_finite_gradient_contributes_nothing_and_is_counted(
    value: float, most_images: int, images: list[int]
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.PReLU(), nn.GroupNorm(2, 32), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip
    batch = batch_of(images)
    batch.images[images[0], 0, 2, 2] = value  # one pixel of one image of the second patient
    sums = summed(net, entropy, batch, norm=1.0, most=most_images)
    others = patient_by_patient(net, entropy, without(batch, 1), norm=1.0)
    assert relative(flat(sums.gradients), others) < 1e-5
    assert sums.num_non_finite == 1


@pytest.mark.parametrize("images", [[1, 1, 1], [2, 1]])
def test_a_gradient_too_large_to_square_in_float32_is_clipped_all_the_same(
    images: list[int],
) -> None:
    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum(1)

    net, batch = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), batch_of(images)
    batch.images[batch.owner == 1] *= 1e25
    found = summed(net, total, batch, norm=1.0)
    assert found.num_non_finite == 0
    assert relative(flat(found.gradients), patient_by_patient(net, total, batch, norm=1.0)) < 1e-5


def test_patients_without_a_gradient_are_not_counted_as_non_finite() -> None:
    sums = summed(small_net(), lambda o, t: 0 * entropy(o, t), batch_of([1, 2]), norm=1.0)
    assert sums.num_non_finite == 0
    assert float(flat(sums.gradients).norm()) == 0


# --- every parameter and every use of it, or none


class Parts(nn.Module):
    """Two layers, and a way through them."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 36), nn.Linear(36, 3, bias=False)
        self.way = way

    def forward(self, images: Tensor) -> Tensor:
        return self.way(self, images.flatten(1))


def outside(net: Any, x: Tensor) -> Tensor:
    return functional.linear(net.first(x), net.last.weight)


def outside_too(net: Any, x: Tensor) -> Tensor:
    return net.last(net.first(x)) + functional.linear(x, net.last.weight)


def outside_beside_a_dead_end(net: Any, x: Tensor) -> Tensor:
    net.last(x)
    return outside(net, x)


def outside_at_first(net: Any, x: Tensor) -> Tensor:
    return net.first(functional.linear(x, net.last.weight) @ torch.ones(3, 36))


def idle(net: Any, x: Tensor) -> Tensor:
    return net.first(x)


def dead(net: Any, x: Tensor) -> Tensor:
    net.last(x)
    return net.first(x)


def cut(net: Any, x: Tensor) -> Tensor:
    return net.first(x) + net.last(x).detach().sum()


@pytest.mark.parametrize("way", [outside, idle, dead, cut])
def test_every_trainable_parameter_has_a_per_patient_gradient_or_training_stops_with_its_name(
    way: Any,
) -> None:
    with pytest.raises(ValueError, match=r"'last.weight' received no per-patient gradient"):
        clipped(Parts(way), entropy, batch_of([2, 1]), norm=1.0)


@pytest.mark.parametrize("way", [outside, outside_too, outside_beside_a_dead_end, outside_at_first])
def test_every_use_of_a_parameter_is_accounted_for_or_training_stops_with_its_name(
    way: Any,
) -> None:
    with pytest.raises(ValueError, match=r"'last.weight' received .* use outside its own layer"):
        clipped(Parts(way), entropy, batch_of([2, 1]), norm=1.0)


def test_a_parameter_nobody_uses_stops_the_slow_way_too() -> None:
    net = nn.ModuleDict({"used": Scaled(), "idle": nn.Linear(2, 2)})
    net.forward = lambda images: net["used"](images)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"'idle.weight' received no per-patient gradient"):
        clipped(net, entropy, batch_of([1]), norm=1.0)


def twice(net: Any, x: Tensor) -> Tensor:
    return net.last(torch.tanh(net.first(torch.tanh(net.first(x)))))


def tied() -> nn.Module:
    net = Parts(lambda net, x: net.last(torch.tanh(net.second(torch.tanh(net.first(x))))))
    net.second = nn.Linear(36, 36)
    net.second.weight = net.first.weight
    return net


@pytest.mark.parametrize("make", [lambda: Parts(twice), tied], ids=["twice", "tied"])
@pytest.mark.parametrize("images", COUNTS.values(), ids=COUNTS)
def test_the_uses_of_a_parameter_add_up(make: Make, images: list[int]) -> None:
    torch.manual_seed(0)
    batch = batch_of(images, dtype=torch.float64)
    assert_equals_the_loop(make().double(), batch, loss=entropy)


def test_a_layer_used_without_gradient_is_no_use() -> None:
    def beside(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = net.last(x).sum(1, keepdim=True)
        return net.last(net.first(x)) + shift

    assert_equals_the_loop(Parts(beside).double(), batch_of([2, 1], dtype=torch.float64))


def test_frozen_parameters_are_left_alone() -> None:
    net, batch = small_net(), batch_of([2, 1])
    net[0].weight.requires_grad_(False)
    net[1].requires_grad_(False)
    sums = summed(net, entropy, batch, norm=0.1)
    assert [g.shape for g in sums.gradients] == [p.shape for p in trainable(net)]
    expected = patient_by_patient(net, entropy, batch, norm=0.1)
    assert relative(flat(sums.gradients), expected) < 1e-5


# --- views and work in place


class InPlace(nn.Module):
    """Changes outputs of layers in place, which autograd allows."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 4, 3), norm, nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        x += 1
        x = functional.relu_(self.norm(x))
        return self.last(x.flatten(1)).mul_(2)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_outputs_changed_in_place_equal_the_loop(norm: nn.Module) -> None:
    torch.manual_seed(0)
    batch = batch_of([2, 1], dtype=torch.float64)
    assert_equals_the_loop(InPlace(norm).double(), batch, loss=entropy)


def test_an_output_that_is_a_view_may_be_changed_in_place() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.last = nn.Linear(6, 4), nn.Linear(24, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = self.rows(images[:, 0].contiguous())
            x[:, 1:3].mul_(3)
            return self.last(x.add_(1).relu_().flatten(1))

    batch = batch_of([2, 1], dtype=torch.float64)
    assert_equals_the_loop(Rows().double(), batch, loss=entropy)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ELU, nn.LeakyReLU])
def test_modules_that_work_in_place_equal_the_loop(kind: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), kind(inplace=True), nn.GroupNorm(2, 4), kind(inplace=True),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    assert_equals_the_loop(net.double(), batch_of([2, 1], dtype=torch.float64), loss=entropy)


def test_an_input_changed_in_place_after_its_layer_saw_it_stops_the_training() -> None:
    def spoiled(net: Any, x: Tensor) -> Tensor:
        inner = torch.tanh(net.first(x)) * 1
        outputs = net.last(inner)
        inner.add_(1)
        return outputs

    with pytest.raises(ValueError, match=r"input of last was changed in place.*inplace = False"):
        clipped(Parts(spoiled), entropy, batch_of([1, 1]), norm=1.0)


# --- what has no rule


class Scaled(nn.Module):
    """Holds a parameter of its own beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))
        self.last = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images.flatten(1) * self.scale)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, 0]
        return self.last(self.attention(x, x, x)[0].flatten(1))


class Transforming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.last = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layer(images[:, 0]).flatten(1))


class Folding(nn.Module):
    """Makes the rows of the images its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.Linear(6, 4), nn.Linear(24, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.rows(images.flatten(0, 2)).reshape(len(images), -1))


class FoldingNorm(nn.Module):
    """Normalizes and bends the rows of the images as if they were images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bend, self.last = nn.GroupNorm(2, 6), nn.PReLU(), nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(0, 2)
        return self.last(self.bend(self.norm(rows)).reshape(len(images), -1))


class TimeFirst(nn.Module):
    """Has the rows first, which by chance may be as many as the images."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.rows(images[:, 0].transpose(0, 1)).mean(0))


def normed() -> nn.Module:
    linear = nn.Linear(36, 3)
    nn.init.normal_(linear.weight)
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(linear))


class Projecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(6, 5, batch_first=True, proj_size=2), nn.Linear(2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.rnn(images[:, 0])[0].mean(1))


SLOW = {
    "parameter": Scaled,
    "attention": Attending,
    "transformer": Transforming,
    "weight norm": normed,
    "bilinear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3), _Own()),
    "folded": Folding,
    "folded norm": FoldingNorm,
    "time first": TimeFirst,
    "projecting lstm": Projecting,
    "plain recurrent": lambda: Sequences(nn.RNN, batch_first=True),
}


class _Own(nn.Linear):
    """A layer of a kind of its own, which may do anything with its weights."""

    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.sum()


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("images", [[2, 1, 3], [1] * 6])
def test_what_has_no_rule_goes_patient_by_patient_and_says_so_once(
    name: str, images: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net, batch = SLOW[name](), batch_of(images)
    with (
        caplog.at_level(logging.WARNING),
        bookkeeping_engine(net, entropy, max_grad_norm=0.5) as gradient_of,
    ):
        for _ in range(2):
            found = flat(gradient_of(batch).gradients)
    assert relative(found, patient_by_patient(net, entropy, batch, norm=0.5)) < 1e-5
    assert len([r for r in caplog.records if "pass one by one" in r.message]) == 1


def test_a_layer_that_is_not_given_images_first_is_not_trusted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net, batch = TimeFirst(), batch_of([1] * 6)  # six rows, six images
    with caplog.at_level(logging.WARNING):
        found = clipped(net, entropy, batch, norm=0.5)
    assert "rows is not given images first" in caplog.text
    assert relative(found, patient_by_patient(net, entropy, batch, norm=0.5)) < 1e-5


def test_nets_with_rules_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clipped(small_net(), entropy, batch_of([2, 1]), norm=1.0)
    assert not caplog.records


# --- what is refused, and what is left behind

MEETING = {
    "batch normalization": nn.BatchNorm2d(3),
    "batch normalization without parameters": nn.BatchNorm2d(3, affine=False),
    "running statistics": nn.InstanceNorm2d(3, track_running_stats=True),
}


@pytest.mark.parametrize("name", MEETING)
def test_a_net_in_which_patients_meet_by_batch_normalization_or_running_statistics_is_refused(
    name: str,
) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), MEETING[name], nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(ValueError, match=r"that keep no statistics over images.* in 1;"):
        clipped(net, entropy, batch_of([1, 1]), norm=1.0)


@pytest.mark.parametrize("name", ["AttentionUnet", "ResNet"])
def test_a_net_of_monai_with_batch_normalization_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="use group normalization"):
        clipped(monai_net(name), energy, batch_of([1], shape=(1, 8, 8)), norm=1.0)


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_changes_or_counts_over_the_batch_is_refused(
    setting: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=f"embedding without {next(iter(setting))}"):
        clipped(nn.Sequential(nn.Embedding(3, 3, **setting)), energy, batch_of([1]), norm=1.0)


def test_without_a_norm_there_is_nothing_to_clip_to() -> None:
    with (
        pytest.raises(ValueError, match="expected a max_grad_norm"),
        bookkeeping_engine(small_net(), entropy, max_grad_norm=None),
    ):
        pass


def test_without_a_parameter_to_train_there_is_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="all are frozen"):
        clipped(small_net().requires_grad_(False), entropy, batch_of([1]), norm=1.0)


FAILING: dict[str, tuple[Make, Loss]] = {
    "none": (small_net, entropy),
    "a hole": (lambda: Parts(outside), entropy),
    "a layer": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(7, 1)), entropy),
    "the loss": (small_net, lambda o, t: 1 / 0),  # type: ignore[dict-item]
    "recurrent": (lambda: Sequences(nn.GRU, batch_first=True), entropy),
    "slow": (Scaled, entropy),
}


@pytest.mark.parametrize("name", FAILING)
def test_no_hook_flag_or_gradient_is_left_on_the_net(name: str) -> None:
    make, loss = FAILING[name]
    net = make().train()
    next(net.parameters()).requires_grad_(name == "a layer")
    before, names = copy.deepcopy(net.state_dict()), [set(vars(m)) for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    try:
        clipped(net, loss, batch_of([2, 1]), norm=1.0)
    except (ValueError, RuntimeError, ZeroDivisionError):
        assert name in ("a hole", "a layer", "the loss")
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert [p.grad for p in net.parameters()] == [None] * len(flags)
    assert all(not p._backward_hooks for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [set(vars(m)) for m in net.modules()] == names
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("way", [twice, outside])
def test_the_graph_and_the_book_are_freed_with_the_step(way: Any) -> None:
    try:
        clipped(Parts(way), entropy, batch_of([2, 1]), norm=1.0)
    except ValueError:
        assert way is outside
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Book]


def test_the_engine_can_be_opened_again() -> None:
    net, batch = small_net(), batch_of([2, 1])
    once, again = (clipped(net, entropy, batch, norm=1.0) for _ in range(2))
    assert torch.equal(once, again)


def test_the_image_tried_first_draws_no_dropout_from_the_others() -> None:
    net, batch = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3)), batch_of([1, 1])
    torch.manual_seed(4)
    found = clipped(net, entropy, batch, norm=1e9)
    torch.manual_seed(4)
    losses = entropy(net(batch.images), batch.targets).sum()
    expected = flat(torch.autograd.grad(losses, list(net.parameters())))
    assert relative(found, expected) < 1e-5


def test_under_autocast_the_gradients_are_those_of_the_step_at_hand() -> None:
    net, batch = small_net(), batch_of([1, 2, 1])
    with (
        torch.autocast("cpu", torch.bfloat16),
        bookkeeping_engine(
            net, lambda o, t: entropy(o.float(), t), max_grad_norm=1e6
        ) as gradient_of,
    ):
        gradient_of(batch)
        with torch.no_grad():
            net[4].weight.mul_(-3)
        found = flat(gradient_of(batch).gradients)
    assert relative(found, patient_by_patient(net, entropy, batch, norm=1e6)) < 0.05


# --- automatic clipping


@pytest.mark.parametrize("engine", [opacus_engine, bookkeeping_engine])
@pytest.mark.parametrize("most_images", [2, 32])
@pytest.mark.parametrize("norm", [0.1, 3.0])
def test_automatic_clipping_equals_the_loop_with_either_engine(
    norm: float, most_images: int, engine: Engine
) -> None:
    net, batch = small_net(), batch_of([1, 3, 2, 4])
    expected = torch.zeros(sum(p.numel() for p in trainable(net))).double()
    for patient in range(batch.num_patients):
        ours = batch.owner == patient
        mean = entropy(net(batch.images[ours]), batch.targets[ours]).mean()
        gradient = flat(torch.autograd.grad(mean, trainable(net)))
        expected += gradient * norm / (gradient.norm() + 0.01)
    terms: dict[str, Any] = {"most_images": most_images, "clipping": "automatic"}
    with engine(net, entropy, max_grad_norm=norm, **terms) as gradient_of:
        found = gradient_of(batch)
    assert relative(flat(found.gradients), expected) < 1e-5
    assert found.num_non_finite == 0


@pytest.mark.parametrize("engine", [opacus_engine, bookkeeping_engine])
def test_one_patient_changes_an_automatically_clipped_sum_by_at_most_the_norm(
    engine: Engine,
) -> None:
    net, batch = small_net(), batch_of([1, 3, 2, 4])
    with engine(net, entropy, max_grad_norm=0.5, clipping="automatic") as gradient_of:
        whole = flat(gradient_of(batch).gradients)
        for patient in range(batch.num_patients):
            rest = flat(gradient_of(without(batch, patient)).gradients)
            assert 0.4 < float((whole - rest).norm()) < 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("engine", [opacus_engine, bookkeeping_engine])
def test_automatic_clipping_leaves_out_a_patient_that_is_not_finite(engine: Engine) -> None:
    net, batch = small_net(), batch_of([1, 3, 2])
    spoiled = batch._replace(images=batch.images.clone())
    spoiled.images[2] = torch.nan
    with engine(net, entropy, max_grad_norm=0.5, clipping="automatic") as gradient_of:
        found, expected = gradient_of(spoiled), gradient_of(without(batch, 1))
    assert found.num_non_finite == 1
    assert relative(flat(found.gradients), flat(expected.gradients)) < 1e-5

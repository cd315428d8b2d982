"""Every net can be trained under privacy, and its weights depend on the seed alone."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets.unet import UNet
from opacus.validators import ModuleValidator
from torch import nn

from shared_models import nets
from shared_models.nets.base import load_weights, made_private_ready, weights_of
from shared_models.registry import find
from shared_models.weights import flatten

#: name, parameters, input shape, output shape for three outputs, or what a family always gives.
SMALL: list[tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ("densenet", {}, (2, 1, 32, 32), (2, 3)),
    ("densenet", {"spatial_dims": 3, "block_config": [1, 1]}, (2, 1, 16, 16, 16), (2, 3)),
    ("densenet", {"in_channels": 3}, (2, 3, 32, 32), (2, 3)),
    ("autoencoder", {"size": 16, "channels": [4, 8]}, (2, 1, 16, 16), (2, 17 + 3 * 256)),
    ("autoencoder", {"size": 16, "latent": 4, "variational": True}, (2, 2, 16, 16), (2, 773)),
    ("centres", {"size": 16, "latent": 4}, (2, 1, 16, 16), (2, 9)),
    ("centernet", {"stem": [4, 8], "channels": [8, 8]}, (2, 1, 32, 48), (2, 3, 8, 12)),
    ("gan", {"size": 16, "channels": 4}, (2, 1, 16, 16), (2, 3)),
    ("recurrent", {"channels": [4, 8]}, (2, 1, 5, 16, 16), (2, 3)),
    ("recurrent", {"channels": [4, 8], "cell": "lstm"}, (2, 1, 5, 16, 16), (2, 3)),
    ("walker", {}, (2, 2, 11, 11), (2, 3)),
    ("walker", {"spatial_dims": 3}, (2, 2, 11, 11, 11), (2, 3)),
    ("unet", {}, (2, 1, 16, 20), (2, 3, 16, 20)),
    ("unet", {"spatial_dims": 3}, (2, 1, 8, 12, 16), (2, 3, 8, 12, 16)),
    ("unet", {"norm": "instance", "num_res_units": 2}, (2, 1, 16, 16), (2, 3, 16, 16)),
    ("dncnn", {"channels": 4}, (2, 1, 9, 12), (2, 3, 9, 12)),
    ("dncnn", {"spatial_dims": 3, "in_channels": 4}, (2, 4, 5, 9, 8), (2, 3, 5, 9, 8)),
    ("unrolled", {"cascades": 2, "depth": 2}, (2, 3, 12, 9), (2, 2, 12, 9)),
    ("unrolled", {"spatial_dims": 3, "channels": 4}, (2, 3, 3, 8, 9), (2, 2, 3, 8, 9)),
]
#: What images do not reach: a task trains it by a loss that sees no patient, or beforehand.
APART = {"centres": ("encoder.", "decoder."), "gan": ("generator.",)}
small = pytest.mark.parametrize(
    ("name", "params", "given", "expected"), SMALL, ids=lambda v: v if isinstance(v, str) else ""
)


def make(name: str, params: dict[str, Any], *, seed: int = 1) -> nn.Module:
    return nets.make(name, params, seed=seed, num_outputs=2 if name == "unrolled" else 3)


def test_every_net_is_tried_here() -> None:
    assert {name for name, *_ in SMALL} == set(nets.BUILTIN)


@small
def test_a_net_gives_the_outputs_its_task_asks_for(
    name: str, params: dict[str, Any], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    outputs = make(name, params)(torch.randn(given, generator=torch.Generator().manual_seed(0)))
    assert outputs.shape == expected
    assert outputs.dtype == torch.float32


@small
def test_opacus_finds_nothing_it_could_not_protect(
    name: str, params: dict[str, Any], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    found = ModuleValidator.validate(make(name, params).train(), strict=False)
    # its own GRU and LSTM are other classes; the book-keeping engine takes torch's
    assert [error for error in found if "We do not support nn." not in str(error)] == []


@small
def test_an_images_output_does_not_depend_on_its_neighbours(
    name: str, params: dict[str, Any], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    net = make(name, params).train()
    images = torch.randn(given, generator=torch.Generator().manual_seed(0))
    other = torch.cat([images[:1], 5 + 3 * images[1:]])
    assert torch.allclose(net(images)[0], net(other)[0], atol=1e-5)


@small
def test_no_layer_works_in_place(
    name: str, params: dict[str, Any], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert not any(getattr(module, "inplace", False) for module in make(name, params).modules())


@small
def test_the_seed_alone_decides_the_weights(
    name: str, params: dict[str, Any], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    first = flatten(weights_of(make(name, params)))
    torch.manual_seed(2)
    assert np.array_equal(first, flatten(weights_of(make(name, params))))
    assert not np.array_equal(first, flatten(weights_of(make(name, params, seed=2))))


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    make("densenet", {})
    assert torch.equal(torch.get_rng_state(), before)


@small
def test_weights_come_back_and_give_the_same_outputs(
    name: str, params: dict[str, Any], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    net, other = make(name, params), make(name, params, seed=9)
    load_weights(other, weights_of(net))
    images = torch.ones(given)
    assert torch.equal(net(images), other(images))


def test_weights_taken_out_are_a_copy() -> None:
    net = nn.Linear(2, 2)
    taken = weights_of(net)
    taken["weight"][:] = 7.0
    load_weights(net, taken)
    taken["weight"][:] = 8.0
    assert net.weight.detach().tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert all(value.dtype == np.float32 for value in taken.values())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_of_another_net_are_refused(change: str) -> None:
    net = nn.Linear(2, 2)
    weights = weights_of(net)
    if change == "missing":
        del weights["bias"]
    elif change == "unknown":
        weights["other"] = np.zeros(1, np.float32)
    else:
        weights["bias"] = np.zeros(3, np.float32)
    with pytest.raises(RuntimeError, match="expected the weights of Linear, got others: "):
        load_weights(net, weights)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
)
def test_batch_statistics_are_refused_with_the_layer_and_the_cure(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))
    with pytest.raises(ValueError, match=r"got them in 1\.0; use group or instance normalization"):
        made_private_ready(net)


def test_group_and_instance_normalization_are_welcome() -> None:
    net = nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm2d(2), nn.LayerNorm(2))
    assert made_private_ready(net) is net


def test_in_place_activations_are_switched_off() -> None:
    net = made_private_ready(nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(inplace=True)))
    assert [module.inplace for module in net] == [False, False]


def test_buffers_of_whole_numbers_cannot_be_weights() -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected float parameters only, got others in steps"):
        weights_of(net)


def test_a_unet_is_monais_with_the_parameters_of_the_plan() -> None:
    ours = find("nets", "unet", builtin=nets.BUILTIN)(num_outputs=2, channels=[4, 8], strides=[2])
    theirs = UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(4, 8),
        strides=(2,),
        norm=("group", {"num_groups": 4}),
    )
    shapes = [{n: v.shape for n, v in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("params", [{"spatial_dims": 3}, {"stem": []}, {"channels": [8]}])
def test_a_detector_has_two_dimensions_and_a_stem(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make("centernet", params)


def test_a_unet_knows_two_normalizations() -> None:
    with pytest.raises(ValueError, match="expected norm as 'group' or 'instance', got 'batch'"):
        make("unet", {"norm": "batch"})


@small
def test_every_parameter_learns(
    name: str, params: dict[str, Any], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    net = make(name, params)
    images = torch.randn(given, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(images).square().sum().backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert [n for n in still if not n.startswith(APART.get(name, ()))] == []

"""Patients who meet inside a net are found by what it answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from client.probe import mixes_images
from shared_models import nets


class Centred(nn.Module):
    """Takes the batch's mean away, with no layer that anybody could know by its type."""

    def forward(self, images: Tensor) -> Tensor:
        return images - images.mean(dim=0, keepdim=True)


class Attending(nn.Module):
    """Lets the images of a batch look at each other."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return torch.softmax(flat @ flat.T / flat.shape[1], dim=1) @ flat


class Pooled(nn.Module):
    """Answers once for the whole batch."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=0, keepdim=True)


def images(*size: int) -> Tensor:
    return torch.randn((3, 1, *size), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [Centred, Attending, Pooled])
def test_a_net_in_which_patients_meet_in_whatever_way_is_found(make: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), make(), nn.Flatten()).train()
    assert mixes_images(net, images(8, 8))
    assert net.training


@pytest.mark.parametrize(
    ("family", "params", "size"),
    [
        ("densenet", {"init_features": 8, "block_config": [2, 2]}, (32, 32)),
        ("densenet", {"spatial_dims": 3, "init_features": 8, "block_config": [1]}, (16, 16, 16)),
        ("unet", {"channels": [4, 8, 8]}, (16, 16)),
        ("unet", {"spatial_dims": 3, "channels": [4, 8, 8]}, (16, 16, 16)),
    ],
)
def test_our_nets_are_not(family: str, params: dict[str, object], size: tuple[int, ...]) -> None:
    net = nets.make(family, params, seed=1, num_outputs=3)
    assert not mixes_images(net, images(*size))


def test_dropout_is_not_mistaken_for_patients_who_meet() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Dropout(0.5)).train()
    assert not mixes_images(net, images(8, 8))
    assert net.training

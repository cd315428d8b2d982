"""A detector without anchors: a map of what has its centre where, and how large it is.

References:
    Zhou et al. 2019, Objects as points (CenterNet), https://arxiv.org/abs/1904.07850.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    in_channels: int = 1,
    stem: Sequence[int] = (12, 24),
    channels: Sequence[int] = (32, 48, 64),
    num_groups: int = 4,
) -> nn.Module:
    """Return a net (batch, in_channels, y, x) to (batch, num_outputs, y / s, x / s).

    The stem halves the image once for each of its numbers, which makes s; then comes a U-Net
    (MONAI) of ``channels``, which halves between each two of them and doubles again. Sizes must be
    divisible by two that often.

    Raises:
        ValueError: if there are not two dimensions, no stem, or no two channels.
    """
    if spatial_dims != 2:
        raise ValueError("expected spatial_dims = 2: boxes are found in single pictures")
    if not stem or len(channels) < 2:
        raise ValueError("expected one or more numbers in stem and two or more in channels")
    from monai.networks.nets.unet import UNet

    layers: list[nn.Module] = []
    for before, after in zip((in_channels, *stem), stem, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        layers += [nn.GroupNorm(num_groups, after), nn.PReLU()]
    body = UNet(
        spatial_dims=2,
        in_channels=stem[-1],
        out_channels=channels[0],
        channels=tuple(channels),
        strides=(2,) * (len(channels) - 1),
        act="prelu",
        norm=("group", {"num_groups": num_groups}),
    )
    head = [
        nn.GroupNorm(num_groups, channels[0]),
        nn.PReLU(),
        nn.Conv2d(channels[0], num_outputs, 1),
    ]
    return nn.Sequential(*layers, body, *head)

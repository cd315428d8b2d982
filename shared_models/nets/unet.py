"""U-Net with group or instance normalization (MONAI), for segmentation in two or three dimensions.

References:
    Ronneberger et al. 2015, U-Net, https://arxiv.org/abs/1505.04597. Kerfoot et al. 2019,
    Left-ventricle quantification using residual U-Net (the variant MONAI builds).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch.nn import Module


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    in_channels: int = 1,
    channels: Sequence[int] = (8, 16, 32),
    strides: Sequence[int] = (2, 2),
    num_res_units: int = 0,
    norm: Literal["group", "instance"] = "group",
    num_groups: int = 4,
) -> Module:
    """Return a U-Net: (batch, in_channels, [z,] y, x) to (batch, num_outputs, [z,] y, x).

    Every spatial size must be divisible by the product of ``strides``. With residual units the last
    layer normalizes its outputs too: choose ``norm="instance"`` (without weights of its own), or
    ``num_groups`` that divides ``num_outputs``.

    Raises:
        ValueError: if ``norm`` is neither, or ``num_groups`` does not divide a layer's channels.
    """
    if norm not in ("group", "instance"):
        raise ValueError(f"expected norm as 'group' or 'instance', got '{norm}'")
    from monai.networks.nets.unet import UNet

    return UNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=num_outputs,
        channels=tuple(channels),
        strides=tuple(strides),
        num_res_units=num_res_units,
        act="prelu",
        norm=("group", {"num_groups": num_groups}) if norm == "group" else "instance",
    )

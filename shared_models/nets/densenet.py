"""DenseNet with group normalization (MONAI), for classification.

References:
    Huang et al. 2017, Densely connected convolutional networks, https://arxiv.org/abs/1608.06993.
    Wu and He 2018, Group normalization, https://arxiv.org/abs/1803.08494.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import Module


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    in_channels: int = 1,
    init_features: int = 16,
    growth_rate: int = 8,
    block_config: Sequence[int] = (2, 2, 2),
    num_groups: int = 4,
) -> Module:
    """Return a DenseNet: (batch, in_channels, [z,] y, x) to (batch, num_outputs)."""
    from monai.networks.nets.densenet import DenseNet

    return DenseNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=num_outputs,
        init_features=init_features,
        growth_rate=growth_rate,
        block_config=tuple(block_config),
        norm=("group", {"num_groups": num_groups}),
    )

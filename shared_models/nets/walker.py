"""A small convolutional net that values the moves of an agent from what it sees around itself.

References:
    Mnih et al. 2015, Human-level control through deep reinforcement learning. Alansary et al. 2019,
    Evaluating reinforcement learning agents for anatomical landmark detection, Medical Image
    Analysis 53, 156-164.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    in_channels: int = 2,
    channels: Sequence[int] = (16, 32),
    hidden: int = 64,
    num_groups: int = 4,
) -> nn.Module:
    """Return a net (batch, in_channels, [z,] y, x) to (batch, num_outputs).

    Given twice the channels, a state and the one after it, it answers for both, (batch, 2 x
    num_outputs), and only the first answer has a gradient.
    """
    return _Walker(num_outputs, spatial_dims, in_channels, channels, hidden, num_groups)


class _Walker(nn.Module):
    def __init__(
        self,
        num_outputs: int,
        spatial_dims: int,
        in_channels: int,
        channels: Sequence[int],
        hidden: int,
        num_groups: int,
    ) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        pool = nn.AdaptiveAvgPool3d if spatial_dims == 3 else nn.AdaptiveAvgPool2d
        layers: list[nn.Module] = []
        before = in_channels
        for after in channels:
            layers += [conv(before, after, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(num_groups, after), nn.PReLU()]
            before = after
        layers += [pool(3), nn.Flatten(), nn.Linear(before * 3**spatial_dims, hidden), nn.PReLU()]
        layers += [nn.Linear(hidden, num_outputs)]
        self.in_channels = in_channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        now: Tensor = self.layers(x[:, : self.in_channels])
        if x.shape[1] == self.in_channels:
            return now
        with torch.no_grad():
            after = self.layers(x[:, self.in_channels :])
        return torch.cat([now, after], dim=1)

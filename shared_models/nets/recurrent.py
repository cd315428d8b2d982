"""A convolutional encoder of slices and a recurrent net that reads them in their order.

References:
    Cho et al. 2014, Learning phrase representations (GRU), https://arxiv.org/abs/1406.1078.
    Hochreiter and Schmidhuber 1997, Long short-term memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 3,
    in_channels: int = 1,
    channels: Sequence[int] = (8, 16, 32),
    hidden: int = 32,
    cell: Literal["gru", "lstm"] = "gru",
    num_groups: int = 4,
) -> nn.Module:
    """Return a net (batch, in_channels, z, y, x) to (batch, num_outputs) that reads along z.

    Each slice is seen by itself (kernels of one voxel along z); what the recurrent net says after
    each is averaged.

    Raises:
        ValueError: if there are not three dimensions, or ``cell`` is neither.
    """
    if spatial_dims != 3:
        raise ValueError("expected spatial_dims = 3: slices are read one after the other")
    if cell not in ("gru", "lstm"):
        raise ValueError("expected cell as 'gru' or 'lstm'")
    return _Reader(num_outputs, in_channels, tuple(channels), hidden, cell, num_groups)


class _Reader(nn.Module):
    def __init__(
        self,
        num_outputs: int,
        in_channels: int,
        channels: tuple[int, ...],
        hidden: int,
        cell: str,
        num_groups: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((in_channels, *channels), channels, strict=False):
            layers += [nn.Conv3d(before, after, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))]
            layers += [nn.GroupNorm(num_groups, after), nn.PReLU()]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool3d((None, 2, 2)))
        kind = nn.GRU if cell == "gru" else nn.LSTM
        self.reader = kind(4 * channels[-1], hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.encoder(images).permute(0, 2, 1, 3, 4).flatten(2)
        found: Tensor = self.head(self.reader(seen)[0].mean(dim=1))
        return found

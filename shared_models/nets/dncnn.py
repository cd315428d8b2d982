"""DnCNN without normalization: convolutions that say what to add to their input.

Its last layer begins at zero, so an untrained net gives back what it is given.

References:
    Zhang et al. 2017, Beyond a Gaussian denoiser, https://arxiv.org/abs/1608.03981 (there with
    batch normalization, which no net here may keep).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    in_channels: int = 1,
    channels: int = 16,
    depth: int = 5,
) -> nn.Module:
    """Return a DnCNN: (batch, in_channels, [z,] y, x) to (batch, num_outputs, [z,] y, x).

    Outputs are changes to the first channels of the input, or to its only one.

    Raises:
        ValueError: if there are fewer than two layers, or channels to change.
    """
    return Residual(spatial_dims, in_channels, num_outputs, channels=channels, depth=depth)


class Residual(nn.Module):
    """The first ``num_outputs`` channels of the input, or its only one, plus what layers add."""

    def __init__(
        self, spatial_dims: int, in_channels: int, num_outputs: int, *, channels: int, depth: int
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"expected a depth of at least 2 layers, got {depth}")
        if 1 < in_channels < num_outputs:
            raise ValueError(
                f"expected in_channels as 1 or at least the {num_outputs} outputs, "
                f"got {in_channels}"
            )
        from monai.networks.blocks.convolutions import Convolution

        widths = [in_channels, *[channels] * (depth - 1)]
        layers = [
            Convolution(spatial_dims, a, b, act="prelu", norm=None) for a, b in pairwise(widths)
        ]
        last = Convolution(spatial_dims, channels, num_outputs, conv_only=True)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.num_outputs = num_outputs
        self.layers = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, num_outputs, [z,] y, x)."""
        changed: Tensor = images[:, : self.num_outputs] + self.layers(images)
        return changed

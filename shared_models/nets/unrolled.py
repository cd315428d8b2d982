"""Unrolled reconstruction: small networks in turn with what was measured of k-space.

References:
    Schlemper et al. 2018, A deep cascade of convolutional neural networks for dynamic MR image
    reconstruction, https://arxiv.org/abs/1704.02422: cascades with data consistency.
"""

from __future__ import annotations

from torch import Tensor, nn

from shared_models.kspace import consistent, measured
from shared_models.nets.dncnn import Residual


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    cascades: int = 3,
    channels: int = 16,
    depth: int = 4,
) -> nn.Module:
    """Return the net: (batch, 3, [z,] y, x) to a complex image (batch, 2, [z,] y, x).

    Its input is the zero-filled image, real and imaginary, and the mask; see ``kspace``. What was
    measured stays as it was measured, whatever the weights.

    Raises:
        ValueError: if two outputs are not what the task wants, or there is no cascade.
    """
    if num_outputs != 2:
        raise ValueError(f"expected a task of two outputs, real and imaginary, got {num_outputs}")
    if cascades < 1:
        raise ValueError(f"expected at least one cascade, got {cascades}")
    return Unrolled(
        [Residual(spatial_dims, 2, 2, channels=channels, depth=depth) for _ in range(cascades)]
    )


class Unrolled(nn.Module):
    """Each part changes the image, whose k-space is then set to what was measured."""

    def __init__(self, parts: list[Residual]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the complex image (batch, 2, [z,] y, x)."""
        image, mask = inputs[:, :2].float(), inputs[:, 2]
        known = measured(image)
        for part in self.parts:
            image = consistent(part(image).float(), known, mask)
        return image

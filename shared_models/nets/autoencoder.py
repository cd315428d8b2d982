"""An autoencoder of pictures, plain or variational, and the two halves other families use.

References:
    Hinton and Salakhutdinov 2006, Reducing the dimensionality of data with neural networks. Kingma
    and Welling 2014, Auto-encoding variational Bayes, https://arxiv.org/abs/1312.6114 (appendix B:
    the divergence). Odena et al. 2016, Deconvolution and checkerboard artifacts (resize, then
    convolve).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

#: What the logarithm of a variance is kept within, so that no noise makes it infinite.
LOG_VARIANCE = 10.0


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    in_channels: int = 1,
    size: int = 64,
    channels: Sequence[int] = (8, 16, 32),
    latent: int = 16,
    num_groups: int = 4,
    variational: bool = False,
) -> nn.Module:
    """Return a net from (batch, channel, y, x) to (batch, 1 + latent + num_outputs * size * size).

    The answer's columns: the divergence of the embedding from standard normal noise (0 for a plain
    one), the embedding, and the reconstruction, flattened. A variational net takes its noise from
    the channels after ``in_channels``; where there are none, it decodes the mean.

    Raises:
        ValueError: if there are not two dimensions, or ``size`` cannot be halved so often.
    """
    check_halving(size, channels, spatial_dims)
    return _Autoencoder(
        encoder(in_channels, channels, size, latent * (1 + variational), num_groups),
        decoder(latent, channels, size, num_outputs, num_groups),
        in_channels,
        latent if variational else 0,
    )


def check_halving(size: int, channels: Sequence[int], spatial_dims: int) -> None:
    """Refuse volumes, and pictures that cannot be halved once for each of ``channels``.

    Raises:
        ValueError: if so.
    """
    if spatial_dims != 2 or size % 2 ** len(channels):
        raise ValueError(
            "expected spatial_dims = 2 and a size that can be halved once for each of channels"
        )


def encoder(
    in_channels: int, channels: Sequence[int], size: int, outputs: int, num_groups: int
) -> nn.Sequential:
    """Return what halves a picture once for each of ``channels`` and gives ``outputs`` numbers."""
    layers: list[nn.Module] = []
    for before, after in zip((in_channels, *channels), channels, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        layers += [nn.GroupNorm(num_groups, after), nn.PReLU()]
    inner = channels[-1] * (size // 2 ** len(channels)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner, outputs))


def decoder(
    inputs: int, channels: Sequence[int], size: int, out_channels: int, num_groups: int
) -> nn.Sequential:
    """Return the way back, from ``inputs`` numbers to a picture of ``size``, doubling each time."""
    edge = size // 2 ** len(channels)
    layers: list[nn.Module] = [nn.Linear(inputs, channels[-1] * edge**2)]
    layers += [nn.Unflatten(1, (channels[-1], edge, edge))]
    down = list(channels)[::-1]
    for before, after in pairwise(down):
        layers += [nn.PReLU(), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(num_groups, after)]
    layers += [nn.PReLU(), nn.Upsample(scale_factor=2)]
    return nn.Sequential(*layers, nn.Conv2d(down[-1], out_channels, 3, padding=1))


class _Autoencoder(nn.Module):
    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, in_channels: int, num_noises: int
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.in_channels, self.num_noises = in_channels, num_noises

    def forward(self, inputs: Tensor) -> Tensor:
        encoded = self.encoder(inputs[:, : self.in_channels])
        if not self.num_noises:
            nothing = encoded.new_zeros((len(encoded), 1))
            return torch.cat([nothing, encoded, self.decoder(encoded).flatten(1)], dim=1)
        mean, logs = encoded.chunk(2, dim=1)
        logs = logs.clamp(-LOG_VARIANCE, LOG_VARIANCE)
        divergence = (logs.exp() + mean.square() - 1 - logs).sum(dim=1, keepdim=True) / 2
        drawn = mean
        if inputs.shape[1] > self.in_channels:
            noise = inputs[:, self.in_channels :].flatten(1)[:, : self.num_noises]
            drawn = mean + (logs / 2).exp() * noise
        return torch.cat([divergence, mean, self.decoder(drawn).flatten(1)], dim=1)

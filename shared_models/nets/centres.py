"""Cluster centres in the space of an encoder that stays as it was sent.

A round of k-means needs, of each patient, only which centre is nearest and how far off it is. Both
are gradients here: those of ``counts`` and of ``sums``, by which the net's answer is linear. The
engine clips and noises them like any gradient, and the strategy ``lloyd`` moves the centres.

References:
    Lloyd 1982, Least squares quantization in PCM. Blum et al. 2005, Practical privacy: the SuLQ
    framework (k-means from noised sums and counts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from shared_models.nets.autoencoder import check_halving, decoder, encoder


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    in_channels: int = 1,
    size: int = 64,
    channels: Sequence[int] = (8, 16, 32),
    latent: int = 16,
    num_groups: int = 4,
) -> nn.Module:
    """Return a net with ``num_outputs`` centres: (batch, channel, y, x) to (batch, 2 + k + latent).

    The answer's columns: one whose gradient is the sum and the count of the nearest centre, the
    number of that centre, the squared distance to each centre, and the embedding, of length one.
    ``reconstructed`` gives the picture back, by which a warm start trains the encoder.

    Raises:
        ValueError: if there are not two dimensions, or ``size`` cannot be halved so often.
    """
    check_halving(size, channels, spatial_dims)
    return _Centres(
        encoder(in_channels, channels, size, latent, num_groups),
        decoder(latent, channels, size, in_channels, num_groups),
        num_outputs,
        latent,
    )


class _Centres(nn.Module):
    centres: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, num_centres: int, latent: int
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.sums = nn.Linear(latent, num_centres, bias=False)
        self.counts = nn.Linear(num_centres, 1, bias=False)
        nn.init.zeros_(self.sums.weight)
        nn.init.zeros_(self.counts.weight)
        self.register_buffer("centres", normalize(torch.randn(num_centres, latent), dim=1))

    def embedded(self, images: Tensor) -> Tensor:
        """Return the embeddings (batch, latent), each of length one."""
        found: Tensor = normalize(self.encoder(images), dim=1)
        return found

    def reconstructed(self, images: Tensor) -> Tensor:
        """Return the images as the decoder makes them again from their embeddings."""
        found: Tensor = self.decoder(self.embedded(images))
        return found

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            embedded = self.embedded(images)
            apart = torch.cdist(embedded, self.centres).square()
            nearest = one_hot(apart.argmin(dim=1), len(self.centres)).to(embedded)
            offset = embedded - nearest @ self.centres
        told = (self.sums(offset) * nearest).sum(dim=1, keepdim=True) + self.counts(nearest)
        number = apart.argmin(dim=1, keepdim=True).to(told)
        return torch.cat([told, number, apart, embedded], dim=1)

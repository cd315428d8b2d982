"""A generator and a discriminator of one size, both told the class.

References:
    Goodfellow et al. 2014, Generative adversarial nets, https://arxiv.org/abs/1406.2661. Radford et
    al. 2016, DCGAN, https://arxiv.org/abs/1511.06434 (without its batch normalization). Odena et
    al. 2016, Deconvolution and checkerboard artifacts (resize, then convolve).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot


def make(
    *,
    num_outputs: int,
    spatial_dims: int = 2,
    size: int = 64,
    latent: int = 32,
    channels: int = 16,
    num_groups: int = 4,
) -> nn.Module:
    """Return a pair with ``generator`` and ``discriminator`` for pictures of ``size`` squared.

    The net itself is the discriminator: (batch, 1, y, x) to (batch, num_outputs), how real a
    picture is for each class. ``generated(noise, classes)`` gives pictures in [-1, 1]. A second
    channel, where there is one, carries noise and is not looked at.

    Raises:
        ValueError: if ``size`` is no power of two over 8, or there are not two dimensions.
    """
    if spatial_dims != 2 or size < 16 or size & (size - 1):
        raise ValueError("expected spatial_dims = 2 and a size of 16, 32, 64, 128 ...")
    return _Pair(num_outputs, size, latent, channels, num_groups)


class _Pair(nn.Module):
    def __init__(
        self, num_classes: int, size: int, latent: int, channels: int, num_groups: int
    ) -> None:
        super().__init__()
        self.num_classes, self.latent = num_classes, latent
        num_doublings = (size // 4).bit_length() - 1
        widths = [channels * 2 ** min(n, 3) for n in range(num_doublings)]
        self.generator = _generator(latent + num_classes, widths[::-1], num_groups)
        self.discriminator = _discriminator(num_classes, widths, num_groups)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.discriminator(images[:, :1])
        return found

    def generated(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Return pictures (n, 1, y, x) of ``classes`` (n,) from ``noise`` (n, latent)."""
        told = one_hot(classes, self.num_classes).to(noise)
        pictures: Tensor = self.generator(torch.cat([noise, told], dim=1))
        return pictures


def _generator(inputs: int, widths: list[int], num_groups: int) -> nn.Module:
    first = widths[0]
    layers: list[nn.Module] = [nn.Linear(inputs, first * 16), nn.Unflatten(1, (first, 4, 4))]
    for before, after in zip(widths, [*widths[1:], widths[-1]], strict=True):
        layers += [nn.GroupNorm(num_groups, before), nn.PReLU(), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(before, after, 3, padding=1)]
    layers += [nn.PReLU(), nn.Conv2d(widths[-1], 1, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers)


def _discriminator(num_classes: int, widths: list[int], num_groups: int) -> nn.Module:
    layers: list[nn.Module] = []
    before = 1
    for after in widths:
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        layers += [nn.GroupNorm(num_groups, after), nn.LeakyReLU(0.2)]
        before = after
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 16, num_classes))

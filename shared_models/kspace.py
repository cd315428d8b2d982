"""Images and what an MR scanner measures of them: k-space, in the plane.

A complex image is float (batch, 2, [z,] y, x), real and imaginary; k-space is complex
(batch, [z,] y, x) with its centre in the middle. A mask (batch, [z,] y, x) is 1 where k-space was
measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLANE = (-2, -1)


def complex_of(image: Tensor) -> Tensor:
    """Return (batch, 2, [z,] y, x) as complex (batch, [z,] y, x)."""
    return torch.complex(image[:, 0], image[:, 1])


def channels_of(values: Tensor) -> Tensor:
    """Return complex (batch, [z,] y, x) as (batch, 2, [z,] y, x)."""
    return torch.stack([values.real, values.imag], dim=1)


def measured(image: Tensor) -> Tensor:
    """Return the k-space of a complex image; noise keeps its deviation."""
    shifted = torch.fft.ifftshift(complex_of(image), dim=_PLANE)
    found: Tensor = torch.fft.fftshift(torch.fft.fft2(shifted, norm="ortho"), dim=_PLANE)
    return found


def imaged(kspace: Tensor) -> Tensor:
    """Return the complex image of a k-space."""
    shifted = torch.fft.ifftshift(kspace, dim=_PLANE)
    return channels_of(torch.fft.fftshift(torch.fft.ifft2(shifted, norm="ortho"), dim=_PLANE))


def consistent(image: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """Return ``image`` with its k-space as it was measured, ``known``, where ``mask`` is 1."""
    return imaged(torch.where(mask > 0.5, known, measured(image)))


def magnitude(image: Tensor) -> Tensor:
    """Return the magnitude of a complex image: (batch, 1, [z,] y, x)."""
    return complex_of(image).abs()[:, None]

"""Steps against noise and uneven coils. Filters work in the plane: slices are often far apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shared_models.errors import DataError
from shared_models.imaging import Step, on_image, on_values
from shared_models.volume import Volume

Array = NDArray[np.float32]
#: What is left of a Laplacian-like difference of an image without noise is near nothing.
_IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)


def gaussian(*, sigma_mm: float) -> Step:
    """Blur each slice by a Gaussian of ``sigma_mm``; edges are repeated."""
    _positive("sigma_mm", sigma_mm)

    def change(image: Volume) -> Array:
        _, y, x = image.spacing_mm
        blurred: Array = ndimage.gaussian_filter(
            image.data, sigma=(0.0, sigma_mm / y, sigma_mm / x), mode="nearest"
        )
        return blurred

    return on_image(change)


def median(*, radius: int = 1) -> Step:
    """Give each pixel the median of the square of ``2 radius + 1`` pixels around it."""
    _positive("radius", radius)

    def change(data: Array) -> Array:
        width = 2 * radius + 1
        found: Array = ndimage.median_filter(data, size=(1, width, width), mode="nearest")
        return found

    return on_values(change)


def bilateral(*, sigma_mm: float = 1.0, strength: float = 2.0) -> Step:
    """Average over near pixels of like value: ``strength`` noise deviations count as like.

    The noise is each slice's own, as ``noise_of`` estimates it.

    References:
        Tomasi and Manduchi 1998, Bilateral filtering for gray and color images.
    """
    _positive("sigma_mm", sigma_mm)
    _positive("strength", strength)

    def change(image: Volume) -> Array:
        from skimage.restoration import denoise_bilateral

        pixel_mm = float(np.mean(image.spacing_mm[1:]))
        found = [
            _on_unit(
                plane,
                lambda unit, noise: denoise_bilateral(
                    unit,
                    sigma_color=strength * noise,
                    sigma_spatial=sigma_mm / pixel_mm,
                    mode="edge",
                ),
            )
            for plane in image.data
        ]
        return np.stack(found)

    return on_image(change)


def non_local_means(*, patch: int = 5, distance: int = 6, strength: float = 0.8) -> Step:
    """Average over pixels whose ``patch`` looks alike, within ``distance`` pixels.

    The filter's parameter h is ``strength`` times each slice's noise, as ``noise_of`` estimates it.

    References:
        Buades, Coll and Morel 2005, A non-local algorithm for image denoising.
    """
    for name, value in (("patch", patch), ("distance", distance), ("strength", strength)):
        _positive(name, value)

    def change(data: Array) -> Array:
        from skimage.restoration import denoise_nl_means

        found = [
            _on_unit(
                plane,
                lambda unit, noise: denoise_nl_means(
                    unit,
                    patch_size=patch,
                    patch_distance=distance,
                    h=strength * noise,
                    sigma=noise,
                    fast_mode=True,
                ),
            )
            for plane in data
        ]
        return np.stack(found)

    return on_values(change)


def bias_field(*, shrink: int = 4, iterations: int = 50) -> Step:
    """Divide by the smooth gain of an MR coil, found on a grid ``shrink`` times coarser (N4).

    Values must not be negative. Only voxels over Otsu's threshold decide the gain.

    References:
        Tustison et al. 2010, N4ITK: improved N3 bias correction.
    """
    _positive("shrink", shrink)
    _positive("iterations", iterations)

    def change(image: Volume) -> Array:
        import SimpleITK

        if image.data.min() < 0:
            raise DataError("bias-field: expected no negative values; run it before standardizing")
        if image.data.max() == image.data.min():
            return image.data
        whole = SimpleITK.GetImageFromArray(image.data)
        whole.SetSpacing(image.spacing_mm[::-1])
        factors = [max(1, min(shrink, n // 4)) for n in whole.GetSize()]
        small = SimpleITK.Shrink(whole, factors)
        corrector = SimpleITK.N4BiasFieldCorrectionImageFilter()
        corrector.SetNumberOfThreads(1)  # so that the same image gives the same bits
        corrector.SetMaximumNumberOfIterations([iterations] * 3)
        corrector.Execute(small, SimpleITK.OtsuThreshold(small, 0, 1, 200))
        gain = SimpleITK.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(whole))
        even: Array = image.data / np.exp(gain)
        return even

    return on_image(change)


def noise_of(plane: Array) -> float:
    """Estimate the deviation of the noise of a slice (y, x); 0 where it is too small to tell.

    References:
        Immerkaer 1996, Fast noise variance estimation.
    """
    if min(plane.shape) < 3:
        return 0.0
    left = ndimage.convolve(plane, _IMMERKAER)[1:-1, 1:-1]
    return float(np.sqrt(np.pi / 2) * np.abs(left).mean() / 6)


def _on_unit(plane: Array, filtered: Callable[[Array, float], Array]) -> Array:
    """Run ``filtered(plane in [0, 1], its noise)`` and bring the result back to its own range."""
    low, high = float(plane.min()), float(plane.max())
    noise = noise_of(plane)
    if high == low or noise == 0:
        return plane
    scale = np.float32(high - low)
    unit = (plane - np.float32(low)) / scale
    return filtered(unit, noise / float(scale)).astype(np.float32) * scale + np.float32(low)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected {name} over 0, got {value}")

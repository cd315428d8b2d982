"""Steps against SciPy and numpy, and every voxel where it was in the patient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.stats import zscore

from shared_models.errors import DataError
from shared_models.imaging import pipeline
from shared_models.imaging.geometry import (
    crop_box,
    crop_foreground,
    crop_lungs,
    crop_or_pad,
    orient,
    resample,
    resize,
)
from shared_models.imaging.intensity import percentiles, standardize, window
from shared_models.volume import Volume

SPACING = (3.0, 0.8, 0.5)  # z, y, x
ROTATION = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


def noise(shape: tuple[int, ...] = (6, 9, 12), *, seed: int = 0) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = ROTATION @ np.diag(SPACING[::-1])
    affine[:3, 3] = (10, -20, 30)
    data = np.random.default_rng(seed).normal(50, 20, shape).astype(np.float32)
    return Volume(np.abs(data), affine, "CT")


def labels(shape: tuple[int, ...] = (6, 9, 12), *, seed: int = 0) -> Volume:
    data = np.random.default_rng(seed).integers(0, 3, shape).astype(np.float32)
    return noise(shape)._replace(data=data)


def positions(volume: Volume) -> np.ndarray:
    """Return where every voxel lies: (z, y, x, 3), mm."""
    z, y, x = np.indices(volume.data.shape)
    return np.stack([x, y, z], axis=-1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def ramp(volume: Volume) -> Volume:
    """Return the volume with each voxel's value a plane in millimetres of the patient."""
    value = positions(volume) @ [0.3, -0.2, 0.7] + 5
    return volume._replace(data=value.astype(np.float32))


def corners(volume: Volume) -> np.ndarray:
    """Return two opposite outer corners of the grid, half a voxel beyond the outermost centres."""
    ends = np.array([[-0.5] * 3, [n - 0.5 for n in volume.data.shape[::-1]]])
    return np.asarray(ends @ volume.affine[:3, :3].T + volume.affine[:3, 3])


STEPS: list[tuple[str, dict[str, Any]]] = [
    ("resample", {"spacing_mm": [1.5, 1.0, 1.0]}),
    ("resize", {"size": [4, 5, 6]}),
    ("crop-or-pad", {"size": [8, 5, 14]}),
    ("window", {"low": 20.0, "high": 80.0}),
    ("standardize", {}),
    ("percentiles", {}),
    ("min-max", {}),
    ("landmarks", {"percents": [1, 50, 99], "values": [0, 40, 100]}),
    ("gamma", {"gamma": 0.5}),
    ("bright-foreground", {}),
    ("equalize", {}),
    ("clahe", {"tiles": 2}),
    ("gaussian", {"sigma_mm": 1.0}),
    ("median", {}),
    ("bilateral", {}),
    ("non-local-means", {}),
    ("bias-field", {"iterations": 5}),
    ("crop-box", {"low": [0.0, 0.2, 0.1], "high": [1.0, 0.8, 0.7]}),
    ("crop-foreground", {}),
    ("orient", {"axes": "RAS"}),
]
GRID = {"resample", "resize", "crop-or-pad", "crop-box", "crop-foreground", "orient"}
every_step = pytest.mark.parametrize("step", STEPS, ids=lambda s: s[0])


@every_step
@pytest.mark.parametrize("with_label", [False, True])
def test_a_step_leaves_its_argument_alone(
    step: tuple[str, dict[str, Any]], with_label: bool
) -> None:
    given = (noise(), labels()) if with_label else (noise(), None)
    before = [(v.data.copy(), v.affine.copy()) for v in given if v]
    pipeline([step])(*given)
    for volume, (data, affine) in zip(given, before, strict=False):
        assert volume is not None
        assert np.array_equal(volume.data, data)
        assert np.array_equal(volume.affine, affine)


@every_step
def test_a_step_keeps_float32_and_the_modality(step: tuple[str, dict[str, Any]]) -> None:
    done, none = pipeline([step])(noise())
    assert none is None
    assert done.data.dtype == np.float32
    assert done.modality == "CT"
    assert np.isfinite(done.data).all()


@every_step
def test_a_label_keeps_its_classes(step: tuple[str, dict[str, Any]]) -> None:
    done = pipeline([step])(noise(), labels())[1]
    assert set(np.unique(done.data)) <= {0.0, 1.0, 2.0}


@every_step
def test_image_and_label_stay_on_one_grid(step: tuple[str, dict[str, Any]]) -> None:
    image, label = pipeline([step])(noise(), labels())
    assert image.data.shape == label.data.shape
    assert np.allclose(image.affine, label.affine)


@every_step
def test_what_becomes_of_a_volume_does_not_depend_on_those_before_it(
    step: tuple[str, dict[str, Any]],
) -> None:
    """Patient-level privacy rests on it: another patient's images must not show in this one's."""
    used, fresh = pipeline([step]), pipeline([step])
    for seed in (1, 2):
        used(noise(seed=seed), labels(seed=seed))
    assert np.array_equal(used(noise())[0].data, fresh(noise())[0].data)


@pytest.mark.parametrize("name", [name for name, _ in STEPS if name not in GRID])
def test_intensities_of_labels_are_left_alone(name: str) -> None:
    params = dict(STEPS)[name]
    assert np.array_equal(pipeline([(name, params)])(noise(), labels())[1].data, labels().data)


# --- geometry


@pytest.mark.parametrize("size", [(6, 9, 12), (12, 18, 24), (7, 11, 13), (6, 12, 9), (5, 7, 8)])
def test_linear_interpolation_is_that_of_scipy(size: tuple[int, int, int]) -> None:
    """At half-pixel centres; less than two to one, so that nothing is averaged first."""
    volume = noise()
    grid = np.meshgrid(
        *(
            (np.arange(new) + 0.5) * old / new - 0.5
            for old, new in zip(volume.data.shape, size, strict=True)
        ),
        indexing="ij",
    )
    theirs = map_coordinates(volume.data.astype(float), grid, order=1, mode="nearest")
    ours = resize(size=size)(volume)[0]
    assert np.allclose(ours.data, theirs, atol=1e-3)


@pytest.mark.parametrize("size", [(6, 9, 12), (18, 27, 36), (2, 3, 4), (5, 7, 11)])
def test_labels_take_the_nearest_voxel_as_scipy_does(size: tuple[int, int, int]) -> None:
    volume = labels()
    grid = np.meshgrid(
        *(
            (np.arange(new) + 0.5) * old / new - 0.5
            for old, new in zip(volume.data.shape, size, strict=True)
        ),
        indexing="ij",
    )
    theirs = map_coordinates(volume.data, grid, order=0, mode="nearest")
    ours = resize(size=size)(volume, volume)[1]
    assert np.array_equal(ours.data, theirs)


@pytest.mark.parametrize("size", [(12, 18, 24), (7, 11, 13), (3, 9, 6), (2, 3, 4), (4, 5, 5)])
def test_a_plane_in_the_patient_is_the_same_plane_after_resizing(
    size: tuple[int, int, int],
) -> None:
    """Values and affine agree: each voxel's new value is the plane's at its new place."""
    done = resize(size=size)(ramp(noise()))[0]
    inner = tuple(slice(1, -1) if n > 2 else slice(None) for n in size)
    tolerance = (
        0.0 if all(n % m == 0 or n < 2 * m for n, m in zip((6, 9, 12), size, strict=True)) else 1.0
    )
    assert np.allclose(done.data[inner], ramp(done).data[inner], atol=1e-3 + tolerance)


@given(shape=sizes, size=sizes)
def test_resizing_keeps_the_field_of_view(
    shape: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    volume = noise(shape)
    done = resize(size=size)(volume)[0]
    assert done.data.shape == size
    assert np.allclose(corners(done), corners(volume), atol=1e-6)


@given(
    shape=sizes,
    spacing=st.tuples(st.floats(0.3, 5), st.floats(0.3, 5), st.floats(0.3, 5)),
)
def test_resampling_keeps_the_field_of_view_and_comes_near_the_spacing(
    shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    volume = noise(shape)
    done = resample(spacing_mm=spacing)(volume)[0]
    assert np.allclose(corners(done), corners(volume), atol=1e-6)
    for have, want, new, extent in zip(SPACING, spacing, done.data.shape, shape, strict=True):
        assert new == max(1, round(extent * have / want))
        assert new == 1 or abs(new * want - extent * have) <= want / 2 + 1e-9


def test_resampling_to_the_spacing_there_is_changes_nothing() -> None:
    volume = noise()
    done = resample(spacing_mm=SPACING)(volume)[0]
    assert np.array_equal(done.data, volume.data)


def test_shrinking_averages_whole_blocks() -> None:
    volume = noise((4, 6, 8))
    done = resize(size=(2, 3, 2))(volume)[0]
    blocks = volume.data.reshape(2, 2, 3, 2, 2, 4).mean(axis=(1, 3, 5))
    assert np.allclose(done.data, blocks, atol=1e-4)


def test_shrinking_keeps_the_mean_of_fine_stripes() -> None:
    """Without averaging first, every fourth pixel of a one-pixel pattern would be aliasing."""
    stripes = np.zeros((1, 8, 64), np.float32)
    stripes[:, :, ::4] = 1.0
    done = resize(size=(8, 16))(noise()._replace(data=stripes))[0]
    assert np.allclose(done.data, 0.25)


def test_two_numbers_leave_the_slices_alone() -> None:
    volume = noise()
    assert resize(size=[5, 7])(volume)[0].data.shape == (6, 5, 7)
    assert crop_or_pad(size=[5, 7])(volume)[0].data.shape == (6, 5, 7)
    resampled = resample(spacing_mm=[1.6, 1.0])(volume)[0]
    assert resampled.spacing_mm[0] == pytest.approx(SPACING[0])


@given(shape=sizes, size=sizes)
def test_cutting_and_padding_moves_no_voxel_in_the_patient(
    shape: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    volume = noise(shape)
    done = crop_or_pad(size=size)(volume)[0]
    assert done.data.shape == size
    index = np.linalg.inv(volume.affine)
    old = np.rint(positions(done) @ index[:3, :3].T + index[:3, 3]).astype(int)[..., ::-1]
    inside = ((old >= 0) & (old < shape)).all(axis=-1)
    expected = np.full(size, volume.data.min())
    expected[inside] = volume.data[tuple(old[inside].T)]
    assert np.array_equal(done.data, expected)


@given(shape=sizes, size=sizes)
def test_cutting_and_padding_is_centred(
    shape: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    volume = noise(shape)
    done = crop_or_pad(size=size)(volume)[0]
    moved = corners(done).mean(axis=0) - corners(volume).mean(axis=0)
    voxels = np.linalg.solve(volume.affine[:3, :3], moved)
    assert (np.abs(voxels) <= 0.5 + 1e-9).all()


def test_a_label_is_padded_with_background() -> None:
    ones = labels()._replace(data=np.ones((2, 2, 2), np.float32))
    assert crop_or_pad(size=(4, 4, 4))(ones, ones)[1].data.sum() == 8


def test_padding_and_cutting_back_gives_the_same_volume() -> None:
    volume = noise()
    there = crop_or_pad(size=(9, 12, 13))(volume)[0]
    back = crop_or_pad(size=volume.data.shape)(there)[0]
    assert np.array_equal(back.data, volume.data)
    assert np.allclose(back.affine, volume.affine)


@pytest.mark.parametrize("make", [lambda v: resize(size=v), lambda v: crop_or_pad(size=v)])
@pytest.mark.parametrize("size", [[], [4], [1, 2, 3, 4], [0, 4], [4, -1, 4]])
def test_a_size_that_is_none_is_refused(make: Any, size: list[int]) -> None:
    with pytest.raises(ValueError, match="expected size as two or three positive numbers"):
        make(size)


@given(
    low=st.tuples(*[st.floats(0, 0.45)] * 3),
    high=st.tuples(*[st.floats(0.55, 1)] * 3),
)
def test_a_crop_moves_no_voxel_in_the_patient(
    low: tuple[float, ...], high: tuple[float, ...]
) -> None:
    done, _ = crop_box(low=low, high=high)(ramp(noise()))
    assert np.allclose(done.data, ramp(done).data, atol=1e-3)
    for n, new, a, b in zip((6, 9, 12), done.data.shape, low, high, strict=True):
        assert -1e-9 <= new - n * (b - a) < 2


@given(axes=st.sampled_from(["LPS", "RAS", "SAL", "PIR", "ASL", "IRP"]))
def test_orienting_is_that_of_simpleitk(axes: str) -> None:
    volume = ramp(noise())
    theirs = SimpleITK.DICOMOrient(itk_of(volume), axes)
    ours, _ = orient(axes=axes)(volume)
    assert np.array_equal(ours.data, SimpleITK.GetArrayFromImage(theirs))
    assert np.allclose(ours.affine, affine_of(theirs))


def itk_of(volume: Volume) -> Any:
    image = SimpleITK.GetImageFromArray(volume.data)
    image.SetSpacing(volume.spacing_mm[::-1])
    directions = volume.affine[:3, :3] / np.array(volume.spacing_mm[::-1])
    image.SetDirection(directions.ravel().tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    return image


def affine_of(image: Any) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


@pytest.mark.parametrize("axes", ["", "LP", "LRS", "XYZ", "lps", "LPSS"])
def test_axes_that_are_none_are_refused(axes: str) -> None:
    with pytest.raises(ValueError, match="expected three letters"):
        orient(axes=axes)


def test_the_foreground_is_the_largest_bright_part_and_its_margin() -> None:
    data = np.zeros((5, 20, 30), np.float32)
    data[1:4, 6:15, 8:20] = 100
    data[0, 0, 0] = 100  # a speck
    label = noise()._replace(data=(data > 0).astype(np.float32))
    image, map_ = crop_foreground(margin_mm=0.8)(noise()._replace(data=data), label)
    assert image.data.shape == map_.data.shape == (3, 11, 16)
    assert map_.data.sum() == 3 * 9 * 12
    assert np.allclose(image.affine, map_.affine)


def test_an_image_of_one_value_has_no_foreground() -> None:
    with pytest.raises(DataError, match="of one value"):
        crop_foreground()(noise()._replace(data=np.ones((2, 3, 4), np.float32)))


def chest() -> Volume:
    """Return a CT of 2 mm: air, a body, and in it two lungs and a bubble."""
    data = np.full((30, 80, 120), -1000, np.float32)
    data[:, 10:70, 10:110] = 40
    data[5:25, 20:60, 20:50] = -850
    data[5:25, 20:60, 70:100] = -820
    data[2:3, 64:66, 58:60] = -900
    return Volume(data, np.diag([2.0, 2.0, 2.0, 1.0]), "CT")


def test_the_lungs_are_the_air_inside_the_body() -> None:
    done, _ = crop_lungs(margin_mm=4)(chest())
    assert done.data.shape == (24, 44, 84)
    assert done.affine[:3, 3].tolist() == [36.0, 36.0, 6.0]


def test_where_there_is_no_lung_nothing_is_cut() -> None:
    with pytest.raises(DataError, match="no lung was found"):
        crop_lungs()(chest()._replace(data=np.full((4, 20, 20), 40, np.float32)))
    with pytest.raises(DataError, match="expected a CT"):
        crop_lungs()(chest()._replace(modality="MARKED-7731"))


# --- intensities


def test_a_window_maps_its_ends_to_minus_one_and_one_and_clips() -> None:
    values = np.array([-2000.0, -100.0, 75.0, 250.0, 3000.0], np.float32).reshape(1, 1, 5)
    done = window(low=-100, high=250)(noise()._replace(data=values))[0]
    assert done.data.ravel().tolist() == pytest.approx([-1, -1, 0, 1, 1])


def test_standardizing_is_scipys_zscore() -> None:
    done = standardize()(noise())[0]
    assert np.allclose(done.data, zscore(noise().data.astype(float), axis=None), atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 7.0, -1000.0])
@pytest.mark.parametrize("name", ["standardize", "percentiles"])
def test_an_image_of_one_value_stays_finite(name: str, value: float) -> None:
    flat = noise()._replace(data=np.full((2, 3, 4), value, np.float32))
    assert np.isfinite(pipeline([(name, {})])(flat)[0].data).all()


@given(
    factor=st.floats(0.01, 1000),
    shift=st.floats(-1000, 1000),
    name=st.sampled_from(["standardize", "percentiles"]),
)
def test_the_scale_of_a_scanner_is_forgotten(factor: float, shift: float, name: str) -> None:
    step = pipeline([(name, {})])
    scaled = (noise().data.astype(float) * factor + shift).astype(np.float32)
    moved, still = step(noise()._replace(data=scaled))[0], step(noise())[0]
    assert np.allclose(moved.data, still.data, atol=0.05)


def test_percentiles_are_numpys() -> None:
    low, high = np.percentile(noise().data, (5, 90))
    expected = np.clip((noise().data - low) / (high - low) * 2 - 1, -1, 1)
    done = percentiles(low=5, high=90)(noise())[0]
    assert np.allclose(done.data, expected, atol=1e-5)


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_an_empty_window_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected low < high"):
        window(low=bounds[0], high=bounds[1])


@pytest.mark.parametrize("bounds", [(50.0, 50.0), (-1.0, 99.0), (1.0, 101.0), (99.0, 1.0)])
def test_percentiles_out_of_order_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= low < high <= 100"):
        percentiles(low=bounds[0], high=bounds[1])


# --- pipelines


def test_steps_run_in_the_order_of_the_plan() -> None:
    crop, stretch = ("crop-or-pad", {"size": [2, 2, 2]}), ("standardize", {})
    first, _ = pipeline([crop, stretch])(noise())
    second, _ = pipeline([stretch, crop])(noise())
    assert first.data.std() == pytest.approx(1.0, abs=1e-4)
    assert not np.allclose(first.data, second.data)


def test_no_steps_change_nothing() -> None:
    assert pipeline([])(noise())[0].data.tolist() == noise().data.tolist()


def test_an_unknown_step_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no steps called 'blur'; known: bias-field, .*window"):
        pipeline([("blur", {})])

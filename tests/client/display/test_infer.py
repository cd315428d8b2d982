"""What lies at a place in the patient lies there in the answer, whatever the plan's steps did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from client.display import infer, maps
from client.display.base import Asked
from client.display.maps import labelled
from client.display.release import open_release
from client.display.study import Identity, Study
from shared_models.errors import DataError
from shared_models.imaging import pipeline
from shared_models.volume import Volume

Steps = Sequence[tuple[str, dict[str, Any]]]

#: Steps that move whole voxels: what comes back is what was there, bit for bit.
WHOLE: list[Steps] = [
    [],
    [("orient", {})],
    [("orient", {"axes": "RPI"}), ("crop-or-pad", {"size": [20, 24, 40]})],
    [("crop-box", {"low": [0.2, 0.1, 0.0], "high": [0.9, 1.0, 0.7]}), ("orient", {})],
]
#: Steps that interpolate: what comes back is there to a fraction of the coarser voxel.
INTERPOLATING: list[Steps] = [
    [("resample", {"spacing_mm": [2.5, 1.7, 1.7]})],
    [("resize", {"size": [40, 44]})],
    [
        ("orient", {}),
        ("resample", {"spacing_mm": [2.0, 2.0, 2.0]}),
        ("crop-or-pad", {"size": [40, 48, 48]}),
    ],
    [("resize", {"size": [24, 24, 24]}), ("standardize", {})],
]


def oblique() -> np.ndarray:
    """Return an affine of unequal spacings, turned about no axis of the patient's alone."""
    turn = Rotation.from_euler("xyz", (12, -17, 31), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.1, 1.3, 3.0])
    affine[:3, 3] = (-31.0, 17.5, 240.25)
    return affine


def sagittal() -> np.ndarray:
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2] = 1.2, -1.2, 2.0
    affine[:, 3] = (-40, -20, 60, 1)
    return affine


def blob(affine: np.ndarray) -> Volume:
    """Return a volume with a soft, lop-sided bright region well inside."""
    data = np.zeros((20, 34, 38), np.float32)
    data[8:13, 12:22, 11:19] = 1
    data[9:11, 12:17, 19:24] = 1
    return Volume(ndimage.gaussian_filter(data, 1.5), affine, "CT")


def centre_mm(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return where the centre of mass lies in the patient."""
    place = ndimage.center_of_mass(data)[::-1]
    return np.asarray((affine @ np.append(place, 1.0))[:3])


@pytest.mark.parametrize("affine", [oblique(), sagittal()], ids=["oblique", "sagittal"])
@pytest.mark.parametrize("steps", WHOLE, ids=str)
def test_whole_voxels_come_back_bit_for_bit(steps: Steps, affine: np.ndarray) -> None:
    volume = blob(affine)._replace(
        data=np.random.Generator(np.random.PCG64(0)).random((20, 34, 38)).astype(np.float32)
    )
    prepared, _ = pipeline(steps)(volume)
    back = infer.onto(prepared.data, prepared.affine, volume)
    is_seen = infer.seen(prepared.data.shape, prepared.affine, volume)
    assert is_seen.sum() >= 0.2 * is_seen.size
    np.testing.assert_array_equal(back[is_seen], volume.data[is_seen])
    assert not back[~is_seen].any()


@pytest.mark.parametrize("affine", [oblique(), sagittal()], ids=["oblique", "sagittal"])
@pytest.mark.parametrize("steps", INTERPOLATING, ids=str)
def test_what_was_resampled_lands_at_its_place_in_mm(steps: Steps, affine: np.ndarray) -> None:
    volume = blob(affine)
    prepared, _ = pipeline([step for step in steps if step[0] != "standardize"])(volume)
    back = infer.onto(prepared.data, prepared.affine, volume)
    assert np.linalg.norm(centre_mm(back, affine) - centre_mm(volume.data, affine)) < 0.1
    is_back, was = back > 0.4, volume.data > 0.4
    assert 2 * (is_back & was).sum() / (is_back.sum() + was.sum()) > 0.9


def test_a_shift_of_half_a_voxel_would_be_noticed() -> None:
    volume = blob(oblique())
    prepared, _ = pipeline([("resize", {"size": [40, 44]})])(volume)
    wrong = prepared.affine.copy()
    wrong[:3, 3] += 0.5 * wrong[:3, 0]
    back = infer.onto(prepared.data, wrong, volume)
    assert np.linalg.norm(centre_mm(back, oblique()) - centre_mm(volume.data, oblique())) > 0.3


def test_where_the_model_saw_nothing_the_answer_is_background(
    new_model: Callable[..., Any],
) -> None:
    volume = blob(sagittal())
    model = new_model()
    released = open_release(model.folder, coordinator=model.coordinator)
    prepared, _ = pipeline([("crop-box", {"low": [0.5, 0, 0], "high": [1, 1, 1]})])(volume)
    shares = np.zeros((3, *prepared.data.shape), np.float32)
    shares[1] = 1.0
    study = Study(volume, volume, (), Identity())
    labels, best = labelled(shares, Asked(study, released, prepared))
    assert (labels[10:] == 1).all() and (labels[:10] == 0).all()
    assert (best[10:] == 1).all() and (best[:10] == 0).all()


def test_slices_count_as_the_same_only_where_they_are() -> None:
    volume = blob(sagittal())
    for steps, expected in (
        ([("resize", {"size": [8, 8]})], True),
        ([("crop-box", {"low": [0.1, 0.1], "high": [0.9, 0.9]})], True),
        ([("resize", {"size": [20, 8, 8]})], True),
        ([("resize", {"size": [10, 8, 8]})], False),
        ([("orient", {})], False),
    ):
        prepared, _ = pipeline(steps)(volume)
        assert infer.are_same_slices(prepared, volume) is expected, steps


@pytest.mark.parametrize("channels", [[4, 8], [4, 8, 16]], ids=["grows", "breaks"])
def test_an_image_of_a_size_the_net_cannot_take_is_refused(
    new_model: Callable[..., Any], channels: list[int]
) -> None:
    strides = [2] * (len(channels) - 1)
    model = new_model(net={"name": "unet", "params": {"channels": channels, "strides": strides}})
    released = open_release(model.folder, coordinator=model.coordinator)
    volume = Volume(np.zeros((3, 7, 7), np.float32), np.eye(4))
    asked = Asked(Study(volume, volume, (), Identity()), released, volume)
    with pytest.raises(DataError, match="3 x 7 x 7 voxels"):
        maps.read(infer.outputs(volume, released), asked)


def test_values_that_are_no_numbers_are_refused(new_model: Callable[..., Any]) -> None:
    model = new_model(imaging=[{"name": "resize", "params": {"size": [8, 8]}}])
    released = open_release(model.folder, coordinator=model.coordinator)
    data = np.full((2, 8, 8), np.nan, np.float32)
    with pytest.raises(DataError, match="no numbers"):
        infer.prepare(Volume(data, np.eye(4)), released)

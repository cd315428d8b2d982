"""An agent that learned finds the landmark wherever the image was moved; a guess does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shared_models import nets
from shared_models.randomness import Randomness, seeded
from shared_models.tasks import Task, localization, objection_to_loss

SHAPE = (12, 14, 16)
TASK = localization.make(classes=("spot", "rest"), size=5, stride=2, shift=3, num_moves=20)
REGRESSOR = localization.make(classes=("spot", "rest"), learner="regressor", shift=3)


def marked(place: tuple[int, int, int], *, number: int = 1) -> tuple[Tensor, Tensor]:
    """Return an image that grows brighter towards ``place``, and its label map."""
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in SHAPE), indexing="ij")
    distance = torch.stack([a - p for a, p in zip(axes, place, strict=True)]).norm(dim=0)
    target = torch.zeros(SHAPE, dtype=torch.long)
    target[place] = number
    return (-distance / 4)[None], target


def test_the_landmark_moves_with_its_image() -> None:
    """The brightest voxel of what is shown is the landmark, unless it was moved out of sight."""
    for seed in range(20):
        image, place = TASK.view(*marked((6, 7, 8)), seeded(seed), False)
        assert image.shape == (1, *SHAPE)
        brightest = np.unravel_index(int(image.argmax()), SHAPE)
        assert tuple(int(c) for c in place) == brightest
        assert (place - torch.tensor([6.0, 7.0, 8.0])).abs().max() <= 3


def test_images_are_moved_as_far_either_way() -> None:
    moves = [TASK.view(*marked((6, 7, 8)), seeded(n), False)[1] for n in range(300)]
    offsets = torch.stack(moves) - torch.tensor([6.0, 7.0, 8.0])
    assert (offsets.amin(dim=0), offsets.amax(dim=0)) == (
        pytest.approx([-3.0] * 3),
        pytest.approx([3.0] * 3),
    )


def test_a_move_is_rewarded_by_how_much_nearer_it_leads() -> None:
    """A plain walk through all moves of many views, against the distances themselves."""
    still = localization.make(classes=("spot", "rest"), size=5, stride=2, shift=0)
    told = list[float]()
    for seed in range(200):
        states, target = still.view(*marked((6, 7, 8)), seeded(seed), True)
        assert states.shape == (4, 5, 5, 5)
        reward = float(target[1])
        assert -1 - 1e-6 <= reward <= 1 + 1e-6
        told.append(reward)
        near_before, near_after = float(states[0, 2, 2, 2]), float(states[2, 2, 2, 2])
        assert 4 * (near_after - near_before) == pytest.approx(reward, abs=1e-4)
    assert min(told) < 0 < max(told)


def test_the_wanted_value_is_the_reward_and_the_discounted_best_that_follows() -> None:
    now, after = torch.zeros((1, 6)), torch.tensor([[0.0, 0.5, 0.1, 0.0, 0.0, 0.0]])
    outputs = torch.cat([now, after], dim=1).requires_grad_()
    far = TASK.loss(outputs, torch.tensor([[2, 0.25, 0.0]]))
    there = TASK.loss(outputs, torch.tensor([[2, 0.25, 1.0]]))
    assert float(far.detach()[0]) == pytest.approx(0.5 * (0.25 + 0.8 * 0.5) ** 2)
    assert float(there.detach()[0]) == pytest.approx(0.5 * 0.25**2)
    (gradient,) = torch.autograd.grad(far.sum(), outputs)
    assert gradient[0].nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("task", [TASK, REGRESSOR])
def test_the_loss_keeps_its_contract(task: Task) -> None:
    assert objection_to_loss(task, spatial_dims=3) is None
    with pytest.raises(ValueError, match="expected a net of spatial_dims = 3"):
        objection_to_loss(task, spatial_dims=2)


def test_a_walk_begins_in_the_middle_and_stays_in_the_image() -> None:
    net = nets.make("walker", {"spatial_dims": 3}, seed=0, num_outputs=6)
    walk = TASK.run(net, torch.randn((3, 1, *SHAPE), generator=torch.Generator().manual_seed(0)))
    assert walk.shape == (3, 21, 3)
    assert walk[:, 0].tolist() == [[6, 7, 8]] * 3
    assert bool((walk >= 0).all() and (walk <= torch.tensor(SHAPE) - 1).all())
    assert bool(((walk[:, 1:-1] - walk[:, :-2]).abs().sum(dim=2) <= 1).all())


def test_distances_are_in_millimetres() -> None:
    walk = torch.tensor([[[0.0, 0, 0], [1.0, 2, 2]]])
    scores = TASK.score(walk, torch.tensor([[1.0, 2, 0]]), (5.0, 1.0, 1.5))
    assert scores.tolist() == [[3.0]]
    assert TASK.metrics(np.array([[3.0], [3.5]])) == {"found": 0.5, "distance_mm": 3.25}


def test_a_map_without_the_landmark_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match="expected a label map with voxels of spot, got none"):
        TASK.encode_map(np.full(SHAPE, 2, np.float32))
    with pytest.raises(ValueError, match="expected label values from 0 to 2"):
        TASK.encode_map(np.full(SHAPE, np.nan, np.float32))


@pytest.mark.parametrize(
    "params",
    [
        {"classes": ("a", "b"), "landmark": "c"},
        {"classes": ()},
        {"classes": ("a",), "size": 4},
        {"classes": ("a",), "shift": -1},
        {"classes": ("a",), "discount": 1.0},
        {"classes": ("a",), "tolerance_mm": 0.0},
        {"classes": ("a",), "learner": "oracle"},
    ],
)
def test_what_makes_no_sense_is_refused(params: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        localization.make(**params)


def test_the_picture_shows_the_way_and_the_truth() -> None:
    image, place = TASK.view(
        *marked((6, 7, 8)), Randomness(lambda n: np.full(n, 0.5), _none), False
    )
    walk = torch.tensor([[6.0, 7, 3], [6.0, 7, 4], [6.0, 7, 5]])
    pixels, caption = TASK.picture(image, place, walk)
    assert pixels.shape == (14, 16, 3)
    assert pixels[7, 4].tolist() == [255, 200, 0]
    assert pixels[7, 8].tolist() == [0, 220, 120]
    assert "the way to the spot" in caption


def _none(n: int) -> np.ndarray:
    raise AssertionError("no normal draws are needed")

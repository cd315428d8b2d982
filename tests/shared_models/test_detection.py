"""Boxes are found, and counted as COCO and LUNA16 count them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou
from monai.metrics import compute_froc_curve_data, compute_froc_score
from torch import Tensor, nn

from shared_models.tasks import Box, detection, objection_to_loss
from shared_models.tasks.detection import FROC_AT, average_precision, froc

CLASSES = ("red cell", "white cell", "platelet")
TASK = detection.make(classes=CLASSES, most_boxes=12)
BOXES = [
    Box("red cell", (4.0, 8.0), (20.0, 20.0)),
    Box("white cell", (30.0, 10.0), (55.0, 34.0)),
    Box("platelet", (40.0, 40.0), (47.0, 46.0)),
]


class Fixed(nn.Module):
    """A net that answers what it was told to."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs


def random_case(seed: int, *, images: int = 12) -> tuple[Tensor, Tensor]:
    """Return what was found and the truth: boxes near true ones, and others; some as sure."""
    generator = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(images):
        listed, guesses = [], []
        for _ in range(generator.integers(0, 6)):
            low, extent = generator.uniform(0, 70, 2), generator.uniform(8, 28, 2)
            kind = generator.integers(0, 3)
            listed.append(Box(CLASSES[kind], tuple(low), tuple(low + extent)))
            for _ in range(generator.integers(0, 3)):
                near = np.concatenate([low, low + extent]) + generator.normal(0, 3, 4)
                guesses.append([kind, generator.integers(1, 20) / 20, *near / 100])
        for _ in range(generator.integers(0, 3)):
            low, extent = generator.uniform(0, 70, 2), generator.uniform(8, 28, 2)
            guess = [*low / 100, *(low + extent) / 100]
            guesses.append([generator.integers(0, 3), generator.integers(1, 20) / 20, *guess])
        rows = np.zeros((12, 6))
        rows[:, 0] = -1
        rows[: len(guesses)] = guesses[:12] if guesses else rows[:0]
        found.append(rows)
        truth.append(TASK.encode_boxes(listed, (100, 100)))
    return torch.tensor(np.stack(found)).float(), torch.stack(truth)


def coco(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Return MONAI's average precisions at an overlap of one half."""
    there = [(f[f[:, 0] >= 0], t[t[:, 0] >= 0]) for f, t in zip(found, truth, strict=True)]
    metric = COCOMetric(
        classes=CLASSES, iou_list=[0.5], iou_range=(0.5, 0.55, 0.05), max_detection=[12]
    )
    matches = matching_batch(
        iou_fn=box_iou,
        iou_thresholds=metric.iou_thresholds,
        pred_boxes=[f[:, 2:].numpy() for f, _ in there],
        pred_classes=[f[:, 0].int().numpy() for f, _ in there],
        pred_scores=[f[:, 1].numpy() for f, _ in there],
        gt_boxes=[t[:, 1:].numpy() for _, t in there],
        gt_classes=[t[:, 0].int().numpy() for _, t in there],
        max_detections=12,
    )
    return metric(matches)[0]


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_monais_coco(seed: int) -> None:
    found, truth = random_case(seed)
    ours, theirs = TASK.metrics(TASK.score(found, truth, (1.0, 1.0))), coco(found, truth)
    for name in CLASSES:
        expected = theirs[f"{name}_AP_IoU_0.50_MaxDet_12"]
        assert ours[f"map50_{name.replace(' ', '_')}"] == pytest.approx(expected, abs=1e-6)
    means = [value for name, value in ours.items() if name.startswith("map50_")]
    assert ours["map50"] == pytest.approx(np.mean(means))
    assert 0.05 < ours["map50"] < 0.95


@pytest.mark.parametrize("seed", range(6))
def test_froc_is_monais(seed: int) -> None:
    found, truth = random_case(seed)
    scores = TASK.score(found, truth, (1.0, 1.0))
    ours = TASK.metrics(scores)
    listed = scores[:, :36].reshape(-1, 3)
    for kind, name in enumerate(CLASSES):
        mine = listed[listed[:, 0] == kind]
        right, wrong = (mine[mine[:, 2] == value, 1] for value in (1, 0))
        number = int(scores[:, 36 + kind].sum())
        missed = np.zeros(number - len(right))  # MONAI counts who was found with no certainty
        curve = compute_froc_curve_data(wrong, np.append(right, missed), number, len(scores))
        expected = compute_froc_score(*curve, eval_thresholds=FROC_AT)
        assert ours[f"froc_{name.replace(' ', '_')}"] == pytest.approx(expected, abs=1e-6)


def test_no_image_changes_anothers_scores_and_repeated_ones_count_twice() -> None:
    """The bootstrap repeats rows: one image twice is two images."""
    found, truth = random_case(1)
    scores = TASK.score(found, truth, (1.0, 1.0))
    alone = np.concatenate(
        [TASK.score(f[None], t[None], (1, 1)) for f, t in zip(found, truth, strict=True)]
    )
    assert np.array_equal(scores, alone)
    twice = TASK.metrics(np.concatenate([scores, scores]))
    again = coco(torch.cat([found, found]), torch.cat([truth, truth]))
    assert twice["map50"] == pytest.approx(
        np.mean([again[f"{name}_AP_IoU_0.50_MaxDet_12"] for name in CLASSES]), abs=1e-6
    )
    assert twice["froc"] == pytest.approx(TASK.metrics(scores)["froc"])


def test_a_class_without_a_box_says_nothing() -> None:
    found, truth = random_case(0, images=2)
    truth[:, :, 0] = torch.where(truth[:, :, 0] == 1, -1.0, truth[:, :, 0])
    metrics = TASK.metrics(TASK.score(found, truth, (1.0, 1.0)))
    assert "map50_white_cell" not in metrics
    empty = torch.stack([TASK.encode_boxes([], (10, 10))] * 2)
    assert TASK.metrics(TASK.score(found, empty, (1.0, 1.0))) == {}


def test_nothing_found_is_nothing_right() -> None:
    assert average_precision(np.zeros((0, 2)), 3, 2) == 0.0
    assert froc(np.zeros((0, 2)), 3, 2) == 0.0


def perfect(boxes: list[Box], *, cells: int = 16, size: int = 64) -> Tensor:
    """Return the answer that says exactly these boxes."""
    outputs = torch.zeros((1, 7, cells, cells))
    outputs[:, :3] = -20
    scale = cells / size
    for box in boxes:
        (x1, y1), (x2, y2) = box.low, box.high
        x, y = (x1 + x2) / 2 * scale, (y1 + y2) / 2 * scale
        at = (0, slice(None), int(y), int(x))
        outputs[at][CLASSES.index(box.name)] = 20
        outputs[at][3:] = torch.tensor(
            [
                x - int(x) - 0.5,
                y - int(y) - 0.5,
                np.log((x2 - x1) * scale),
                np.log((y2 - y1) * scale),
            ]
        )
    return outputs


def test_the_answer_that_says_the_truth_is_read_as_the_truth_and_loses_little() -> None:
    target = TASK.encode_boxes(BOXES, (64, 64))
    outputs = perfect(BOXES)
    found = TASK.run(Fixed(outputs), torch.zeros((1, 1, 64, 64))).detach()
    order = found[0, :3, 0].argsort()
    assert torch.allclose(found[0, :3, 2:][order], target[:3, 1:], atol=1e-5)
    assert (found[0, :3, 1] > 0.999).all()
    assert (found[0, 3:, 1] < 1e-6).all()
    metrics = TASK.metrics(TASK.score(found, target[None], (1.0, 1.0)))
    assert metrics["map50"] == metrics["froc"] == 1.0
    heat_only = detection.make(classes=CLASSES, most_boxes=12, box_weight=1e-9)
    assert float(heat_only.loss(outputs, target[None])[0]) < 0.01
    for other in ([], BOXES[:2], [BOXES[0]._replace(name="platelet"), *BOXES[1:]]):
        assert float(TASK.loss(perfect(other), target[None])[0]) > 1.0


@pytest.mark.parametrize("edge", [4.0, 24.0])
def test_a_tenth_of_a_box_aside_costs_as_much_for_small_ones_as_for_large_ones(
    edge: float,
) -> None:
    box = Box("red cell", (31 - edge / 2, 30 - edge), (31 + edge / 2, 30 + edge))
    target = TASK.encode_boxes([box], (64, 64))[None]
    outputs = torch.zeros((1, 7, 16, 16))
    outputs[:, 3:] = detection._spread(target, (16, 16))[2][:, 0]
    right = TASK.loss(outputs, target)
    outputs[:, 3] += 0.1 * edge / 4
    assert float(TASK.loss(outputs, target) - right) == pytest.approx(0.1 - 0.05 / 2, abs=1e-4)
    outputs[:, 4] -= 0.2 * edge / 4  # twice as high as wide
    assert float(TASK.loss(outputs, target) - right) == pytest.approx(0.2 - 0.05, abs=1e-4)


def test_of_boxes_that_overlap_the_surest_is_kept() -> None:
    near = BOXES[1]._replace(low=(34.0, 10.0), high=(59.0, 34.0))
    outputs = perfect([BOXES[1], near])
    outputs[0, 1] -= 19.0 * (outputs[0, 1] > 0) * (torch.arange(16) > 10)
    found = TASK.run(Fixed(outputs), torch.zeros((1, 1, 64, 64))).detach()[0]
    (sure,) = found[found[:, 1] > 0.5]
    assert torch.allclose(sure[2:] * 64, torch.tensor([30.0, 10.0, 55.0, 34.0]), atol=1e-3)


def test_the_loss_keeps_its_contract_in_two_dimensions() -> None:
    assert objection_to_loss(TASK, spatial_dims=2) is None
    with pytest.raises(ValueError, match="expected a net of spatial_dims = 2"):
        objection_to_loss(TASK, spatial_dims=3)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_loss_and_its_gradient_are_finite_whatever_the_net_says(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = (scale * torch.randn((2, 7, 8, 8), generator=generator)).requires_grad_()
    targets = torch.stack([TASK.encode_boxes(b, (64, 64)) for b in (BOXES, [])])
    loss = TASK.loss(outputs, targets)
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    assert bool(loss.isfinite().all() and gradient.isfinite().all())
    assert bool(gradient[1, 3:].eq(0).all()), "an image without a box says nothing of sizes"
    found = TASK.run(Fixed(outputs.detach()), torch.zeros((2, 1, 64, 64)))
    assert bool(found.isfinite().all())
    assert found.shape == (2, 12, 6)


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("steps", [(0, 0), (3, -2), (-5, 6)])
def test_a_box_moves_with_its_image(is_mirrored: bool, steps: tuple[int, int]) -> None:
    size = (32, 40)
    box = Box("red cell", (12.0, 10.0), (20.0, 16.0))
    image = torch.zeros(size)
    image[10:16, 12:20] = 1
    image = (image.flip(-1) if is_mirrored else image).roll(steps, (0, 1))
    target = TASK.encode_boxes([box], size)
    moved = TASK.moved(target, is_mirrored, steps, size)
    y, x = image.nonzero(as_tuple=True)
    seen = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    assert torch.allclose(moved[0, 1:] * torch.tensor([40, 32, 40, 32]), seen.float(), atol=1e-4)
    assert moved[:, 0].tolist() == target[:, 0].tolist()
    assert bool((moved[1:, 1:] == 0).all())


def test_what_a_roll_brings_in_on_the_other_side_is_cut_at_the_edge() -> None:
    target = TASK.encode_boxes([Box("red cell", (30.0, 4.0), (38.0, 12.0))], (32, 40))
    moved = TASK.moved(target, False, (0, 4), (32, 40))  # centred on x = 38 of 40
    assert torch.allclose(
        moved[0, 1:] * torch.tensor([40, 32, 40, 32]), torch.tensor([34.0, 4, 40, 12])
    )
    moved = TASK.moved(target, False, (0, 8), (32, 40))  # its centre came in on the left
    assert torch.allclose(
        moved[0, 1:] * torch.tensor([40, 32, 40, 32]), torch.tensor([0.0, 4, 6, 12])
    )


def test_what_stands_out_is_found_without_training_if_it_lies_apart() -> None:
    task = detection.make(classes=("thing",))
    image, boxes = torch.zeros((1, 1, 30, 40)), [(3, 5, 9, 12), (20, 2, 38, 11)]
    for x1, y1, x2, y2 in boxes:
        image[..., y1:y2, x1:x2] = 1
    listed = [Box("thing", (b[0], b[1]), (b[2], b[3])) for b in boxes]
    for one in (image, -image):
        found = task.baselines["otsu parts"](one)
        scores = task.score(found, task.encode_boxes(listed, (30, 40))[None], (1.0, 1.0))
        assert task.metrics(scores) == {"map50": 1.0, "froc": 1.0}
        assert found[0, 0, 1] == pytest.approx(18 * 9 / 1200)
    blank = TASK.baselines["otsu parts"](torch.zeros((2, 1, 30, 40)))
    assert blank.shape == (2, 12, 6)
    assert bool((blank[:, :, 0] == -1).all())


def test_boxes_of_unknown_classes_or_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the plan's") as caught:
        TASK.encode_boxes([Box("MARKED-7731", (1, 1), (2, 2))], (8, 8))
    assert "MARKED" not in str(caught.value)
    with pytest.raises(ValueError, match="expected at most 12 boxes, got 13"):
        TASK.encode_boxes(BOXES[:1] * 13, (64, 64))


@pytest.mark.parametrize(
    "params",
    [
        {"classes": ()},
        {"classes": ("a", "A")},
        {"classes": ("\N{GREEK SMALL LETTER ALPHA}",)},
        {"classes": ("a",), "most_boxes": 0},
        {"classes": ("a",), "box_weight": 0.0},
        {"classes": ("a",), "overlap": 1.5},
    ],
)
def test_what_makes_no_sense_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        detection.make(**params)


def test_the_picture_shows_the_truth_in_white_and_what_was_found_in_colour() -> None:
    target = TASK.encode_boxes(BOXES[:1], (64, 64))
    found = TASK.run(Fixed(perfect(BOXES[1:2])), torch.zeros((1, 1, 64, 64))).detach()[0]
    pixels, caption = TASK.picture(torch.zeros((1, 64, 64)), target, found)
    assert pixels.shape == (512, 512, 3)
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
    assert {(255, 255, 255), (86, 180, 233)} <= colours
    assert "truth in white" in caption
    assert "blue white cell" in caption

"""Detection: a box around each object of a picture, its class, and how sure the net is.

The net says for each cell of a grid over the image how likely a box of each class has its centre
there, where in the cell, and how large it is. Boxes are kept as shares of the image's width and
height, so that neither the grid's size nor the image's matters to the task.

References:
    Zhou et al. 2019, Objects as points, https://arxiv.org/abs/1904.07850 (heat map, eq. 1). Liu et
    al. 2020, Training-time-friendly network, https://arxiv.org/abs/1909.00700 (the spread of a box
    over the map, section 3). Lin et al. 2014, Microsoft COCO (average precision, 101 points).
    Setio et al. 2017, LUNA16 (FROC score).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, max_pool2d, one_hot, smooth_l1_loss

from shared_models.tasks.base import Box, Pixels, Scores, Task, grey
from shared_models.tasks.segmentation import COLOURS, SLUG, _slug

#: How much of a box its centre is spread over; TTFNet's alpha.
SPREAD = 0.54
#: Before training every cell is this sure of nothing: a share of 0.1, as CenterNet's bias.
PRIOR = -2.19
#: Boxes' sides are from 1/16 of a cell to 256 cells.
MOST_LOG = 5.5
IOU = 0.5
#: False positives per image at which FROC looks.
FROC_AT = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
TRUTH = (255, 255, 255)
#: Pictures are enlarged to this many pixels across, and show what is found at least so surely.
ENLARGED, SHOWN = 480, 0.3


def make(
    *,
    classes: Sequence[str],
    most_boxes: int = 64,
    box_weight: float = 1.0,
    overlap: float = 0.5,
) -> Task:
    """Return the task of finding boxes of ``classes`` in two dimensions.

    The loss of an image is the focal loss of its heat maps and ``box_weight`` times the error of
    place and size, weighted by nearness to a centre. Metrics at an overlap (IoU) of one half:
    ``map50``, COCO's average precision, and ``froc``, the mean sensitivity at 1/8 to 8 false
    positives per image, each averaged over classes and also per class (``map50_<class>``). A class
    without a box says nothing.

    Args:
        classes: their names, as in the labels.
        most_boxes: an image has at most so many, and as many are found in it.
        box_weight: what place and size count beside the heat map.
        overlap: of two boxes of a class with a larger IoU the less sure one is dropped.

    Raises:
        ValueError: if there is no class, two of one name, one that no metric can be named after,
            or a number is out of range.
    """
    classes = [str(name) for name in classes]
    names = [_slug(name) for name in classes]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected one or more different classes, got {len(names)}")
    if not all(SLUG.fullmatch(name) for name in names):
        raise ValueError(
            "expected class names of at most 40 letters from a to z, digits and spaces"
        )
    if not (1 <= most_boxes <= 1000 and box_weight > 0 and 0 < overlap <= 1):
        raise ValueError(
            "expected most_boxes from 1 to 1000, a box_weight over 0 and an overlap in (0, 1]"
        )
    num_classes = len(names)

    def encode_boxes(boxes: Sequence[Box], size: tuple[int, int]) -> Tensor:
        """Return (most_boxes, 5): class number, or -1 for no box, and corners x, y as shares."""
        if any(box.name not in classes for box in boxes):
            raise ValueError(
                "a box of a class that is none of the plan's; correct it, or ask for another plan"
            )
        if len(boxes) > most_boxes:
            raise ValueError(
                f"expected at most {most_boxes} boxes, got {len(boxes)}; ask for a plan with a "
                "larger most_boxes"
            )
        target = torch.zeros((most_boxes, 5))
        target[:, 0] = -1
        y, x = size
        for row, box in zip(target, boxes, strict=False):
            corners = (box.low[0] / x, box.low[1] / y, box.high[0] / x, box.high[1] / y)
            row[:] = torch.tensor((classes.index(box.name), *corners))
        return target

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        spread, is_there, place = _spread(targets, outputs.shape[2:])
        kinds = one_hot(targets[:, :, 0].long().clamp(min=0), num_classes).to(spread)
        wanted = (spread[:, :, None] * kinds[..., None, None]).amax(dim=1)
        number = is_there.sum(dim=1).clamp(min=1)
        heat = _focal(outputs[:, :num_classes] + PRIOR, wanted) / number
        best, index = spread.max(dim=1, keepdim=True)
        told = place.gather(1, index[:, :, None].expand(-1, -1, 4, -1, -1))[:, 0]
        extent = torch.cat([told[:, 2:].exp(), torch.ones_like(told[:, 2:])], dim=1)
        said, told = outputs[:, num_classes:] / extent, told / extent  # as parts of the box
        error = smooth_l1_loss(said, told, beta=0.05, reduction="none").sum(dim=1)
        mass = spread.flatten(2).sum(dim=2).clamp(min=1e-6)  # a small box counts like a large one
        weight = best[:, 0] / mass.gather(1, index.flatten(1)).view_as(index[:, 0])
        weight = weight / number.view(-1, 1, 1)
        return heat + box_weight * (error * weight).flatten(1).sum(dim=1)

    def run(net: nn.Module, images: Tensor) -> Tensor:
        """Return (batch, most_boxes, 6): class number or -1, share of certainty, x1, y1, x2, y2."""
        outputs = net(images).detach().float()
        heat = torch.sigmoid(outputs[:, :num_classes] + PRIOR)
        heat = heat * (heat == max_pool2d(heat, 3, stride=1, padding=1))
        corners = _corners(outputs[:, num_classes:])
        return torch.stack([_best(h, c) for h, c in zip(heat, corners, strict=True)])

    def parts(images: Tensor) -> Tensor:
        """Return what stands out as a whole, of any class: as many large parts as each may have."""
        share = most_boxes // num_classes
        found = torch.zeros((len(images), most_boxes, 6))
        found[:, :, 0] = -1
        for row, image in zip(found, images, strict=True):
            boxes = _parts(image[0])[:share]
            for kind in range(num_classes):
                rows = row[kind * share : kind * share + len(boxes)]
                rows[:, 0], rows[:, 1:] = kind, boxes
        return found

    def _best(heat: Tensor, corners: Tensor) -> Tensor:
        from monai.data.box_utils import batched_nms

        scores, cells = heat.flatten().topk(min(2 * most_boxes, heat.numel()))
        cells, scores = cells[scores > 0], scores[scores > 0]
        kinds = cells.div(heat[0].numel(), rounding_mode="floor")
        boxes = corners.flatten(1)[:, cells % heat[0].numel()].t().contiguous()
        found = heat.new_zeros((most_boxes, 6))
        found[:, 0] = -1
        kept = batched_nms(boxes, scores, kinds, nms_thresh=overlap, max_proposals=most_boxes)
        found[: len(kept)] = torch.cat([kinds[kept, None], scores[kept, None], boxes[kept]], dim=1)
        return found

    def score(outputs: Tensor, targets: Tensor, spacing_mm: tuple[float, ...]) -> Scores:
        """Return (batch, 3 x most_boxes + classes).

        Of each box found its class, how sure it is and whether it is right; then how many boxes of
        each class there are.
        """
        rows = [_matched(found, truth) for found, truth in zip(outputs, targets, strict=True)]
        counts = one_hot(targets[:, :, 0].long() + 1, num_classes + 1).sum(dim=1)[:, 1:]
        return np.concatenate([np.stack(rows), counts.double().numpy()], axis=1)

    def metrics(scores: Scores) -> dict[str, float]:
        counts = scores[:, -num_classes:].sum(axis=0)
        found = scores[:, :-num_classes].reshape(-1, 3)
        results: dict[str, float] = {}
        for measure, of in (("map50", average_precision), ("froc", froc)):
            means = {
                f"{measure}_{name}": of(found[found[:, 0] == k, 1:], int(counts[k]), len(scores))
                for k, name in enumerate(names)
                if counts[k]
            }
            if means:
                results[measure] = float(np.mean(list(means.values())))
                results |= means if len(names) > 1 else {}
        return results

    def picture(image: Tensor, target: Tensor, output: Tensor) -> tuple[Pixels, str]:
        key = ", ".join(f"{c} {n}" for c, n in zip(cycle(COLOURS), classes, strict=False))
        caption = f"truth in white; found in colour, with how sure it is: {key}"
        return _drawn(grey(image[0]), target, output), caption

    def moved(
        target: Tensor, is_mirrored: bool, steps: tuple[int, ...], size: tuple[int, ...]
    ) -> Tensor:
        """Return the boxes of an image that was mirrored, then rolled; what left it is cut off."""
        target = target.clone()
        there, boxes = target[:, 0] >= 0, target[:, 1:]
        if is_mirrored:
            boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
        by = torch.tensor([step / n for step, n in zip(steps[::-1], size[::-1], strict=True)])
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        by = (centre + by) % 1 - centre  # a roll brings in on one side what left on the other
        target[:, 1:] = torch.where(there[:, None], (boxes + by.repeat(1, 2)).clamp(0, 1), 0.0)
        return target

    def made_up(generator: torch.Generator, spatial_dims: int) -> tuple[Tensor, Tensor]:
        if spatial_dims != 2:
            raise ValueError("expected a net of spatial_dims = 2: boxes are found in pictures")
        boxes = [
            Box(classes[0], (2.0, 3.0), (9.0, 7.0)),
            Box(classes[-1], (8.0, 8.0), (15.0, 16.0)),
        ]
        targets = [encode_boxes(boxes[:n][:most_boxes], (16, 16)) for n in (0, 1, 2, 1)]
        return torch.randn((4, num_classes + 4, 4, 4), generator=generator), torch.stack(targets)

    return Task(
        name="detection",
        headline="map50",
        label_kind="boxes",
        num_outputs=num_classes + 4,
        encode_boxes=encode_boxes,
        loss=loss,
        score=score,
        metrics=metrics,
        picture=picture,
        run=run,
        moved=moved,
        baselines={"otsu parts": parts},
        made_up=made_up,
    )


def average_precision(found: NDArray[np.float64], num_true: int, num_images: int) -> float:
    """Return COCO's average precision: the best precision at each of 101 recalls, averaged.

    Args:
        found: (n, 2): how sure, and whether it is right.
        num_true: boxes there are.
        num_images: not needed.
    """
    is_right = found[np.argsort(-found[:, 0], kind="stable"), 1]
    right = np.cumsum(is_right)
    precision = right / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(right / num_true, np.linspace(0, 1, 101), side="left")
    return float(np.append(best, 0.0)[np.minimum(places, len(best))].mean())


def froc(found: NDArray[np.float64], num_true: int, num_images: int) -> float:
    """Return the mean sensitivity at 1/8, 1/4 ... 8 false positives per image, interpolated.

    Args:
        found: (n, 2): how sure, and whether it is right.
        num_true: boxes there are.
        num_images: images they were found in.
    """
    found = found[np.argsort(-found[:, 0], kind="stable")]
    last = np.append(np.diff(found[:, 0]) != 0, True)[: len(found)]  # as sure, as late
    right, wrong = np.cumsum(found[:, 1])[last], np.cumsum(1 - found[:, 1])[last]
    sensitivity, rate = np.append(0, right / num_true), np.append(0, wrong / num_images)
    return float(np.interp(FROC_AT, rate, sensitivity).mean())


def _spread(targets: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return how near each cell is to each box's centre, which boxes there are, and where they lie.

    Returns:
        (batch, boxes, y, x): 1 in the cell that holds the centre, falling off as a bell with the
        box's size; (batch, boxes); (batch, boxes, 4, y, x): the centre's distance from the middle
        of the cell, in cells, and the logarithms of width and height in cells.
    """
    there = targets[:, :, 0] >= 0
    size = torch.tensor([grid[1], grid[0]]).to(targets)
    low, high = targets[:, :, 1:3] * size, targets[:, :, 3:] * size
    extent, centre = (high - low).clamp(min=1e-3), (low + high) / 2
    cell = torch.minimum(centre.floor(), size - 1)
    sigma = (SPREAD * extent / 6).clamp(min=0.3)
    x, y = (torch.arange(n).to(targets) for n in (grid[1], grid[0]))
    across = (-0.5 * ((x - cell[..., :1]) / sigma[..., :1]).square()).exp()
    down = (-0.5 * ((y - cell[..., 1:]) / sigma[..., 1:]).square()).exp()
    spread = down[..., :, None] * across[..., None, :] * there[..., None, None]
    shape = spread.shape
    to_x = (centre[..., :1] - 0.5 - x)[..., None, :].expand(shape)
    to_y = (centre[..., 1:] - 0.5 - y)[..., :, None].expand(shape)
    log = extent.log().clamp(-MOST_LOG, MOST_LOG)[..., None, None]
    place = [to_x, to_y, log[:, :, 0].expand(shape), log[:, :, 1].expand(shape)]
    return spread, there, torch.stack(place, dim=2)


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the sum over an image's maps of the penalty-reduced focal loss: (batch,)."""
    share = torch.sigmoid(logits)
    right = (1 - share).square() * logsigmoid(logits)
    wrong = (1 - wanted) ** 4 * share.square() * logsigmoid(-logits)
    return -torch.where(wanted == 1, right, wrong).flatten(1).sum(dim=1)


def _corners(place: Tensor) -> Tensor:
    """Return x1, y1, x2, y2 as shares of the image: (batch, 4, y, x) to the same shape."""
    rows, columns = place.shape[2:]
    x = (torch.arange(columns).to(place) + 0.5 + place[:, 0]) / columns
    y = (torch.arange(rows).to(place)[:, None] + 0.5 + place[:, 1]) / rows
    width, height = (place[:, 2:].clamp(-MOST_LOG, MOST_LOG).exp() / 2).unbind(dim=1)
    width, height = width / columns, height / rows
    return torch.stack([x - width, y - height, x + width, y + height], dim=1).clamp(0, 1)


def _matched(found: Tensor, truth: Tensor) -> Scores:
    """Return class, certainty and whether it is right of each box found, in one row.

    As COCO does: the surest box comes first, and takes the box of its class that it covers best and
    that no other has taken.
    """
    from monai.data.box_utils import box_iou

    overlaps = np.asarray(box_iou(found[:, 2:], truth[:, 1:]))
    kinds, sure = found[:, 0].numpy(), found[:, 1].double().numpy()
    overlaps = np.where(kinds[:, None] == truth[:, 0].numpy(), overlaps, 0.0)
    is_right = np.zeros(len(found))
    for row in np.argsort(-sure, kind="stable"):
        best = int(overlaps[row].argmax())
        if kinds[row] >= 0 and overlaps[row, best] >= IOU:
            is_right[row], overlaps[:, best] = 1.0, 0.0
    scores: Scores = np.stack([kinds.astype(np.float64), sure, is_right], axis=1).ravel()
    return scores


def _drawn(pixels: Pixels, truth: Tensor, found: Tensor) -> Pixels:
    """Return an image (y, x, 3), enlarged, with its boxes."""
    from PIL import Image, ImageDraw

    scale = max(1, round(ENLARGED / pixels.shape[1]))
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    canvas = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    draw, shares = ImageDraw.Draw(canvas), torch.tensor(size).repeat(2)
    for row in truth[truth[:, 0] >= 0]:
        draw.rectangle((row[1:] * (shares - 1)).tolist(), outline=TRUTH)
    colours = list(COLOURS.values())
    for row in found[(found[:, 0] >= 0) & (found[:, 1] >= SHOWN)]:
        colour, corners = colours[int(row[0]) % len(colours)], (row[2:] * (shares - 1)).tolist()
        draw.rectangle(corners, outline=colour, width=2)
        draw.text((corners[0] + 4, corners[1] + 2), f"{float(row[1]):.2f}", fill=colour)
    return np.asarray(canvas)


def _parts(image: Tensor) -> Tensor:
    """Return (n, 5): area and corners, as shares, of what lies apart beyond Otsu's threshold.

    Largest first. The rarer side of the threshold, dark or bright, is what stands out.
    """
    from skimage.filters import threshold_otsu
    from skimage.measure import label, regionprops

    pixels = image.cpu().numpy()
    bright = pixels > threshold_otsu(pixels)
    regions = regionprops(label(bright if bright.mean() < 0.5 else ~bright))
    rows = [(r.area, *r.bbox[1::-1], *r.bbox[:1:-1]) for r in regions]
    found = torch.tensor(sorted(rows, reverse=True), dtype=torch.float32).reshape(-1, 5)
    height, width = pixels.shape
    return found / torch.tensor([height * width, width, height, width, height])

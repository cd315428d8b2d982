"""Losses and metrics against scikit-learn, SciPy and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from shared_models.tasks import Task, objection_to_loss
from shared_models.tasks.base import grey
from shared_models.tasks.classification import make as make_classification
from shared_models.tasks.segmentation import make as make_segmentation

MARK = "MARKED-7731"
TWO = make_classification(classes=["clear", "opaque"])
THREE = make_classification(classes=["a", "b", "c"])
ORGANS = make_segmentation(classes=["organ", "Small lesion"])

#: Few different values, so that ties are common.
shares = hnp.arrays(float, st.integers(2, 30), elements=st.integers(0, 8).map(lambda n: n / 8))


def logits(shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32))


def classes(shape: tuple[int, ...], *, number: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, number, shape))


# --- classification


def test_a_label_is_a_name_or_a_number_from_zero() -> None:
    assert [TWO.encode_class(label) for label in ("clear", "opaque", "0", "1")] == [0, 1, 0, 1]


@pytest.mark.parametrize("label", ["", "2", "-1", "Clear", "1.0", " 1", MARK])
def test_an_unknown_label_is_refused_without_repeating_it(label: str) -> None:
    with pytest.raises(ValueError, match=r"^expected a label that is one of clear, opaque or its"):
        TWO.encode_class(label)


@pytest.mark.parametrize("names", [["1", "2", "3"], [1, 2, 3]])
def test_a_class_called_like_anothers_number_is_known_by_its_name(names: list[str]) -> None:
    """Grades from 1: label 1 is the first class, not the second."""
    graded = make_classification(classes=names)
    assert [graded.encode_class(label) for label in ("1", "2", "3")] == [0, 1, 2]


@pytest.mark.parametrize("names", [[], ["one"], ["same", "same"], ["1", 1]])
def test_fewer_than_two_different_classes_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="expected two or more different classes"):
        make_classification(classes=names)


def test_classification_wants_no_image_as_label() -> None:
    with pytest.raises(ValueError, match="expected another kind of label"):
        TWO.encode_map(np.zeros((1, 2, 2), np.float32))


def test_the_loss_of_an_image_is_its_cross_entropy() -> None:
    outputs, targets = logits((5, 3)), classes((5,), number=3)
    expected = -log_softmax(outputs.numpy().astype(float), axis=1)[range(5), targets.numpy()]
    assert np.allclose(THREE.loss(outputs, targets).numpy(), expected, atol=1e-6)


def test_scores_are_probabilities_and_the_truth() -> None:
    outputs, targets = logits((5, 3)), classes((5,), number=3)
    scores = THREE.score(outputs, targets, (1.0, 1.0))
    assert scores.dtype == np.float64
    assert np.allclose(scores[:, :3], softmax(outputs.numpy().astype(float), axis=1), atol=1e-7)
    assert scores[:, 3].tolist() == targets.tolist()


@given(positive=shares, seed=st.integers(0, 10))
@settings(max_examples=50)
def test_metrics_of_two_classes_are_scikit_learns(positive: np.ndarray, seed: int) -> None:
    truth = np.random.default_rng(seed).integers(0, 2, len(positive))
    found = TWO.metrics(np.column_stack([1 - positive, positive, truth]))
    guess = (positive > 0.5).astype(int)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert ("auc" in found) == (len(set(truth)) == 2)
    if "auc" in found:
        assert found["auc"] == pytest.approx(roc_auc_score(truth, positive))
    for name, number in (("sensitivity", 1), ("specificity", 0)):
        assert (name in found) == (number in truth)
        if name in found:
            recall = recall_score(truth, guess, pos_label=number, zero_division=np.nan)
            assert found[name] == pytest.approx(recall)


@given(seed=st.integers(0, 40))
@settings(max_examples=20)
def test_metrics_of_three_classes_are_scikit_learns(seed: int) -> None:
    outputs, truth = logits((25, 3), seed=seed), classes((25,), number=3, seed=seed)
    scores = THREE.score(outputs, truth, (1.0, 1.0))
    found = THREE.metrics(scores)
    theirs = roc_auc_score(truth.numpy(), scores[:, :3], multi_class="ovr", average="macro")
    assert found["auc"] == pytest.approx(theirs)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, scores[:, :3].argmax(axis=1)))
    assert set(found) == {"auc", "accuracy"}


def test_a_missing_class_leaves_auc_out_and_the_rest_in() -> None:
    scores = THREE.score(logits((6, 3)), torch.tensor([0, 1, 0, 1, 0, 1]), (1.0, 1.0))
    assert set(THREE.metrics(scores)) == {"accuracy"}


def test_nobody_examined_gives_no_metrics() -> None:
    assert TWO.metrics(np.zeros((0, 3))) == {}


def test_a_picture_says_what_was_predicted_and_what_is_true() -> None:
    pixels, caption = TWO.picture(logits((1, 6, 8)), torch.tensor(0), torch.tensor([0.0, 4.0]))
    assert pixels.shape == (6, 8, 3)
    assert caption == "predicted opaque (98%), truth clear"


# --- segmentation


def test_a_label_map_is_taken_as_class_numbers() -> None:
    label = np.array([[[0, 1], [2, 1]]], np.float32)
    encoded = ORGANS.encode_map(label)
    assert encoded.dtype == np.int64
    assert encoded.tolist() == label.tolist()


@pytest.mark.parametrize("value", [-1.0, 3.0, 255.0, np.nan, np.inf, -np.inf])
def test_a_label_map_with_other_values_is_refused(value: float) -> None:
    label = np.zeros((1, 2, 2), np.float32)
    label[0, 1, 1] = value
    with pytest.raises(ValueError, match="expected label values from 0 to 2"):
        ORGANS.encode_map(label)


def test_every_numbered_object_is_the_one_class() -> None:
    task = make_segmentation(classes=["nucleus"], instances=True)
    label = np.array([[[0, 1], [2, 375]]], np.float32)
    assert task.encode_map(label).tolist() == [[[0, 1], [1, 1]]]
    assert task.encode_map(label).dtype == np.int64
    assert task.num_outputs == 2


@pytest.mark.parametrize("value", [-1.0, 1e6, np.nan, np.inf, -np.inf])
def test_a_map_that_numbers_no_objects_is_refused(value: float) -> None:
    label = np.array([[[0, value]]], np.float32)
    with pytest.raises(ValueError, match="one for each object"):
        make_segmentation(classes=["nucleus"], instances=True).encode_map(label)


def test_objects_of_two_classes_cannot_be_numbered() -> None:
    with pytest.raises(ValueError, match="expected one class, whose instances maps number, got 2"):
        make_segmentation(classes=["nucleus", "vessel"], instances=True)


def test_segmentation_wants_no_word_as_label() -> None:
    with pytest.raises(ValueError, match=r"^expected another kind of label for this task$"):
        ORGANS.encode_class(MARK)


@pytest.mark.parametrize(
    "names", [[], ["a", "a"], ["a b", "a-b"], ["Lung", "lung"], ["\u00fc"], [""], ["a" * 41]]
)
def test_classes_no_metric_can_be_named_after_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        make_segmentation(classes=names)


@pytest.mark.parametrize("shape", [(3, 6, 8), (2, 4, 6, 8)])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_loss_of_an_image_is_its_mean_entropy_plus_weighted_soft_dice(
    shape: tuple[int, ...], weight: float
) -> None:
    batch, grid = shape[0], shape[1:]
    task = make_segmentation(classes=["a", "b"], dice_weight=weight)
    outputs, targets = logits((batch, 3, *grid)), classes((batch, *grid), number=3)
    logs = log_softmax(outputs.numpy().astype(float), axis=1)
    axes = tuple(range(1, len(shape)))
    for image in range(batch):
        truth = np.stack([targets[image].numpy() == c for c in range(3)])
        entropy = -logs[image][truth].sum() / np.prod(grid)
        share = np.exp(logs[image])
        dice = (2 * (share * truth).sum(axis=axes) + 1) / (
            share.sum(axis=axes) + truth.sum(axis=axes) + 1
        )
        expected = entropy + weight * (1 - dice[1:].mean())
        assert float(task.loss(outputs, targets)[image]) == pytest.approx(expected, abs=1e-5)


def hausdorff_95(guess: np.ndarray, truth: np.ndarray, *, spacing: tuple[float, ...]) -> float:
    """Return the larger of the two directed 95th percentiles between the outlines, by SciPy."""
    edges = [mask ^ ndimage.binary_erosion(mask) for mask in (guess, truth)]
    away = [ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    there, back = away[1][edges[0]], away[0][edges[1]]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((12, 15), (1.0, 1.0)), ((12, 15), (2.5, 0.7)), ((7, 8, 9), (3.0, 1.0, 0.5))],
)
def test_dice_and_hausdorff_distance_are_numpys_and_scipys(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    def blobs(seed: int) -> np.ndarray:
        smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
        return np.digitize(smooth / smooth.std(), [0.0, 0.8])

    guess, truth = np.stack([blobs(1), blobs(2)]), np.stack([blobs(3), blobs(4)])
    outputs = torch.nn.functional.one_hot(torch.from_numpy(guess), 3).movedim(-1, 1).float()
    scores = ORGANS.score(outputs, torch.from_numpy(truth), spacing)
    assert scores.shape == (2, 4)
    for image in range(2):
        for number in (1, 2):
            left, right = guess[image] == number, truth[image] == number
            dice = 2 * (left & right).sum() / (left.sum() + right.sum())
            assert scores[image, number - 1] == pytest.approx(dice)
            far = hausdorff_95(left, right, spacing=spacing)
            assert scores[image, number + 1] == pytest.approx(far, abs=1e-4)


def outlined(guess: list[list[int]], truth: list[list[int]]) -> np.ndarray:
    outputs = torch.nn.functional.one_hot(torch.tensor(guess)[None], 3).movedim(-1, 1).float()
    return ORGANS.score(outputs, torch.tensor(truth)[None], (1.0, 1.0))


def test_an_image_without_a_class_says_nothing_about_that_class() -> None:
    scores = outlined([[0, 1], [2, 2]], [[0, 1], [0, 0]])
    assert scores[0, 0] == 1.0
    assert np.isnan(scores[0, 1])
    found = ORGANS.metrics(scores)
    assert set(found) == {"dice", "dice_organ", "hd95", "hd95_organ"}
    assert found["dice"] == found["dice_organ"] == 1.0


def test_a_class_that_was_not_found_has_dice_zero_and_no_distance() -> None:
    found = ORGANS.metrics(outlined([[0, 0], [0, 0]], [[0, 1], [0, 0]]))
    assert found == {"dice": 0.0, "dice_organ": 0.0}


def test_a_mean_is_over_classes_and_each_over_the_images_that_have_it() -> None:
    scores = np.array([[1.0, np.nan, 2.0, np.nan], [0.5, 0.2, 4.0, 6.0]])
    assert ORGANS.metrics(scores) == pytest.approx(
        {
            "dice": (0.75 + 0.2) / 2,
            "dice_organ": 0.75,
            "dice_small_lesion": 0.2,
            "hd95": (3.0 + 6.0) / 2,
            "hd95_organ": 3.0,
            "hd95_small_lesion": 6.0,
        }
    )


def test_nothing_outlined_anywhere_gives_no_metrics() -> None:
    assert ORGANS.metrics(outlined([[0, 0], [0, 0]], [[0, 0], [0, 0]])) == {}


@pytest.mark.parametrize("shape", [(8, 10), (4, 8, 10)])
def test_a_picture_shows_truth_and_prediction_side_by_side(shape: tuple[int, ...]) -> None:
    target = torch.zeros(shape).long()
    target[..., 2:4, 2:4] = 1
    output = torch.nn.functional.one_hot(torch.zeros(shape).long(), 3).movedim(-1, 0).float()
    pixels, caption = ORGANS.picture(torch.zeros((1, *shape)), target, output)
    assert pixels.shape == (8, 20, 3)
    assert pixels.dtype == np.uint8
    assert pixels[2:4, 2:4].any()
    assert not pixels[:, 10:].any()
    assert all(
        word in caption for word in ("truth left", "prediction right", "organ", "Small lesion")
    )


# --- both


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        (THREE, logits((6, 3)), classes((6,), number=3)),
        (ORGANS, logits((6, 3, 4, 4)), classes((6, 4, 4), number=3)),
    ],
)
def test_the_loss_never_mixes_images(
    task: object, outputs: torch.Tensor, targets: torch.Tensor
) -> None:
    """Else one patient's gradient would depend on who else was drawn."""
    loss = task.loss  # type: ignore[attr-defined]
    together = loss(outputs, targets)
    assert together.shape == (6,)
    for image in range(6):
        apart = loss(outputs[image : image + 1], targets[image : image + 1])
        assert float(apart[0]) == pytest.approx(float(together[image]), abs=1e-6)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("task", [TWO, THREE, ORGANS], ids=lambda task: task.name)
def test_our_losses_keep_their_contract(task: Task, spatial_dims: int) -> None:
    assert objection_to_loss(task, spatial_dims=spatial_dims) is None


def entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


def contrastive(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return how unlike the others of its class each image is: (batch,)."""
    likeness = torch.softmax(outputs @ outputs.T, dim=1)
    return -(likeness * (targets[:, None] == targets)).sum(dim=1).log()


MIXING = {
    "contrastive": contrastive,
    "over the batch's mean": lambda o, t: entropy(o - o.mean(dim=0), t),
    "over the batch's largest": lambda o, t: entropy(o, t) / entropy(o, t).detach().max(),
    "ranking": lambda o, t: torch.relu(1 + o[:, 0].flip(0) - o[:, 0]),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_loss_that_mixes_patients_is_told_with_the_cure(name: str) -> None:
    objection = objection_to_loss(THREE._replace(loss=MIXING[name]), spatial_dims=2)
    assert objection is not None
    assert "got one that mixes them" in objection
    assert "score every image by itself" in objection


@pytest.mark.parametrize("shape", ["mean", "voxels"])
def test_a_loss_of_another_shape_than_one_number_an_image_is_told(shape: str) -> None:
    task = THREE._replace(loss=lambda o, t: entropy(o, t).mean())
    if shape == "voxels":
        task = ORGANS._replace(loss=entropy)
    objection = objection_to_loss(task, spatial_dims=2)
    assert objection is not None
    assert "expected a loss of one number per image, (4,)" in objection


def test_a_picture_is_stretched_to_the_whole_range_of_greys() -> None:
    pixels = grey(torch.tensor([[-3.0, 1.0], [5.0, -3.0]]))
    assert pixels.tolist() == [[[0] * 3, [128] * 3], [[255] * 3, [0] * 3]]
    assert grey(torch.full((2, 2), 7.0)).tolist() == [[[0] * 3] * 2] * 2
    assert grey(torch.zeros((5, 2, 3))).shape == (2, 3, 3)

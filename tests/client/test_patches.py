"""Patches follow MONAI's law, lie inside, are views, and cost what they hold."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from client.cache import open_cache, preparer
from client.noise import secure
from client.patches import FOREGROUND, corner, cut, foreground_of
from client.train import ENGINES, Performance, draw, randomness_of, train
from shared_models import cohort, nets
from shared_models.cohort import Patient
from shared_models.errors import DataError
from shared_models.evaluation import evaluate
from shared_models.plan import Choice, StudyPlan, own_objections
from shared_models.randomness import Randomness, seeded
from shared_models.tasks import segmentation

NUM_DRAWS = 6000


def label_of(kind: str) -> np.ndarray:
    label = np.zeros((5, 6, 7), np.float32)
    if kind == "some":
        label[1:3, 0:2, 5:] = 1
        label[4, 5, 0] = 2
    elif kind == "all":
        label[:] = 1
    return label


def law_of(label: np.ndarray, size: tuple[int, ...], share: float) -> dict[tuple[int, ...], float]:
    """Return how likely each corner is: every voxel's own chance, moved inside as MONAI does."""
    from monai.transforms.utils import correct_crop_centers

    is_foreground = label.ravel() != 0
    counts = np.array([(~is_foreground).sum(), is_foreground.sum()])
    shares = np.array([1 - share, share]) if counts.all() else counts / counts.sum()
    law = Counter[tuple[int, ...]]()
    for index, is_in in enumerate(is_foreground):
        centre = [int(v) for v in np.unravel_index(index, label.shape)]
        moved = correct_crop_centers(centre, size, label.shape)
        begin = tuple(c - s // 2 for c, s in zip(moved, size, strict=True))
        law[begin] += float(shares[int(is_in)] / counts[int(is_in)])
    return dict(law)


def p_value(drawn: list[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Return how likely draws so far from the law are, by chi-squared; 0 outside of it."""
    counts = Counter(drawn)
    if not counts.keys() <= law.keys():
        return 0.0
    expected = np.array([law[begin] for begin in law]) * len(drawn)
    return float(chisquare([counts[begin] for begin in law], expected).pvalue)


@pytest.mark.parametrize("kind", ["none", "some", "all"])
@pytest.mark.parametrize("size", [(2, 3, 4), (5, 2, 7)])
def test_patches_follow_the_law_of_monais_rand_crop_by_pos_neg_label(
    kind: str, size: tuple[int, ...]
) -> None:
    label = label_of(kind)
    foreground, randomness = foreground_of(label), seeded(kind, *size)
    ours = [
        corner(label.shape, size, randomness, foreground=foreground, share=0.75)
        for _ in range(NUM_DRAWS)
    ]
    law = law_of(label, size, 0.75)
    assert p_value(ours, law) > 1e-4
    assert p_value(ours, law_of(label, size, 0.4)) < 1e-9 or kind != "some"
    assert p_value(monais(label, size), law) > 1e-4


def monais(label: np.ndarray, size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return where MONAI's own transform would cut, as it draws its patches' middles."""
    from monai.transforms.utils import generate_pos_neg_label_crop_centers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where there is no foreground
        middles = generate_pos_neg_label_crop_centers(
            size,
            NUM_DRAWS,
            0.75,
            label.shape,
            np.flatnonzero(label),
            np.flatnonzero(label == 0),
            np.random.RandomState(0),
        )
    return [tuple(int(m) - s // 2 for m, s in zip(mid, size, strict=True)) for mid in middles]


def test_patches_are_anywhere_alike_where_no_foreground_is_asked_for() -> None:
    randomness = seeded("uniform")
    ours = [corner((5, 6), (2, 6), randomness) for _ in range(NUM_DRAWS)]
    assert p_value(ours, {(y, 0): 0.25 for y in range(4)}) > 1e-4


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=3),
    st.sets(st.integers(0, 728)),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
def test_every_patch_lies_inside_its_volume_and_is_a_view_of_it(
    axes: list[tuple[int, int]], chosen: set[int], which: float, where: float
) -> None:
    shape = tuple(max(pair) for pair in axes)
    size = tuple(min(pair) for pair in axes)
    volume = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(1, *shape)
    foreground = np.array(sorted(i for i in chosen if i < volume.numel()), np.int64)
    given_ = Randomness(lambda n: np.array([which, where])[:n], lambda n: np.zeros(n))
    begin = corner(shape, size, given_, foreground=foreground, share=0.5)
    patch = cut(volume, begin, size)
    assert patch.shape == (1, *size)
    assert patch.untyped_storage().data_ptr() == volume.untyped_storage().data_ptr()


def test_an_image_smaller_than_the_patch_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least"):
        corner((4, 8), (5, 5), secure())


def test_the_foreground_is_found_once_and_kept_beside_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label, file = label_of("some"), tmp_path / "label.npy"
    np.save(file, label)
    expected = np.flatnonzero(label)
    mapped = np.load(file, mmap_mode="c")
    assert np.array_equal(foreground_of(mapped), expected)
    assert (tmp_path / FOREGROUND).is_file()
    monkeypatch.setattr(np, "flatnonzero", None)  # not looked for again
    assert np.array_equal(foreground_of(mapped), expected)


def test_a_broken_foreground_is_found_anew(tmp_path: Path) -> None:
    label, file = label_of("some"), tmp_path / "label.npy"
    np.save(file, label)
    mapped = np.load(file, mmap_mode="c")
    for broken in (b"", b"rubbish"):
        (tmp_path / FOREGROUND).write_bytes(broken)
        assert np.array_equal(foreground_of(mapped), np.flatnonzero(label))
    np.save(tmp_path / FOREGROUND, np.array([label.size]))
    assert np.array_equal(foreground_of(mapped), np.flatnonzero(label))


# --- a study that trains on patches

SHAPES = ((12, 20, 24), (16, 16, 16), (9, 30, 17), (20, 16, 18))
OUTLINE = segmentation.make(classes=("organ",))


@pytest.fixture
def plan(new_plan: Callable[..., StudyPlan]) -> StudyPlan:
    base = new_plan()
    terms = {"patch": (8, 8, 8), "patches_per_image": 2, "patch_foreground": 0.8, "flips": True}
    privacy = None if base.privacy is None else base.privacy.model_copy(update={"epsilon": 1e6})
    return base.model_copy(
        update={
            "task": Choice(name="segmentation", params={"classes": ("organ",)}),
            "net": Choice(name="unet", params={"spatial_dims": 3}),
            "imaging": (Choice(name="standardize"),),
            "training": base.training.model_copy(update={**terms, "sample_rate": 0.9}),
            "privacy": privacy,
        }
    )


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Return a manifest of four patients with a bright box each, in volumes of four sizes."""
    lines = ["image,patient,label,split"]
    for number, shape in enumerate(SHAPES):
        label = np.zeros(shape, np.float32)
        label[2:7, 3:12, 4:13] = 1
        image = np.random.default_rng(number).normal(size=shape) + 3 * label
        for name, data in (("image", image), ("label", label)):
            nib.save(
                nib.Nifti1Image(data.T.astype(np.float32), np.diag([-1, -1, 1, 1])),
                tmp_path / f"{name}{number}.nii",
            )
        lines.append(f"image{number}.nii,p{number},label{number}.nii,train")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "manifest.csv"


def load(manifest: Path, plan: StudyPlan) -> list[Patient]:
    cache = open_cache(manifest.parent / "cache", most_gb=1)
    prepare = preparer(cache, cohort.steps_of(plan))
    for _ in range(2):  # at first it is made, then it comes from the cache
        found = cohort.load(
            manifest,
            root=manifest.parent,
            plan=plan,
            task=OUTLINE,
            prepare=prepare,
            foreground=foreground_of,
        )
    return found["train"]


def test_volumes_of_any_size_stay_mapped_with_their_foreground_beside(
    volumes: Path, plan: StudyPlan
) -> None:
    patients = load(volumes, plan)
    assert {tuple(p.images.shape[2:]) for p in patients} == {*SHAPES}
    kept = {np.load(f).tobytes() for f in (volumes.parent / "cache").rglob(FOREGROUND)}
    for patient in patients:
        assert is_mapped(patient.images, "image.npy")
        assert is_mapped(patient.targets, "label.npy")
        assert patient.targets.is_floating_point()
        (found,) = patient.foreground
        assert np.array_equal(found, np.flatnonzero(patient.targets.numpy()))
        assert np.asarray(found).tobytes() in kept


def is_mapped(tensor: torch.Tensor, name: str) -> bool:
    """Return whether the numbers lie in a file of this name mapped into memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.endswith(f"/{name}")
    return False


def test_draws_are_patches_of_the_patients_drawn_with_their_targets(
    volumes: Path, plan: StudyPlan
) -> None:
    patients = load(volumes, plan)
    terms = plan.training.model_copy(update={"sample_rate": 1.0, "flips": False})
    batch = draw(patients, terms=terms, randomness=secure())
    assert batch.images.shape == (8, 1, 8, 8, 8)
    assert batch.owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for image, target, owner in zip(batch.images, batch.targets, batch.owner.tolist(), strict=True):
        whole = patients[owner].images[0].unfold(1, 8, 1).unfold(2, 8, 1).unfold(3, 8, 1)
        (places,) = [torch.nonzero((whole[0] == image[0]).all(-1).all(-1).all(-1))]
        assert len(places) == 1
        assert torch.equal(cut(patients[owner].targets[0], places[0].tolist(), (8, 8, 8)), target)
    rarely = terms.model_copy(update={"sample_rate": 0.5})
    nobody = draw(
        patients, terms=rarely, randomness=Randomness(lambda n: np.full(n, 0.999), np.zeros)
    )
    assert nobody.images.shape == (0, 1, 8, 8, 8)


def test_training_on_patches_learns_and_whole_volumes_are_answered_by_windows(
    volumes: Path, plan: StudyPlan
) -> None:
    patients = load(volumes, plan)
    plan = plan.model_copy(
        update={
            "privacy": None,
            "training": plan.training.model_copy(
                update={"steps_per_round": 16, "learning_rate": 0.01, "sample_rate": 1.0}
            ),
        }
    )
    net = nets.make("unet", plan.net.params, seed=1, num_outputs=2)
    window = plan.training.patch
    before = evaluate(net, patients, task=OUTLINE, window=window).metrics["dice"]
    randomness = randomness_of(plan, site="a", round_=0, purpose="train")
    trained = train(
        net,
        patients,
        plan=plan,
        task=OUTLINE,
        rounds=[0],
        randomness=randomness,
        performance=Performance(),
    )
    after = evaluate(net, patients, task=OUTLINE, window=window)
    assert np.isfinite(trained.loss)
    assert after.num_images == len(SHAPES)
    assert after.metrics["dice"] > max(0.8, before + 0.3)


def test_private_training_on_patches_clips_patients_and_not_patches(
    volumes: Path, plan: StudyPlan
) -> None:
    patients = load(volumes, plan)
    terms = plan.training.model_copy(update={"sample_rate": 1.0})
    net = nets.make("unet", plan.net.params, seed=1, num_outputs=2)
    norms = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return OUTLINE.loss(outputs, targets.long())

    for engine in ENGINES.values():
        with engine(net, loss, most_images=32, max_grad_norm=1e-3, clipping="flat") as gradient_of:
            found = gradient_of(draw(patients, terms=terms, randomness=seeded(1)))
        norms.append(float(torch.cat([g.flatten() for g in found.gradients]).norm()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert 0 < norms[0] <= 1e-3 * len(patients) * 1.001


def test_a_patch_larger_than_an_image_is_refused_by_name_of_its_line(
    volumes: Path, plan: StudyPlan
) -> None:
    terms = plan.training.model_copy(update={"patch": (10, 8, 8)})
    with pytest.raises(DataError) as caught:
        load(volumes, plan.model_copy(update={"training": terms}))
    assert [o for o in caught.value.objections if "line 4" in o and "smaller" in o]


def test_a_plan_says_what_is_wrong_with_its_patches(plan: StudyPlan) -> None:
    def said(**changes: object) -> str:
        changed = plan.model_copy(
            update={"training": plan.training.model_copy(update=changes), "privacy": None}
        )
        return " ".join(own_objections(changed, today=date(2020, 1, 1)))

    assert "patch" not in said()
    assert "expected 3 lengths" in said(patch=(8, 8))
    assert "but not their size" in said(patch=())

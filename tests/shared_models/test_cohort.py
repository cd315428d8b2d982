"""A manifest becomes patients, or all that is wrong with it, and no patient's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shared_models import cohort, tasks
from shared_models.cohort import Cohort, load, plan_key, read_rows
from shared_models.errors import DataError
from shared_models.plan import StudyPlan
from shared_models.registry import find
from shared_models.splits import split_of
from shared_models.tasks import Task
from shared_models.tasks.classification import make as make_classification
from shared_models.tasks.segmentation import make as make_segmentation
from shared_models.volume import Volume

MARK = "MARKED-7731"
HEADER = "image,patient,label,split"
NewPlan = Callable[..., StudyPlan]
CLASSES = make_classification(classes=["clear", "opaque"])
OUTLINE = make_segmentation(classes=["organ", "lesion"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of ten pictures whose grey is their number."""
    for number in range(10):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def manifest(root: Path, lines: Sequence[str], *, header: str = HEADER, end: str = "\n") -> Path:
    file = root / "manifest.csv"
    file.write_bytes((end.join([header, *lines]) + end).encode())
    return file


def rows(root: Path, lines: Sequence[str], **changes: Any) -> list[cohort.Row]:
    return read_rows(manifest(root, lines, **changes), root=root, key="k")


def objections(root: Path, lines: Sequence[str], **changes: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        rows(root, lines, **changes)
    assert MARK not in str(caught.value)
    return list(caught.value.objections)


def loaded(root: Path, lines: Sequence[str], *, plan: StudyPlan, **changes: Any) -> Cohort:
    task: Task = changes.pop("task", CLASSES)
    return load(manifest(root, lines), root=root, plan=plan, task=task, **changes)


def load_objections(
    root: Path, lines: Sequence[str], *, plan: StudyPlan, **changes: Any
) -> list[str]:
    with pytest.raises(DataError) as caught:
        loaded(root, lines, plan=plan, **changes)
    assert MARK not in str(caught.value)
    return list(caught.value.objections)


# --- reading rows


def test_a_row_is_one_image_of_one_patient(root: Path) -> None:
    (row,) = rows(root, ["0.png,p1,opaque,test"])
    assert row == (2, "0.png", "p1", "opaque", "test")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_byte_order_marks_and_windows_line_ends_change_nothing(
    root: Path, start: str, end: str
) -> None:
    lines = ["0.png,p1,opaque,test", "1.png,p2,clear,train"]
    assert rows(root, lines, header=start + HEADER, end=end) == rows(root, lines)


def test_other_columns_and_another_order_change_nothing(root: Path) -> None:
    plain = rows(root, ["0.png,p1,opaque,test"])
    assert rows(root, ["test,x,p1,opaque,0.png"], header="split,age,patient,label,image") == plain


def test_spaces_around_values_are_not_part_of_them(root: Path) -> None:
    assert rows(root, [" 0.png , p1 , opaque , test "]) == rows(root, ["0.png,p1,opaque,test"])


def test_without_a_split_the_keyed_hash_decides(root: Path) -> None:
    lines = [f"{n}.png,p{n},clear" for n in range(10)]
    found = {row.patient: row.split for row in rows(root, lines, header="image,patient,label")}
    assert found == {f"p{n}": split_of(f"p{n}", key="k") for n in range(10)}


def test_an_empty_split_is_decided_by_the_keyed_hash_too(root: Path) -> None:
    (row,) = rows(root, ["0.png,p1,clear,"])
    assert row.split == split_of("p1", key="k")


names = st.sampled_from(["p1", "p2", "p3"])


@given(lines=st.lists(st.tuples(names, st.sampled_from(["train", "val", "test", ""])), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_patient_is_in_one_split_only(root: Path, lines: list[tuple[str, str]]) -> None:
    text = [f"{n}.png,{patient},clear,{split}" for n, (patient, split) in enumerate(lines)]
    wanted = {(p, split or split_of(p, key="k")) for p, split in lines}
    is_clean = len(wanted) == len({patient for patient, _ in wanted})
    if lines and is_clean:
        assert {(r.patient, r.split) for r in rows(root, text)} == wanted
    elif lines:
        assert any("a patient is in two splits" in o for o in objections(root, text))


def test_every_objection_to_a_manifest_is_told_at_once_without_a_patients_name(
    root: Path,
) -> None:
    lines = [
        f"0.png,{MARK},clear,train",
        f"1.png,{MARK},clear,test",
        f"0.png,{MARK},clear,train",
        f"{MARK}.png,{MARK}2,clear,train",
        f"2.png,{MARK}3,,train",
        f"3.png,{MARK}4,clear,holdout",
        f",{MARK}5,clear,train",
        "4.png,,clear,train",
        f"5.png,{MARK}6",
    ]
    found = objections(root, lines)
    assert [o.split(":")[0] for o in found] == [
        "line 3",
        "line 4",
        "line 5",
        "line 6",
        "line 7",
        "line 8",
        "line 9",
        "line 10",
    ]
    for line, words in (
        (3, "a patient is in two splits"),
        (4, "the image is listed twice"),
        (5, "missing; restore it or remove the line"),
        (6, "an image without a label"),
        (7, "expected a split that is one of train, val, test"),
        (8, "expected an image and a patient"),
        (9, "expected an image and a patient"),
        (10, "an image without a label"),
    ):
        assert any(o.startswith(f"line {line}:") and words in o for o in found)


def test_a_line_is_told_by_its_number_in_the_file(root: Path) -> None:
    lines = ["0.png,p1,clear,train", "", "", '1.png,"p2",clear,holdout']
    (objection,) = objections(root, lines)
    assert objection.startswith("line 5:")


def test_a_thousand_objections_are_told_as_twenty_and_a_number(root: Path) -> None:
    found = objections(root, [f"{n}.png,p{n},,train" for n in range(100, 1100)])
    assert len(found) == cohort.MOST_OBJECTIONS + 1
    assert found[-1] == f"and {2000 - cohort.MOST_OBJECTIONS} more of the kind"


def test_a_name_too_long_for_the_disk_is_a_missing_image(root: Path) -> None:
    (objection,) = objections(root, [f"{MARK * 100}.png,p1,clear,train"])
    assert "missing" in objection


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"x" * 200_000, b"image,patient\n"])
def test_what_is_no_manifest_is_refused(root: Path, content: bytes) -> None:
    file = root / "manifest.csv"
    file.write_bytes(content)
    with pytest.raises(DataError):
        read_rows(file, root=root, key="k")


def test_missing_columns_are_named(root: Path) -> None:
    (objection,) = objections(root, ["0.png,p1"], header="image,name")
    assert objection == "manifest.csv: missing column patient, label"


def test_a_manifest_without_images_is_refused(root: Path) -> None:
    (objection,) = objections(root, [])
    assert objection.startswith("manifest.csv: no images")


def test_a_missing_manifest_is_told_with_its_columns(root: Path) -> None:
    with pytest.raises(DataError, match="expected a CSV with image, patient, label"):
        read_rows(root / "none.csv", root=root, key="k")


def test_two_studies_have_two_keys_and_one_study_one(new_plan: NewPlan) -> None:
    assert plan_key(new_plan()) == plan_key(new_plan(seed=5, description="second run"))
    assert plan_key(new_plan()) != plan_key(new_plan(name="livers"))


# --- loading images


def test_images_are_grouped_by_patient(root: Path, new_plan: NewPlan) -> None:
    lines = ["3.png,p1,opaque,train", "1.png,p1,clear,train", "2.png,p2,1,test"]
    found = loaded(root, lines, plan=new_plan(imaging=[]))
    (first,), (second,) = found["train"], found["test"]
    assert found["val"] == []
    assert first.images.shape == (2, 1, 4, 4)
    assert first.images.dtype == torch.float32
    assert first.images[:, 0, 0, 0].tolist() == [1, 3]
    assert first.targets.tolist() == [0, 1]
    assert first.targets.dtype == torch.int64
    assert first.spacing_mm == ((1.0, 1.0), (1.0, 1.0))
    assert second.targets.tolist() == [1]


def test_the_order_of_lines_changes_nothing(root: Path, new_plan: NewPlan) -> None:
    lines = [f"{n}.png,p{n % 3},clear,train" for n in range(9)]
    there, back = (
        loaded(root, each, plan=new_plan(imaging=[]))["train"] for each in (lines, lines[::-1])
    )
    for left, right in zip(there, back, strict=True):
        assert torch.equal(left.images, right.images)


def test_the_plans_steps_prepare_every_image(root: Path, new_plan: NewPlan) -> None:
    found = loaded(root, ["3.png,p1,clear,train"], plan=new_plan())
    assert found["train"][0].images.shape == (1, 1, 8, 8)


def test_images_of_other_splits_are_not_opened(root: Path, new_plan: NewPlan) -> None:
    (root / "broken.png").write_bytes(b"x")
    lines = ["1.png,p1,clear,train", "broken.png,p2,clear,val"]
    found = loaded(root, lines, plan=new_plan(), splits=("train", "test"))
    assert len(found["train"]) == 1
    assert load_objections(root, lines, plan=new_plan())


def test_progress_is_told_after_every_image(root: Path, new_plan: NewPlan) -> None:
    told: list[tuple[int, int]] = []
    loaded(
        root,
        ["1.png,p1,clear,train", "2.png,p1,clear,train"],
        plan=new_plan(),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 2), (2, 2)]


def test_all_broken_images_are_told_at_once_without_their_names(
    root: Path, new_plan: NewPlan
) -> None:
    for name in (f"{MARK}.png", f"{MARK}.dcm", f"{MARK}.nii.gz"):
        (root / name).write_bytes(MARK.encode())
    lines = [
        f"{MARK}.png,{MARK},clear,train",
        "1.png,p1,clear,train",
        f"{MARK}.dcm,{MARK},clear,train",
        f"{MARK}.nii.gz,{MARK},clear,train",
        f"2.png,{MARK},{MARK},train",
    ]
    found = load_objections(root, lines, plan=new_plan())
    assert sorted(o.split(":")[0] for o in found) == ["line 2", "line 4", "line 5", "line 6"]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_patient_without_an_image_is_refused_with_the_cure(
    root: Path, new_plan: NewPlan, monkeypatch: pytest.MonkeyPatch, dims: int
) -> None:
    read = cohort.read_volume

    def emptied(file: Path) -> Volume:
        volume = read(file)
        return volume._replace(data=volume.data[:0]) if file.name == "1.png" else volume

    monkeypatch.setattr(cohort, "read_volume", emptied)
    net = {"name": "unet", "params": {"spatial_dims": dims}}
    lines = ["0.png,p1,clear,train", f"1.png,{MARK},clear,train"]
    (objection,) = load_objections(root, lines, plan=new_plan(net=net, imaging=[]))
    assert objection.startswith("line 3: nothing is left of the image")
    assert "remove the line" in objection


def test_an_unknown_label_is_told_with_the_known_ones(root: Path, new_plan: NewPlan) -> None:
    (objection,) = load_objections(root, [f"1.png,p1,{MARK},train"], plan=new_plan())
    assert objection == "line 2: expected a label that is one of clear, opaque or its number"


@pytest.mark.parametrize("lines", [["1.png,p1", "big.png,p1"], ["1.png,p1", "big.png,p2"]])
def test_images_of_different_sizes_are_refused_with_the_cure(
    root: Path, new_plan: NewPlan, lines: list[str]
) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "big.png")
    text = [f"{line},clear,train" for line in lines]
    (objection,) = load_objections(root, text, plan=new_plan(imaging=[]))
    assert "'resize' or 'crop-or-pad'" in objection
    assert loaded(root, text, plan=new_plan())["train"]


def write_nifti(file: Path, data: np.ndarray, *, spacing: float = 2.0) -> None:
    image = nib.Nifti1Image(data.transpose(2, 1, 0), np.diag([spacing, spacing, spacing, 1.0]))
    nib.save(image, file)


@pytest.fixture
def scans(root: Path) -> Path:
    """Return a folder with a volume of (3, 4, 5) voxels and its label map."""
    data = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    write_nifti(root / "scan.nii.gz", data)
    write_nifti(root / "map.nii.gz", (data % 3).astype(np.uint8))
    write_nifti(root / "other-grid.nii.gz", np.zeros((3, 5, 4), np.uint8))
    write_nifti(root / "unknown-class.nii.gz", np.full((3, 4, 5), 7, np.uint8))
    write_nifti(root / "nan.nii.gz", np.full((3, 4, 5), np.nan, np.float32))
    write_nifti(root / "negative.nii.gz", np.full((3, 4, 5), -1, np.int16))
    return root


SEGMENT = {"name": "segmentation", "params": {"classes": ["organ", "lesion"]}}
FLAT: dict[str, Any] = {"task": SEGMENT, "net": {"name": "unet"}, "imaging": []}
DEEP = FLAT | {"net": {"name": "unet", "params": {"spatial_dims": 3}}}


def test_for_a_two_dimensional_net_every_slice_is_an_image(scans: Path, new_plan: NewPlan) -> None:
    line = ["scan.nii.gz,p1,map.nii.gz,train"]
    (patient,) = loaded(scans, line, plan=new_plan(**FLAT), task=OUTLINE)["train"]
    data = np.arange(60).reshape(3, 4, 5)
    assert patient.images.shape == (3, 1, 4, 5)
    assert np.array_equal(patient.images[:, 0].numpy(), data)
    assert np.array_equal(patient.targets.numpy(), data % 3)
    assert patient.spacing_mm == ((2.0, 2.0),) * 3


def test_for_a_three_dimensional_net_the_volume_is_the_image(
    scans: Path, new_plan: NewPlan
) -> None:
    line = ["scan.nii.gz,p1,map.nii.gz,train"]
    (patient,) = loaded(scans, line, plan=new_plan(**DEEP), task=OUTLINE)["train"]
    assert patient.images.shape == (1, 1, 3, 4, 5)
    assert patient.targets.shape == (1, 3, 4, 5)
    assert patient.spacing_mm == ((2.0, 2.0, 2.0),)


def test_a_class_is_every_slices_class(scans: Path, new_plan: NewPlan) -> None:
    (patient,) = loaded(scans, ["scan.nii.gz,p1,1,train"], plan=new_plan(imaging=[]))["train"]
    assert patient.targets.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("other-grid.nii.gz", "the label map's grid is not the image's"),
        ("unknown-class.nii.gz", "expected label values from 0 to 2"),
        ("negative.nii.gz", "expected label values from 0 to 2"),
        ("nan.nii.gz", "expected label values from 0 to 2"),
        ("none.nii.gz", "missing file"),
        (f"{MARK}.nii.gz", "missing file"),
    ],
)
def test_a_label_map_that_does_not_fit_is_refused(
    scans: Path, new_plan: NewPlan, label: str, words: str
) -> None:
    line = [f"scan.nii.gz,{MARK},{label},train"]
    (objection,) = load_objections(scans, line, plan=new_plan(**DEEP), task=OUTLINE)
    assert objection.startswith("line 2: ")
    assert words in objection


def test_image_and_label_map_go_through_the_same_steps(scans: Path, new_plan: NewPlan) -> None:
    plan = new_plan(**DEEP | {"imaging": [{"name": "resize", "params": {"size": [6, 8, 10]}}]})
    line = ["scan.nii.gz,p1,map.nii.gz,train"]
    (patient,) = loaded(scans, line, plan=plan, task=OUTLINE)["train"]
    assert patient.images.shape[2:] == patient.targets.shape[1:] == (6, 8, 10)
    assert set(patient.targets.unique().tolist()) == {0, 1, 2}


# --- real images


REAL = [
    ("cxr_pneumonia", "file", "pneumonia", ["normal", "pneumonia"], "classification"),
    ("hippocampus_mr", "image", "label", ["anterior", "posterior"], "segmentation"),
]


@pytest.mark.parametrize(("name", "image", "label", "classes", "task"), REAL, ids=lambda v: str(v))
def test_real_images_become_patients(
    data_dir: Path,
    tmp_path: Path,
    new_plan: NewPlan,
    name: str,
    image: str,
    label: str,
    classes: list[str],
    task: str,
) -> None:
    import csv

    if not (data_dir / name).is_dir():
        pytest.skip(f"no {name} among the real images")
    with (data_dir / name / "manifest.csv").open(newline="") as stream:
        records = list(csv.DictReader(stream))[::60]
    lines = [f"{r[image]},{r['patient_id']},{r[label]},{r['split']}" for r in records]
    file = manifest(tmp_path, lines)
    size = [32, 32] if task == "classification" else [32, 48, 32]
    dims = len(size)
    plan = new_plan(
        task={"name": task, "params": {"classes": classes}},
        net={"name": "unet", "params": {"spatial_dims": dims}},
        imaging=[{"name": "standardize"}, {"name": "crop-or-pad", "params": {"size": size}}],
    )
    made = find("tasks", task, builtin=tasks.BUILTIN)(classes=classes)
    found = load(file, root=data_dir / name, plan=plan, task=made)
    counted = {split: len(patients) for split, patients in found.items() if patients}
    pairs = {(r["patient_id"], r["split"]) for r in records}
    assert counted == Counter(split for _, split in pairs)
    for patient in (p for patients in found.values() for p in patients):
        assert patient.images.shape[1:] == (1, *size)
        assert torch.isfinite(patient.images).all()


# --- boxes

FINDS = find("tasks", "detection", builtin=tasks.BUILTIN)(classes=["cell", "big cell"])


def flat_plan(new_plan: NewPlan, size: Sequence[int] = (8, 8)) -> StudyPlan:
    steps = [{"name": "resize", "params": {"size": list(size)}}]
    return new_plan(imaging=steps)


def test_boxes_are_encoded_where_the_plans_steps_put_them(root: Path, new_plan: NewPlan) -> None:
    lines = ["0.png,p1,cell 0 1 2 3; big cell 1 1 4 4,train", "1.png,p2,none,train"]
    found = loaded(root, lines, plan=flat_plan(new_plan, (16, 8)), task=FINDS)["train"]
    first, second = found[0].targets[0], found[1].targets[0]
    assert found[0].images.shape == (1, 1, 16, 8)
    assert first[0].tolist() == [0, 0, 0.25, 0.5, 0.75]
    assert first[1].tolist() == [1, 0.25, 0.25, 1, 1]
    assert first[2:, 0].eq(-1).all()
    assert second[:, 0].eq(-1).all()


def test_bad_boxes_are_told_by_line_and_reason_and_never_by_value(
    root: Path, new_plan: NewPlan
) -> None:
    lines = [
        "0.png,p1,cell 0 1 2 3,train",
        f"1.png,p2,{MARK} 0 1 2 3,train",
        "2.png,p3,cell 0 1 2 5,train",
        "3.png,p4,cell 2 1 2 3,train",
        f"4.png,p5,cell 2 1 {MARK} 3,train",
        "5.png,p6,,train",
        f"6.png,p7,{';'.join(['cell 0 0 1 1'] * 65)},train",
    ]
    plan = flat_plan(new_plan)
    found = load_objections(root, [*lines[:5], lines[6]], plan=plan, task=FINDS)
    assert [text.split(";")[0] for text in found] == [
        "line 3: a box of a class that is none of the plan's",
        "line 4: a box reaches outside its image",
        "line 5: a box of no size, or its corners change places",
        "line 6: expected boxes as 'name x1 y1 x2 y2",
        "line 7: expected at most 64 boxes, got 65",
    ]
    assert load_objections(root, lines[:1] + lines[5:6], plan=plan, task=FINDS) == [
        "line 3: an image without a label; add the label or remove the line"
    ]


def test_boxes_are_for_two_dimensions(root: Path, new_plan: NewPlan) -> None:
    plan = new_plan(net={"name": "unet", "params": {"spatial_dims": 3}}, imaging=[])
    (found,) = load_objections(root, ["0.png,p1,none,train"], plan=plan, task=FINDS)
    assert "boxes are for nets of two dimensions" in found

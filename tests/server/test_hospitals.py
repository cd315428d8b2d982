"""A data set with a site column becomes hospitals, or all that is wrong with it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from server import recipes
from server.hospitals import DataSet, adopt, join, write_manifests
from shared_models.cohort import read_rows
from shared_models.errors import DataError
from shared_models.phantoms import write_hospitals

MARK = "MARKED-7731"
HEADER = "image,patient,site,finding,split"


def write_images(folder: Path, names: Sequence[str], *, value: int = 0) -> None:
    for name in names:
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(folder / name)


def good_lines() -> list[str]:
    """Return two sites of ten patients: seven to train, one to validate, two to test."""
    splits = ["train"] * 7 + ["val"] + ["test"] * 2
    return [
        f"film-{site}-{n}.png,{site}-p{n},{site},{n % 2},{splits[n]}"
        for site in ("east", "west")
        for n in range(10)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, ["film.png", *(line.split(",")[0] for line in good_lines())])
    return tmp_path


def write(folder: Path, lines: Sequence[str], *, header: str = HEADER) -> Path:
    (folder / "manifest.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return folder


def objections(folder: Path, *, task: str = "classification") -> list[str]:
    with pytest.raises(DataError) as caught:
        adopt(folder, labels=recipes.labels_of(task, folder))
    assert MARK not in str(caught.value)
    return list(caught.value.objections)


def test_a_data_set_knows_its_sites_and_their_training_patients(folder: Path) -> None:
    data = adopt(write(folder, good_lines()), labels="class")
    assert data.sites == ("east", "west")
    assert data.training_patients() == {"east": 7, "west": 7}
    assert data.smallest_training_set() == 7
    assert data.classes == ("no finding", "finding")
    assert data.root == folder.resolve()


def test_patients_are_counted_and_not_images(folder: Path) -> None:
    again = [line for line in good_lines() if "east-p0" in line] * 5
    data = adopt(write(folder, good_lines() + again), labels="class")
    assert data.training_patients() == {"east": 7, "west": 7}


def test_each_site_gets_its_own_rows_and_the_coordinator_patients_no_site_gets(
    folder: Path, tmp_path: Path
) -> None:
    data = adopt(write(folder, good_lines()), labels="class")
    site_dirs = {site: tmp_path / "sites" / site for site in data.sites}
    write_manifests(data, site_dirs=site_dirs, validation=tmp_path / "own" / "val.csv")
    patients = {}
    for name, file in [
        *((site, path / "manifest.csv") for site, path in site_dirs.items()),
        ("own", tmp_path / "own" / "val.csv"),
    ]:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert len(read_rows(file, root=folder, key="k")) == len(rows)
        assert list(rows[0]) == ["image", "patient", "label", "split"]
        patients[name] = {row["patient"] for row in rows}
        splits = Counter(row["split"] for row in rows)
        assert splits == ({"val": 2} if name == "own" else {"train": 7, "test": 2})
    assert not patients["own"] & (patients["east"] | patients["west"])
    assert not patients["east"] & patients["west"]


def read_patients(file: Path) -> list[str]:
    with file.open(newline="", encoding="utf-8") as stream:
        return [row["patient"] for row in csv.DictReader(stream)]


@pytest.mark.parametrize("num_images", [1, 3])
def test_for_a_warm_start_the_coordinators_patients_are_halved_and_nobody_is_in_both(
    num_images: int, folder: Path, tmp_path: Path
) -> None:
    splits = ["val"] * 4 + ["train"] * 5 + ["test"] * 2
    lines = [
        f"film.png,{site}-p{n},{site},{n % 2},{split}"
        for site in ("east", "west")
        for n, split in enumerate(splits)
        for _ in range(num_images)
    ]
    data = adopt(write(folder, lines), labels="class")
    site_dirs = {site: tmp_path / "sites" / site for site in data.sites}
    files = {name: tmp_path / f"{name}.csv" for name in ("whole", "validation", "start")}
    write_manifests(data, site_dirs=site_dirs, validation=files["whole"])
    before = {site: (path / "manifest.csv").read_bytes() for site, path in site_dirs.items()}
    write_manifests(data, site_dirs=site_dirs, validation=files["validation"], start=files["start"])
    found = {name: Counter(read_patients(file)) for name, file in files.items()}
    assert found["validation"] + found["start"] == found["whole"]
    assert not found["validation"].keys() & found["start"].keys()
    assert len(found["validation"]) == len(found["start"]) == 4
    for half in (found["validation"], found["start"]):
        assert set(half.values()) == {num_images}
        assert {name.split("-")[0] for name in half} == {"east", "west"}
    after = {site: (path / "manifest.csv").read_bytes() for site, path in site_dirs.items()}
    assert after == before


@pytest.mark.parametrize(
    "header",
    [
        "file,patient_id,site,finding,split",
        "image,source_id,site,finding,split",
        "\ufeffimage,patient,site,finding,split",
    ],
)
def test_columns_of_other_names_and_a_byte_order_mark_are_understood(
    folder: Path, header: str
) -> None:
    plain = adopt(write(folder, good_lines()), labels="class")
    assert adopt(write(folder, good_lines(), header=header), labels="class") == plain


def test_windows_line_ends_change_nothing(folder: Path) -> None:
    plain = adopt(write(folder, good_lines()), labels="class")
    text = (folder / "manifest.csv").read_text().replace("\n", "\r\n")
    (folder / "manifest.csv").write_bytes(text.encode())
    assert adopt(folder, labels="class") == plain


def test_without_a_split_column_patients_are_dealt_out_by_hash(folder: Path) -> None:
    lines = [f"film.png,{s}-{n},{s},{n % 2}" for s in ("east", "west") for n in range(60)]
    data = adopt(write(folder, lines, header="image,patient,site,finding"), labels="class")
    shares = Counter(row["split"] for row in data.rows)
    assert set(shares) == {"train", "val", "test"}
    assert shares["train"] > shares["test"] > shares["val"] > 0


def test_patients_who_are_numbers_are_not_taken_for_classes(folder: Path) -> None:
    """Sites, splits, images and patients are no labels, however small their numbers."""
    lines = [line.replace("east-p", "").replace("west-p", "1") for line in good_lines()]
    assert {line.split(",")[1] for line in lines} == {str(number) for number in range(20)}
    data = adopt(write(folder, lines), labels="class")
    assert data.classes == ("no finding", "finding")


def test_three_classes_are_called_by_their_numbers(folder: Path) -> None:
    lines = [line.replace(",1,", ",2,", 1) for line in good_lines()[:3]] + good_lines()[3:]
    data = adopt(write(folder, lines), labels="class")
    assert data.classes == ("class 0", "class 1", "class 2")


def test_classes_can_be_named(folder: Path) -> None:
    write(folder, good_lines())
    data = adopt(folder, labels="class", classes=["clear", "opaque"])
    assert data.classes == ("clear", "opaque")
    with pytest.raises(DataError, match="expected names for 2 classes, got 3"):
        adopt(folder, labels="class", classes=["a", "b", "c"])


def test_every_objection_is_told_at_once_without_a_patients_name(folder: Path) -> None:
    lines = [
        *good_lines(),
        f"{MARK}.png,{MARK}1,east,1,train",
        f"film.png,{MARK}2,east,,train",
        f"film.png,{MARK}3,ea st {MARK},1,train",
        f"film.png,{MARK}4,east,1,holdout",
        "film.png,,east,1,train",
        f"film.png,{MARK}5,east,1,train",
        f"film.png,{MARK}5,east,1,val",
    ]
    found = objections(write(folder, lines))
    for line, words in (
        (22, "the image is missing"),
        (23, "an image without a label"),
        (24, "expected a site name"),
        (25, "expected a split"),
        (26, "expected an image and a patient"),
        (28, "a patient is in two splits"),
    ):
        assert any(o.startswith(f"line {line}:") and words in o for o in found)
    assert not any(o.startswith("line 27:") for o in found)


def test_a_validation_patient_who_also_trains_is_refused(folder: Path) -> None:
    """Two sites' manifests and the coordinator's are apart: nobody later would see it."""
    lines = [*good_lines(), "film.png,east-p0,west,1,val"]
    assert objections(write(folder, lines)) == [
        "line 22: a patient is in two splits; give all their images the same one"
    ]


@pytest.mark.parametrize(
    ("keep", "objection"),
    [
        (lambda line: "east" in line, "expected two or more sites, got 1"),
        (lambda line: "val" not in line, "no patients in split val"),
        (
            lambda line: not ("west" in line and "test" in line),
            "site west: no patients in split test",
        ),
        (
            lambda line: not ("east" in line and "train" in line),
            "site east: no patients in split train",
        ),
    ],
)
def test_a_study_that_could_not_be_run_is_refused_before_it_starts(
    folder: Path, keep: object, objection: str
) -> None:
    lines = list(filter(keep, good_lines()))  # type: ignore[call-overload]
    assert any(o.startswith(objection) for o in objections(write(folder, lines)))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("picture,patient,site,finding,split", "missing column image; looked for image, file"),
        ("image,name,site,finding,split", "missing column patient; looked for patient, "),
        ("image,patient,hospital,finding,split", "missing column site"),
    ],
)
def test_a_missing_column_is_named(folder: Path, header: str, words: str) -> None:
    (objection,) = objections(write(folder, good_lines(), header=header))
    assert words in objection


def test_labels_that_are_no_classes_are_told(folder: Path) -> None:
    lines = [line.replace(",1,", ",yes,") for line in good_lines()]
    (objection,) = objections(write(folder, lines))
    assert "expected a column of class numbers (0, 1, ...)" in objection


def test_a_missing_folder_or_manifest_is_told(tmp_path: Path) -> None:
    assert "there is no folder" in objections(tmp_path / "none")[0]
    assert "holds no manifest.csv" in objections(tmp_path)[0]


@pytest.mark.parametrize("content", [b"", b"image,patient\n", b"\xff\xfe", b"x" * 200_000])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.csv").write_bytes(content)
    assert objections(tmp_path)


def map_lines() -> list[str]:
    return [line.replace(",0,", ",map.png,").replace(",1,", ",map.png,") for line in good_lines()]


MAP_HEADER = "image,patient,site,mask,split"


def test_label_maps_are_found_and_their_classes_counted(folder: Path) -> None:
    write_images(folder, ["map.png"], value=2)
    data = adopt(write(folder, map_lines(), header=MAP_HEADER), labels="map")
    assert data.classes == ("label 1", "label 2")
    assert {row["label"] for row in data.rows} == {"map.png"}


def test_empty_label_maps_are_refused(folder: Path) -> None:
    write_images(folder, ["map.png"], value=0)
    write(folder, map_lines(), header=MAP_HEADER)
    (objection,) = objections(folder, task="segmentation")
    assert "values from 1 to 19, got up to 0" in objection


def test_a_pictures_map_with_more_values_than_classes_numbers_objects(folder: Path) -> None:
    write_images(folder, ["map.png"], value=20)
    data = adopt(write(folder, map_lines(), header=MAP_HEADER), labels="map")
    assert (data.classes, data.has_instances) == (("object",), True)
    named = adopt(folder, labels="map", classes=["nucleus"])
    assert (named.classes, named.has_instances) == (("nucleus",), True)
    params = recipes.plan_for(
        named, name="t", task="segmentation", coordinator="0" * 64, seed=0, epsilon=None
    ).task.params
    assert params == {"classes": ("nucleus",), "instances": True}


def test_a_volumes_map_with_more_values_than_classes_is_refused(folder: Path) -> None:
    brain = nibabel.Nifti1Image(np.full((4, 4, 4), 20, np.int16), np.eye(4))
    nibabel.save(brain, folder / "map.nii")
    lines = [
        "map.nii" + line[line.index(",") :].replace("map.png", "map.nii") for line in map_lines()
    ]
    write(folder, lines, header=MAP_HEADER)
    (objection,) = objections(folder, task="segmentation")
    assert "values from 1 to 19, got up to 20" in objection


def test_missing_label_maps_are_told_by_line(folder: Path) -> None:
    write(folder, map_lines(), header=MAP_HEADER)
    found = objections(folder, task="segmentation")
    assert found[0] == "line 2: the label map is missing from the folder"


def test_phantom_hospitals_are_joined_into_one_data_set(tmp_path: Path) -> None:
    folders = write_hospitals(tmp_path, seed=1, num_patients=20, size=16)
    joined = join(tmp_path)
    for task, classes in (
        ("classification", ("no finding", "finding")),
        ("segmentation", ("label 1", "label 2")),
    ):
        data = adopt(joined, labels=recipes.labels_of(task, joined))
        assert data.sites == tuple(sorted(folder.name for folder in folders))
        assert data.classes == classes
        assert len({row["patient"] for row in data.rows}) == 20 * len(folders)


@pytest.mark.parametrize(
    ("name", "task", "sites", "rows", "classes"),
    [
        ("cxr_pneumonia", "classification", 4, 2034, 2),
        ("hippocampus_mr", "segmentation", 3, 202, 2),
        ("nuclei", "segmentation", 4, 226, 1),
        ("blood_cells_boxes", "detection", 3, 289, 3),
    ],
)
def test_real_data_sets_become_hospitals(
    data_dir: Path, name: str, task: str, sites: int, rows: int, classes: int
) -> None:
    if not (data_dir / name).is_dir():
        pytest.skip(f"no {name} among the real images")
    data: DataSet = adopt(data_dir / name, labels=recipes.labels_of(task, data_dir / name))
    assert (len(data.sites), len(data.rows), len(data.classes)) == (sites, rows, classes)


BOXES_HEADER = "file,class,xmin,ymin,xmax,ymax,block,split,flag"


def box_lines() -> list[str]:
    """Return two boxes for each image; the second of the very first is flagged."""
    lines = []
    for line in good_lines():
        image, _, site, _, split = line.split(",")
        lines += [f"{image},red cell,1,1,3,3,{site},{split},"]
        lines += [f"{image},platelet,0,0.5,2,2,{site},{split},"]
    lines[1] = lines[1].replace("0,0.5,2,2", "2,2,2,2") + "degenerate"
    return lines


def write_boxes(folder: Path, lines: Sequence[str], *, header: str = BOXES_HEADER) -> Path:
    (folder / "boxes.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return folder


def test_a_table_of_boxes_becomes_a_row_for_each_image(folder: Path, tmp_path: Path) -> None:
    write_boxes(folder, box_lines())
    assert recipes.labels_of("detection", folder) == "boxes"
    data = adopt(folder, labels="boxes")
    assert (data.sites, data.classes) == (("east", "west"), ("platelet", "red cell"))
    assert data.training_patients() == {"east": 7, "west": 7}, "an image is its own patient"
    first, second = data.rows[:2]
    assert first["label"] == "red cell 1 1 3 3", "a box with a flag is left out"
    assert second["label"] == "red cell 1 1 3 3; platelet 0 0.5 2 2"
    site_dirs = {site: tmp_path / "sites" / site for site in data.sites}
    write_manifests(data, site_dirs=site_dirs, validation=tmp_path / "val.csv")
    rows = read_rows(site_dirs["east"] / "manifest.csv", root=folder, key="k")
    assert [row.label for row in rows[:2]] == [first["label"], second["label"]]


def test_an_image_with_nothing_but_flagged_boxes_is_left_out(folder: Path) -> None:
    lines = box_lines()
    lines[2:4] = [line + "degenerate" for line in lines[2:4]]
    data = adopt(write_boxes(folder, lines), labels="boxes")
    assert len(data.rows) == 19


def test_a_patient_named_beside_the_boxes_is_the_patient(folder: Path) -> None:
    lines = [f"p{n // 4 % 3 if 'train' in x else x[:12]},{x}" for n, x in enumerate(box_lines())]
    lines = [line.replace("p", f"{'east' in line}", 1) for line in lines]
    data = adopt(write_boxes(folder, lines, header=f"patient_id,{BOXES_HEADER}"), labels="boxes")
    assert data.training_patients() == {"east": 3, "west": 3}


def test_bad_boxes_are_told_by_line_with_the_cure_and_without_a_value(folder: Path) -> None:
    lines = box_lines()
    lines[0] = lines[0].replace("1,1,3,3", "3,1,3,3")
    lines[2] = lines[2].replace("1,1,3,3", f"1,1,{MARK},3")
    lines[4] = lines[4].replace("train", "val")
    found = objections(write_boxes(folder, lines), task="detection")
    assert found[0].startswith("line 2: a box of no size")
    assert found[0].endswith("correct the box or remove it")
    assert found[1].startswith("line 4: expected boxes as")
    assert found[2] == "line 7: an image's boxes differ in patient, site or split"


def test_an_image_that_is_missing_is_told_by_the_line_of_its_first_box(folder: Path) -> None:
    lines = box_lines()
    lines[8:10] = [line.replace("film-", f"{MARK}-") for line in lines[8:10]]
    found = objections(write_boxes(folder, lines), task="detection")
    assert found == ["line 10: the image is missing; restore it or remove the line"]


def test_a_manifest_with_boxes_is_understood_and_its_classes_are_those_of_the_boxes(
    folder: Path,
) -> None:
    lines = [
        line.replace(",0,", ",cell 1 1 3 3,").replace(",1,", ",none,") for line in good_lines()
    ]
    write(folder, lines, header="image,patient,site,label,split")
    assert adopt(folder, labels="boxes").classes == ("cell",)
    assert adopt(folder, labels="boxes", classes=["cell"]).classes == ("cell",)
    with pytest.raises(DataError, match="expected the classes that the boxes name"):
        adopt(folder, labels="boxes", classes=[MARK])
    write(
        folder, [*lines, f"film.png,p,east,{MARK},train"], header="image,patient,site,label,split"
    )
    (objection,) = objections(folder, task="detection")
    assert objection.startswith("line 22: expected boxes as")


@pytest.mark.parametrize("column", ["file", "class", "ymax", "block"])
def test_a_missing_column_of_boxes_is_named(folder: Path, column: str) -> None:
    header = BOXES_HEADER.replace(column, "other")
    (objection,) = objections(write_boxes(folder, box_lines(), header=header), task="detection")
    assert "missing column" in objection

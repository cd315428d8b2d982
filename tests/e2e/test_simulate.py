"""The in-process runtime on real images, where they are at hand."""

import csv
from pathlib import Path

import pytest

from client import setup
from server import recipes
from server.hospitals import DataSet, adopt, write_manifests
from server.simulate import simulate
from shared_models.errors import ConsiliaError

KEY = "0" * 64


def consortium(data: DataSet, folder: Path) -> tuple[list[Path], Path]:
    """Make a site folder for each hospital, and the coordinator's manifest."""
    dirs = {site: folder / site for site in data.sites}
    for site, site_dir in dirs.items():
        setup.create_unenrolled(
            site_dir,
            name=site,
            coordinator=KEY,
            address="127.0.0.1:1",
            root_certificates=Path("none"),
            manifest=site_dir / "manifest.csv",
            root=data.root,
            allow_without_privacy=True,
        )
    validation = folder / "validation.csv"
    write_manifests(data, site_dirs=dirs, validation=validation)
    return list(dirs.values()), validation


def few(data: DataSet, *, most: int) -> DataSet:
    """Keep at most so many patients of each site and split."""
    kept: dict[tuple[str, str], set[str]] = {}
    rows = []
    for row in data.rows:
        patients = kept.setdefault((row["site"], row["split"]), set())
        if row["patient"] in patients or len(patients) < most:
            patients.add(row["patient"])
            rows.append(row)
    return data._replace(rows=tuple(rows))


@pytest.mark.parametrize(
    ("folder", "task", "headline", "epsilon", "personal"),
    [
        ("cxr_pneumonia", "classification", "auc", None, ()),
        ("cxr_pneumonia", "classification", "auc", 8.0, ()),
        ("cxr_pneumonia", "enhancement", "ssim", 8.0, ()),
        ("hippocampus_mr", "denoising", "psnr", 8.0, ()),
        ("hippocampus_mr", "reconstruction", "psnr", 8.0, ()),
        ("hippocampus_mr", "segmentation", "dice", None, ()),
        ("hippocampus_mr", "segmentation", "dice", 8.0, ()),
        ("blood_cells_boxes", "detection", "map50", None, ()),
        ("cxr_pneumonia", "anomaly", "auc", None, ()),
        ("cxr_pneumonia", "embedding", "ssim", 8.0, ()),
        ("nuclei", "segmentation", "dice", None, ("model.0.",)),
    ],
)
def test_real_images_are_trained_in_process(
    data_dir: Path,
    tmp_path: Path,
    folder: str,
    task: str,
    headline: str,
    epsilon: float | None,
    personal: tuple[str, ...],
) -> None:
    data = few(adopt(data_dir / folder, labels=recipes.labels_of(task, data_dir / folder)), most=11)
    sites, validation = consortium(data, tmp_path)
    plan = recipes.plan_for(
        data, name="test", task=task, coordinator=KEY, seed=0, epsilon=epsilon, num_rounds=1
    )
    steps = plan.training.steps_per_round if epsilon else 2
    rate = min(0.2, plan.training.sample_rate) if epsilon else 0.2  # no more than was paid for
    changed = {"steps_per_round": steps, "sample_rate": rate, "personal": personal}
    short = plan.training.model_copy(update=changed)
    report = simulate(
        plan.model_copy(update={"training": short}),
        sites,
        tmp_path / "out",
        validation_manifest=validation,
        validation_root=data.root,
    )
    assert {site.name for site in report.sites} == set(data.sites)
    assert report.headline == headline
    assert headline in report.global_.metrics
    assert report.global_.pictures
    assert any("stay with each hospital" in note for note in report.notes) == bool(personal)
    assert all((site.epsilon is not None) == (epsilon is not None) for site in report.sites)
    assert all(site.epsilon <= 8.0 for site in report.sites if site.epsilon is not None)


def test_a_rehearsal_leaves_nothing_in_the_sites_own_ledger(data_dir: Path, tmp_path: Path) -> None:
    data = few(adopt(data_dir / "cxr_pneumonia", labels="class"), most=12)
    sites, _ = consortium(data, tmp_path)
    plan = recipes.plan_for(
        data, name="t", task="classification", coordinator=KEY, seed=0, epsilon=8.0, num_rounds=1
    )
    simulate(plan, sites, tmp_path / "out")
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_a_broken_image_is_refused_and_named_by_its_line_only(
    data_dir: Path, tmp_path: Path
) -> None:
    data = few(adopt(data_dir / "cxr_pneumonia", labels="class"), most=12)
    sites, _ = consortium(data, tmp_path)
    broken = tmp_path / "MARKED-7731.png"
    broken.write_bytes(b"\x89PNG broken")
    manifest = sites[0] / "manifest.csv"
    with manifest.open("a", newline="") as handle:
        csv.writer(handle).writerow([str(broken), "MARKED-7731", "0", "train"])
    plan = recipes.plan_for(
        data, name="t", task="classification", coordinator=KEY, seed=0, epsilon=None, num_rounds=1
    )
    with pytest.raises(ConsiliaError) as caught:
        simulate(plan, sites, tmp_path / "out")
    assert f"{sites[0].name}: data" in str(caught.value)
    assert "MARKED" not in str(caught.value)

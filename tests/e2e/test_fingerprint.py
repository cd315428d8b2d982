"""A fingerprint over several hospitals, of phantoms and of real images, in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from client import setup
from client.fingerprint import Measured, counted, measure, told
from server import cli, geometry, store
from server import fingerprint as fingerprints
from server.hospitals import DataSet, adopt, join, write_manifests
from server.simulate import take_fingerprint
from shared_models import audit
from shared_models.contracts import Fingerprint, FingerprintReport, Histogram
from shared_models.errors import ConsiliaError
from shared_models.fingerprint import event_of_fingerprint, layouts, summed
from shared_models.phantoms import HOSPITALS, write_hospitals
from shared_models.plan import StudyPlan, render
from shared_models.privacy import epsilon
from shared_models.randomness import seeded
from shared_models.tasks import segmentation

KEY = "0" * 64
TERMS: dict[str, Any] = {
    "spacing": {"low": 0.5, "high": 50.0, "num_cells": 64},
    "extent": {"low": 10, "high": 900, "num_cells": 64},
    "intensity": {"low": -1200, "high": 2000, "num_cells": 64, "percentiles": [0.5, 99.5]},
    "modalities": ["CT", "MR"],
    "classes": "present",
}
SCALES: dict[str, Any] = {
    "spacing": {"low": 0.3, "high": 4.0, "num_cells": 48},
    "extent": {"low": 10, "high": 200, "num_cells": 60},
}


def plan_of(data: DataSet, **changed: Any) -> StudyPlan:
    fields: dict[str, Any] = {
        "name": "geometry",
        "purpose": "demonstration",
        "coordinator": KEY,
        "sites": data.sites,
        "expires": date.today() + timedelta(days=9),
        "min_patients": 10,
        "task": {"name": "segmentation", "params": {"classes": list(data.classes)}},
        "net": {"name": "unet", "params": {"spatial_dims": 3}},
        "imaging": [{"name": "orient"}],
        "strategy": {"name": "fedavg"},
        "training": {
            "num_rounds": 1,
            "steps_per_round": 1,
            "sample_rate": 0.1,
            "learning_rate": 0.1,
        },
        "rounds": {"quorum": len(data.sites)},
        "fingerprint": TERMS,
    }
    return StudyPlan.model_validate(fields | changed)


def noised(noise_multiplier: float) -> dict[str, Any]:
    return {
        "fingerprint": TERMS | {"noise_multiplier": noise_multiplier},
        "privacy": {"epsilon": 8.0, "delta": 1e-3, "noise_multiplier": 1.0, "max_grad_norm": 1.0},
    }


def hospitals_of(data: DataSet, folder: Path) -> list[Path]:
    """Make a site folder for each hospital of ``data``, which tells fingerprints."""
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
        allow(site_dir / "site.toml")
    write_manifests(data, site_dirs=dirs, validation=folder / "validation.csv")
    return list(dirs.values())


def allow(site_toml: Path) -> None:
    text = site_toml.read_text()
    assert "allow_fingerprint = false" in text
    site_toml.write_text(text.replace("allow_fingerprint = false", "allow_fingerprint = true"))


def pooled(sites: list[Path], data: DataSet, plan: StudyPlan) -> list[Measured]:
    """Return what one hospital with everybody's images would measure."""
    task = segmentation.make(classes=list(data.classes))
    return [
        patient
        for site in sites
        for patient in measure(site / "manifest.csv", root=data.root, plan=plan, task=task)
    ]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSet, list[Path]]:
    """Return two hospitals of drawn CT, 16 patients to train on each."""
    folder = tmp_path_factory.mktemp("phantoms")
    ct = [profile for profile in HOSPITALS if profile.Modality == "CT"][:2]
    write_hospitals(folder / "images", seed=1, num_patients=20, size=16, profiles=ct)
    join(folder / "images")
    data = adopt(folder / "images", labels="map")
    return data, hospitals_of(data, folder / "sites")


@pytest.fixture(scope="module")
def plain(phantoms: tuple[DataSet, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fingerprint without noise."""
    out = tmp_path_factory.mktemp("plain") / "out"
    take(*phantoms, out)
    return out


@pytest.fixture(scope="module")
def private(phantoms: tuple[DataSet, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fingerprint with noise."""
    out = tmp_path_factory.mktemp("private") / "out"
    take(*phantoms, out, **noised(1.0))
    return out


def take(data: DataSet, sites: list[Path], out: Path, **changed: Any) -> FingerprintReport:
    return take_fingerprint(plan_of(data, **changed), sites, out)


def steps_of(found: Any, plan: StudyPlan, **how: Any) -> dict[str, dict[str, Any]]:
    return {step.name: dict(step.params) for step, _ in geometry.propose(found, plan, **how)}


def as_told(patients: list[Measured], plan: StudyPlan) -> Fingerprint:
    histograms = tuple(
        Histogram(name=layout.name, counts=tuple(map(float, counts)))
        for layout, counts in zip(layouts(plan), counted(patients, plan), strict=True)
    )
    return Fingerprint(min_cell=0, histograms=histograms)


def test_phantoms_give_the_geometry_of_a_plan(
    phantoms: tuple[DataSet, list[Path]], plain: Path
) -> None:
    data, sites = phantoms
    found = fingerprints.read(plain)
    assert {reply.site for reply in found.replies} == set(data.sites)
    plan = plan_of(data)
    proposed = steps_of(found.total, plan)
    assert list(proposed) == ["orient", "resample", "window", "crop-or-pad"]
    patients = pooled(sites, data, plan)
    assert found.num_patients == len(patients)
    assert proposed["window"]["low"] < -500 < 0 < proposed["window"]["high"]
    assert all(side % 4 == 0 for side in proposed["crop-or-pad"]["size"])
    assert audit.audit_fingerprint(plain).failed == ()
    assert not [file for site in sites for file in site.rglob("*.jsonl")]


def test_on_real_hippocampi_the_geometry_is_that_of_pooled_data(
    data_dir: Path, tmp_path: Path
) -> None:
    """Three scanners; what no site may see, all images in one place, gives the same by one cell."""
    data = adopt(data_dir / "hippocampus_mr", labels="map")
    sites = hospitals_of(data, tmp_path)
    fine = SCALES | {
        "size": {"low": 10, "high": 200, "num_cells": 60},
        "modalities": ["CT", "MR"],
    }
    plan = plan_of(data, fingerprint=fine)
    found = take(data, sites, tmp_path / "out", fingerprint=fine)
    patients = pooled(sites, data, plan)
    assert found.num_patients == len(patients)
    assert len(found.replies) == 3
    exact = as_told(patients, plan)
    for share in (0.1, 0.5, 0.95):
        for one, truth in zip(found.total.histograms, exact.histograms, strict=True):
            at = geometry.cell_at(one.counts, share), geometry.cell_at(truth.counts, share)
            assert abs(at[0] - at[1]) <= 1, (one.name, share)
    proposed, direct = steps_of(found.total, plan), steps_of(exact, plan)
    assert proposed["standardize"] == direct["standardize"] == {}
    spacing = np.median([patient.spacing_mm for patient in patients], axis=0)
    assert proposed["resample"]["spacing_mm"] == pytest.approx(
        spacing, rel=(4 / 0.3) ** (1 / 48) - 1
    )
    sizes = zip(proposed["crop-or-pad"]["size"], direct["crop-or-pad"]["size"], strict=True)
    assert all(abs(a - b) <= 4 for a, b in sizes)
    most = np.percentile([patient.size for patient in patients], 95, axis=0)
    assert all(
        0.94 * want <= side <= 1.06 * want + 4
        for side, want in zip(proposed["crop-or-pad"]["size"], most, strict=True)
    )
    near = list(_differences_under_noise(data, sites, exact))
    assert np.mean([abs(cells) <= 1 for cells in near]) > 0.8
    assert np.mean([abs(cells) <= 3 for cells in near]) > 0.95


def _differences_under_noise(data: DataSet, sites: list[Path], exact: Fingerprint) -> Iterator[int]:
    """Yield by how many cells medians and 95th percentiles are off, at an epsilon of about 3."""
    plan = plan_of(data, **noised(1.0) | {"fingerprint": SCALES | {"noise_multiplier": 1.0}})
    assert epsilon([event_of_fingerprint(plan)], delta=1e-3) < 3.2
    truth = {one.name: one.counts for one in exact.histograms}
    by_site = [pooled([site], data, plan) for site in sites]
    deviation = geometry.deviation(plan, num_sites=len(sites))
    for seed in range(10):
        each = [
            told(of, plan, noise_multiplier=1.0, min_cell=5, randomness=seeded(seed, number))
            for number, of in enumerate(by_site)
        ]
        for one, share in product(summed(each).histograms, (0.5, 0.95)):
            found = geometry.cell_at(one.counts, share, deviation=deviation)
            yield found - geometry.cell_at(truth[one.name], share)


def test_noise_is_accounted_by_site_and_auditor(
    phantoms: tuple[DataSet, list[Path]], private: Path
) -> None:
    plan = plan_of(phantoms[0], **noised(1.0))
    cost = epsilon([event_of_fingerprint(plan)], delta=1e-3)
    assert 0 < cost < 8
    for reply in fingerprints.read(private).replies:
        assert reply.privacy is not None
        assert reply.privacy.epsilon == cost
        assert reply.fingerprint is not None
        counts = [count for one in reply.fingerprint.histograms for count in one.counts]
        assert any(count != round(count) for count in counts)
    holds = audit.audit_fingerprint(private)
    assert holds.failed == ()
    assert any(f"epsilon {cost:g}" in text for text in holds.passed)


def test_a_site_that_tells_no_fingerprints_is_named(
    phantoms: tuple[DataSet, list[Path]], tmp_path: Path
) -> None:
    data, sites = phantoms
    shutil.copytree(sites[0], tmp_path / "silent")
    file = tmp_path / "silent" / "site.toml"
    file.write_text(
        file.read_text().replace("allow_fingerprint = true", "allow_fingerprint = false")
    )
    with pytest.raises(ConsiliaError, match=f"{sites[0].name}: fingerprint: this site tells no"):
        take(data, [tmp_path / "silent", sites[1]], tmp_path / "out")


@pytest.mark.parametrize(
    ("sentence", "spoil"),
    [
        ("epsilon 0.1", lambda report: report["replies"][0]["privacy"].update(epsilon=0.1)),
        ("mechanism", lambda report: report["replies"][0]["privacy"].update(sample_rate=0.1)),
        ("gathered", lambda report: report["replies"][0]["fingerprint"].update(min_cell=5)),
        ("the sum", lambda report: report.update(num_patients=10**6)),
        ("rounds.jsonl", lambda report: report["replies"].pop()),
        ("printed with it", lambda report: report.update(plan_toml="name = 'other'")),
    ],
)
def test_the_auditor_finds_what_was_changed(
    sentence: str, spoil: Callable[[dict[str, Any]], Any], private: Path, tmp_path: Path
) -> None:
    shutil.copytree(private, tmp_path / "out")
    file = tmp_path / "out" / "fingerprint.json"
    report = json.loads(file.read_text())
    spoil(report)
    file.write_text(json.dumps(report))
    failed = audit.audit_fingerprint(tmp_path / "out").failed
    assert any(sentence in text for text in failed), failed


def test_a_reply_with_other_histograms_is_refused_and_its_site_named(
    phantoms: tuple[DataSet, list[Path]], plain: Path
) -> None:
    plan = plan_of(phantoms[0])
    (record,) = store.read_rounds(plain)
    first, second = record.replies
    one = first.fingerprint.histograms[0]  # type: ignore[union-attr]
    spoiled = first.fingerprint.model_copy(  # type: ignore[union-attr]
        update={"histograms": (one.model_copy(update={"counts": (2.0, *one.counts[1:])}),)}
    )
    bad = first.model_copy(update={"fingerprint": spoiled})
    many = second.model_copy(update={"num_patients": 10**9})
    found = fingerprints.believed(record.model_copy(update={"replies": (bad, many)}), plan)
    assert found.replies == ()
    assert [(refusal.site, refusal.code) for refusal in found.refusals] == [
        (first.site, "bad-reply"),
        (second.site, "bad-reply"),
    ]


def test_it_is_shown_and_printed_as_a_plan_by_the_commands(
    phantoms: tuple[DataSet, list[Path]], tmp_path: Path
) -> None:
    data, sites = phantoms
    plan = tmp_path / "plan.toml"
    plan.write_text(render(plan_of(data)))
    runner, out = CliRunner(), str(tmp_path / "out")
    first = runner.invoke(cli.app, ["simulate", str(plan), *map(str, sites), "--out", out])
    assert first.exit_code == 0, first.output
    again = runner.invoke(cli.app, ["fingerprint", out])
    assert again.output == first.output
    for word in ("spacing (mm) along z", "intensity at 99.5 %", "not differential privacy"):
        assert word in first.output
    assert 'name = "resample"' in first.output
    as_json = runner.invoke(cli.app, ["fingerprint", out, "--json", "--percentile", "50"])
    assert "[[imaging]]" in json.loads(as_json.output)["proposal"]
    verified = runner.invoke(audit.app, ["verify", out])
    assert verified.exit_code == 0, verified.output
    assert "nothing was asked under it but the fingerprint" in verified.output


def test_a_fingerprint_that_is_there_is_not_asked_for_again(plain: Path) -> None:
    def unasked(circle: Any) -> Any:
        raise AssertionError("a site was asked")

    found = fingerprints.read(plain)
    assert fingerprints.run(plain, unasked) == found
    before = (plain / store.FINGERPRINT).read_bytes()
    (plain / store.FINGERPRINT).unlink()  # as a crash leaves it, between the line and the report
    try:
        again = fingerprints.run(plain, unasked)
        assert (again.replies, again.total) == (found.replies, found.total)
        assert len(store.read_rounds(plain)) == 1
    finally:
        (plain / store.FINGERPRINT).write_bytes(before)

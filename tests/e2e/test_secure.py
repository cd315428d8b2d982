"""Secure aggregation, a split noise and a warm start together, on pictures drawn for the test."""

from __future__ import annotations

import csv
import html
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from client import setup
from server import rounds
from server.hospitals import DataSet, adopt, write_manifests
from server.simulate import ask_functions, simulate
from server.start import FILE, StartTerms, warmed
from shared_models.errors import ConsiliaError, DocumentError
from shared_models.masking import LARGEST, opened
from shared_models.plan import StudyPlan, planned_events
from shared_models.privacy import COVERS_SUMS, DOES_NOT_COVER_SUMS, epsilon, parse_ledger
from shared_models.weights import flatten, load, vector_of

SITES = ("east", "north", "west")
KEY = "0" * 64
TRAINING = {
    "num_rounds": 3,
    "steps_per_round": 1,
    "sample_rate": 0.5,
    "images_per_patient": 2,
    "optimizer": "sgd",
    "learning_rate": 0.2,
}
PRIVACY = {
    "epsilon": 8.0,
    "delta": 0.004,
    "noise_multiplier": 2.0,
    "max_grad_norm": 1.0,
    "noise_shares": 2,
}
SECURE = {"quorum": 3, "secure_aggregation": True}


class Consortium(NamedTuple):
    """Three hospitals' folders, and the coordinator's manifests of patients of no hospital."""

    data: DataSet
    site_dirs: list[Path]
    validation: Path
    start: Path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    folder = tmp_path_factory.mktemp("consortium")
    data = adopt(drawn(folder / "pictures"), labels="class")
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
    made = Consortium(data, [*dirs.values()], folder / "validation.csv", folder / "start.csv")
    write_manifests(data, site_dirs=dirs, validation=made.validation, start=made.start)
    return made


def drawn(folder: Path) -> Path:
    """Draw 12 patients to train on, 6 to test on and 4 of the coordinator's own for each site."""
    folder.mkdir()
    splits = ["train"] * 12 + ["test"] * 6 + ["val"] * 4
    with (folder / "manifest.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["image", "patient", "site", "finding", "split"])
        for number, (site, (n, split)) in enumerate(
            (site, each) for site in SITES for each in enumerate(splits)
        ):
            pixels = np.random.default_rng(number).integers(0, 99, (12, 12)) + 99 * (n % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", f"{site}-{n}", site, n % 2, split])
    return folder


@pytest.fixture
def plan_of(new_plan: Callable[..., StudyPlan]) -> Callable[..., StudyPlan]:
    def make(**changes: Any) -> StudyPlan:
        fields = {
            "sites": SITES,
            "task": {"name": "classification", "params": {"classes": ["no finding", "finding"]}},
            "training": TRAINING,
            "rounds": {"quorum": 3},
            "strategy": {"name": "fedavgm", "params": {"momentum": 0.5}},
        }
        return new_plan(**(fields | changes))

    return make


def simulated(plan: StudyPlan, consortium: Consortium, out: Path, **changes: Any) -> Any:
    return simulate(
        plan,
        consortium.site_dirs,
        out,
        validation_manifest=consortium.validation,
        validation_root=consortium.data.root,
        **changes,
    )


def test_a_private_study_of_summed_updates_states_what_its_epsilon_rests_on(
    consortium: Consortium, plan_of: Callable[..., StudyPlan], tmp_path: Path
) -> None:
    plan, number = warmed(
        plan_of(privacy=PRIVACY, rounds=SECURE, compare_alone=True),
        consortium.start,
        root=consortium.data.root,
        run_dir=tmp_path / "start",
        terms=StartTerms(steps=5, learning_rate=0.01, batch_size=4),
    )
    assert number == 6
    out = tmp_path / "out"
    report = simulated(plan, consortium, out, start=tmp_path / "start" / FILE)
    assert len(report.rounds) == 3
    assert [site.name for site in report.sites] == list(SITES)
    cost = epsilon(planned_events(plan), delta=0.004)
    for site in report.sites:
        assert site.refusals == ()
        assert site.alone is not None
        assert site.privacy is not None
        assert site.epsilon == site.privacy.epsilon == cost <= 8.0
        assert site.privacy.noise_shares == 2
        assert site.privacy.epsilon_unmasked is not None
        assert site.privacy.epsilon_unmasked > 1.2 * cost
        assert site.privacy.covers == COVERS_SUMS.format(noise_shares=2)
        assert site.privacy.does_not_cover == DOES_NOT_COVER_SUMS
    page = html.unescape((out / "report.html").read_text())
    assert "The sum of the hospitals' updates, the only form" in page
    assert "It holds as long as 2 of them keep their share" in page
    trained = flatten(load(out / "model" / "weights.safetensors"))
    assert np.abs(trained - flatten(load(out / FILE))).max() > 0


def test_summed_updates_give_the_weights_that_single_updates_give(
    consortium: Consortium, plan_of: Callable[..., StudyPlan], tmp_path: Path
) -> None:
    """Without privacy, where training under one seed repeats itself."""
    for name, terms in (("apart", {"quorum": 3}), ("summed", SECURE)):
        simulated(plan_of(rounds=terms), consortium, tmp_path / name)
    apart, summed = (
        flatten(load(tmp_path / name / "model" / "weights.safetensors"))
        for name in ("apart", "summed")
    )
    assert summed == pytest.approx(apart, abs=1e-6)
    assert not np.array_equal(apart, np.zeros_like(apart))


@pytest.mark.parametrize(("is_known", "charges"), [(True, 1), (False, 2)])
def test_nobody_is_charged_twice_for_a_hospital_that_is_known_to_be_away(
    is_known: bool,
    charges: int,
    consortium: Consortium,
    plan_of: Callable[..., StudyPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the knowledge, each round is charged once more to those who are there."""

    class Lost:
        def __init__(self, answers: Any) -> None:
            self.ask = ask_functions(dict(answers) | {"west": lambda _: None})

        def __call__(self, letters: Any, deadline_s: float) -> Any:
            return self.ask(letters, deadline_s)

        def away(self) -> list[str]:
            return ["west"] if is_known else []

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("server.simulate.ask_functions", Lost)
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda **_: nullcontext(str(scratch)))
    plan = plan_of(
        privacy=PRIVACY | {"noise_multiplier": 8.0},
        rounds=SECURE | {"quorum": 2},
        training=TRAINING | {"num_rounds": 1},
    )
    simulated(plan, consortium, tmp_path / "out")
    assert not (scratch / "west" / "ledger.jsonl").exists()
    for site in ("east", "north"):
        found = parse_ledger((scratch / site / "ledger.jsonl").read_bytes())
        assert [entry.attempt for entry in found.reservations] == list(range(charges))


def test_no_update_is_on_its_way_to_the_coordinator_unmasked(
    consortium: Consortium,
    plan_of: Callable[..., StudyPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came: list[Any] = []
    real = rounds.opened

    def spied(letter: Any, *, key: str) -> Any:
        said, vector = real(letter, key=key)
        came.extend([] if vector is None else [(said, vector_of(vector, "<u8"))])
        return said, vector

    monkeypatch.setattr(rounds, "opened", spied)
    simulated(plan_of(rounds=SECURE), consortium, tmp_path / "out")
    assert len(came) == 3 * len(SITES)
    for said, vector in came:
        assert said.is_masked
        assert np.abs(opened(vector)).mean() > LARGEST  # which no update's numbers reach


def test_a_study_does_not_begin_without_the_start_it_states(
    consortium: Consortium, plan_of: Callable[..., StudyPlan], tmp_path: Path
) -> None:
    plan = plan_of(start="ab" * 32)
    with pytest.raises(DocumentError, match="put them there"):
        simulated(plan, consortium, tmp_path / "none")
    warmed(
        plan,
        consortium.start,
        root=consortium.data.root,
        run_dir=tmp_path / "start",
        terms=StartTerms(steps=1, learning_rate=0.01, batch_size=4),
    )
    with pytest.raises(DocumentError, match="not the start that the plan states"):
        simulated(plan, consortium, tmp_path / "other", start=tmp_path / "start" / FILE)


def test_a_rehearsal_trusts_the_hospitals_that_take_part_and_leaves_no_trace(
    consortium: Consortium, plan_of: Callable[..., StudyPlan], tmp_path: Path
) -> None:
    simulated(plan_of(rounds=SECURE), consortium, tmp_path / "out")
    for site_dir in consortium.site_dirs:
        assert not (site_dir / "peers.toml").exists()
        assert not (site_dir / "state").exists()


def test_a_hospital_of_another_key_is_not_hidden_among(
    consortium: Consortium,
    plan_of: Callable[..., StudyPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If none of the peers' keys is the one a site knows, it sends nothing."""
    from client import answer

    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    real = answer.rehearse

    def misled(config_file: Path, **given_: Any) -> Any:
        trusted = dict.fromkeys(given_["trusted"], stranger)
        return real(config_file, **given_ | {"trusted": trusted})

    monkeypatch.setattr(answer, "rehearse", misled)
    with pytest.raises(ConsiliaError) as caught:
        simulated(plan_of(rounds=SECURE), consortium, tmp_path / "out")
    assert [line for line in caught.value.objections if line.endswith(": peers")] == [
        f"{site}: peers" for site in SITES
    ]


def test_a_site_that_is_lost_for_a_round_costs_the_others_a_round_more(
    consortium: Consortium,
    plan_of: Callable[..., StudyPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from server import simulate as simulation

    real = simulation.ask_functions

    def losing(answers: Any) -> Any:
        def lost_once(letter: Any, answer: Any = answers["north"]) -> Any:
            is_first = '"attempt":0' in letter.document and '"round_":1' in letter.document
            return None if is_first else answer(letter)

        return real({**answers, "north": lost_once})

    monkeypatch.setattr(simulation, "ask_functions", losing)
    plan = plan_of(privacy=PRIVACY, rounds=SECURE | {"quorum": 2, "spare": 1})
    report = simulated(plan, consortium, tmp_path / "out")
    spent = {site.name: site.privacy.steps for site in report.sites if site.privacy}
    assert spent == {"east": 4, "north": 2, "west": 4}
    assert report.rounds[1].refused == {"north": "no-answer"}
    assert all(site.epsilon <= 8.0 for site in report.sites if site.epsilon is not None)

"""The pages: whole, closed, readable, and about nobody but whom they should be about.

Run as a program it writes the golden pages anew.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.display import pages, words
from client.display.prediction import (
    Classified,
    ClassShare,
    Legend,
    ModelCard,
    Outlined,
    Prediction,
    Preset,
    Region,
    Sheets,
    StudyCard,
)
from shared_models.contracts import Evaluation, PrivacyStatement, ReleasedSite

GOLDEN = Path(__file__).parents[2] / "golden" / "display"
IDENTITY = ("QUILLFEATHER ZENOBIA", "MRN-7731-QX", "19470313", "1947-03-13", "20190301")
PRIVACY = PrivacyStatement(
    epsilon=3.1256,
    delta=1e-3,
    epsilon_rdp=3.4,
    noise_multiplier=1.1,
    sample_rate=0.1,
    max_grad_norm=1.0,
    images_per_patient=4,
    steps=100,
    covers="all that this hospital sent",
    does_not_cover="that it took part",
)
MODEL = ModelCard(
    name="lungs",
    version="lungs dddddddddddd",
    purpose="research",
    description="Find a thing.",
    task="segmentation",
    net="unet",
    strategy="fedavg",
    num_rounds=12,
    num_parameters=47123,
    intended_use="Research. Not for diagnosis.",
    modalities=("CT",),
    study="a" * 64,
    weights_digest="d" * 64,
    manifest_digest="e" * 64,
    coordinator="c" * 64,
    validation=Evaluation(
        metrics={"dice": 0.8123, "hd95": 6.41},
        intervals={"dice": (0.78, 0.84)},
        num_patients=83,
        num_images=400,
    ),
    sites={
        name: ReleasedSite(num_patients=120, num_test_patients=30, metrics={"dice": dice})
        for name, dice in (("north", 0.85), ("south", 0.7))
    },
    privacy={"north": PRIVACY},
    is_private=True,
)
STUDY = StudyCard(
    kind="DICOM series",
    modality="CT",
    patient_name=IDENTITY[0],
    patient_id=IDENTITY[1],
    birth_date=IDENTITY[2],
    sex="F",
    study_date=IDENTITY[4],
    num_slices=2,
    rows=8,
    columns=8,
    spacing_mm=(5.0, 1.0, 1.0),
    edges=("R", "L", "A", "P"),
)
OUTLINED = Outlined(
    regions=(
        Region(
            name="organ",
            colour="#e69f00",
            num_voxels=40,
            share_of_image=0.3,
            volume_ml=480.0,
            first_slice=1,
            last_slice=2,
            largest_slice=2,
            voxels_by_slice=(15, 25),
            extent_mm=(10.0, 6.0, 7.0),
            mean_value=61.2,
            confidence=0.97,
        ),
        Region(name="lesion", colour="#56b4e9", num_voxels=0, share_of_image=0.0),
    )
)
CLASSIFIED = Classified(
    classes=(
        ClassShare(name="opaque", probability=0.87),
        ClassShare(name="clear", probability=0.13),
    ),
    by_slice=(0.94, 0.8),
)


def sheet(values: list[int]) -> str:
    """Return two tiles of 8 x 8 beside each other, each of one value in its middle, as a PNG."""
    pixels = np.zeros((8, 16), np.uint8)
    for number, value in enumerate(values):
        pixels[2:6, 8 * number + 2 : 8 * number + 6] = value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def prediction(
    answer: Outlined | Classified = OUTLINED, *, image: str = "IMAGE", **changes: object
) -> Prediction:
    is_map = isinstance(answer, Outlined)
    return Prediction(
        created=datetime(2026, 3, 1, 12, 30, tzinfo=UTC),
        software="consilia 0.1.0",
        model=MODEL,
        study=STUDY,
        answer=answer,
        legend=(Legend(name="organ", colour="#e69f00"),) if is_map else (),
        picture="PICTURE",
        sheets=Sheets(
            image_type="png",
            images=(image,),
            overlays=(image,) if is_map else (),
            rows=8,
            columns=8,
            tile_rows=8,
            tile_columns=8,
            across=2,
            down=1,
            levels=tuple(float(4 * n - 500) for n in range(256)),
            unit="HU",
            presets=(Preset(name="Soft tissue", centre=40, width=400),),
            height_per_width=1.0,
            first_shown=1,
        ),
        files=("segmentation.dcm",),
        cautions=("The model was validated on only 12 patients.",),
    ).model_copy(update=changes)


EXAMPLES = {"map": prediction(), "class": prediction(CLASSIFIED)}
MAKERS = {"doctor": pages.doctor, "patient": pages.patient}


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
@pytest.mark.parametrize("whose", sorted(MAKERS))
def test_a_page_changes_only_on_purpose(whose: str, kind: str) -> None:
    page = MAKERS[whose](EXAMPLES[kind])
    assert page == (GOLDEN / f"{whose}-{kind}.html").read_text(encoding="utf-8")
    again = Prediction.model_validate_json(EXAMPLES[kind].model_dump_json())
    assert MAKERS[whose](again) == page


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its text without style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._silent = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("style", "script")
        if tag in ("p", "h1", "h2", "li", "figcaption", "strong"):
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split(" "))


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
@pytest.mark.parametrize("whose", sorted(MAKERS))
def test_a_page_fetches_nothing_and_runs_nothing_but_its_own(whose: str, kind: str) -> None:
    page = MAKERS[whose](EXAMPLES[kind])
    seen = Seen(page)
    (policy,) = [a["content"] or "" for t, a in seen.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    assert ("script-src" in policy) is (whose == "doctor")
    for tag, attributes in seen.tags:
        assert tag not in ("link", "iframe", "object", "form", "base")
        assert not {name for name in attributes if name.startswith("on") or name == "style"}
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/")
    assert "https://" not in page and "http://" not in page and "url(" not in page
    assert "fetch(" not in page and "XMLHttpRequest" not in page


def test_text_of_a_prediction_is_never_markup() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    answer = OUTLINED.model_copy(
        update={"regions": (OUTLINED.regions[0].model_copy(update={"name": evil}),)}
    )
    found = prediction(
        answer,
        model=MODEL.model_copy(update={"description": evil, "name": evil}),
        study=STUDY.model_copy(update={"patient_name": evil}),
        legend=(Legend(name=evil, colour="#e69f00"),),
        cautions=(evil,),
    )
    for make in MAKERS.values():
        page = make(found)
        assert "<img src=x" not in page and "<script>alert" not in page
        assert page.count("</script>") == (2 if make is pages.doctor else 0)


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_nothing_that_identifies_the_patient_is_on_the_patients_page(kind: str) -> None:
    page = pages.patient(EXAMPLES[kind])
    assert not [part for part in IDENTITY if part in page]
    doctors = pages.doctor(EXAMPLES[kind])
    assert IDENTITY[0] in doctors and IDENTITY[1] in doctors and IDENTITY[3] in doctors


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_the_patients_page_is_no_diagnosis_and_easy_to_read(kind: str) -> None:
    text = Seen(pages.patient(EXAMPLES[kind])).text
    assert "This is not a diagnosis." in text
    assert "%" not in text and not re.search(r"\d\.\d", text)
    hard = ("probability", "algorithm", "segmentation", "classification", "epsilon", "voxel")
    assert not [word for word in hard if word in text.lower()]
    assert reading_grade(text) < 6.5, "a child of twelve should be able to read it"


def reading_grade(text: str) -> float:
    """Return the Flesch-Kincaid grade level, vowel groups counted as syllables (Kincaid 1975)."""
    sentences = [s for s in re.split(r"[.!?:\n]+", text) if re.search(r"[a-z]", s)]
    parts = re.findall(r"[A-Za-z]+", text)
    syllables = sum(
        max(1, len(re.findall(r"[aeiouy]+", w.lower().removesuffix("e")))) for w in parts
    )
    return 0.39 * len(parts) / len(sentences) + 11.8 * syllables / len(parts) - 15.59


def test_an_epsilon_never_stands_without_unit_delta_and_accountant() -> None:
    text = Seen(pages.doctor(EXAMPLES["map"])).text
    expected = "epsilon 3.1256 per patient at delta 0.001 (dp_accounting PLD, pessimistic)"
    assert expected in text
    private = MODEL.model_copy(update={"is_private": False, "privacy": {}})
    assert "Trained without differential privacy" in pages.doctor(prediction(model=private))


def test_the_doctors_page_tells_the_models_tests_its_digests_and_its_cautions() -> None:
    text = Seen(pages.doctor(EXAMPLES["map"])).text
    for expected in ("0.812", "0.780 to 0.840", "0.850", "6.4 mm", "d" * 64, "e" * 64, "c" * 64):
        assert expected in text
    assert "Not for diagnosis" in text and EXAMPLES["map"].cautions[0] in text
    assert "none found" in text and "480 ml" in text


@pytest.mark.parametrize(
    ("share", "doctor", "patient"),
    [
        (0.99, "strongly favours", "very sure"),
        (0.87, "favours", "fairly sure"),
        (0.7, "leans towards", "not sure"),
        (0.52, "does not decide", "could not really decide"),
    ],
)
def test_certainty_in_words_is_never_more_than_it_was(
    share: float, doctor: str, patient: str
) -> None:
    assert words.certainty(share).startswith(doctor)
    assert patient in words.certainty_for_patients(share)


def test_shares_never_become_certain_by_rounding() -> None:
    assert [words.percent(s) for s in (1.0, 0.9999, 0.994, 0.004, 0.0)] == [
        "100 %",
        "> 99 %",
        "99 %",
        "< 1 %",
        "0 %",
    ]
    assert [words.in_ten(s) for s in (0.99, 0.9, 0.5, 0.01)] == [
        "nearly all",
        "about 9 in 10",
        "about 5 in 10",
        "almost none",
    ]


@pytest.mark.parametrize(
    ("ml", "expected"),
    [
        (0.3, "less than half a teaspoon"),
        (5.2, "about as much as one teaspoon"),
        (26, "about as much as 2 tablespoons"),
        (399, "about as much as 2 cups"),
        (1600, "about as much as 2 large milk bottles"),
    ],
)
def test_a_volume_is_told_by_things_in_a_kitchen(ml: float, expected: str) -> None:
    assert words.volume_for_patients(ml) == expected


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_real_browser_runs_the_page_under_its_policy(tmp_path: Path) -> None:
    file = tmp_path / "doctor.html"
    file.write_text(pages.doctor(prediction(image=sheet([1, 1]))), encoding="utf-8")
    folder = tmp_path / "profile"
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=3000", "--dump-dom", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if not done.stdout:
        pytest.skip("Chromium does not start on this machine")
    stage = next(a for t, a in Seen(done.stdout).tags if a.get("id") == "canvas")
    assert "aspect-ratio" in (
        stage["style"] or ""
    )  # set by the script, once every sheet is decoded
    assert "Content Security Policy" not in done.stderr
    assert "Uncaught" not in done.stderr


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for kind, example in EXAMPLES.items():
        for whose, make in MAKERS.items():
            (GOLDEN / f"{whose}-{kind}.html").write_text(make(example), encoding="utf-8")

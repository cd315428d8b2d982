"""The doctor's page and the patient's page, each one file, from a prediction alone.

Guarantees:
    A page fetches nothing, and runs no script but its own.
    The same prediction gives the same bytes.
    Text in a prediction is never markup on a page.
    Nothing that identifies the patient is on the patient's page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from client.display import words
from client.display.prediction import Prediction

STYLE, SCRIPT, PATIENT_STYLE = "doctor.css", "doctor.js", "patient.css"


def doctor(prediction: Prediction) -> str:
    """Return the page for the doctor: one HTML file that needs nothing beside it."""
    return (
        _environment()
        .get_template("doctor.html.j2")
        .render(
            found=prediction,
            answer_part=f"doctor_{prediction.answer.kind}.html.j2",
            answer_strips=f"doctor_{prediction.answer.kind}_strips.html.j2",
            policy=_policy(STYLE, SCRIPT),
            viewer=_data(prediction),
            metrics=_metrics(prediction),
        )
    )


def patient(prediction: Prediction) -> str:
    """Return the page for the patient: one A4 sheet in plain words, without a script.

    Nothing of the study's identity reaches the template.
    """
    study = prediction.study
    return (
        _environment()
        .get_template("patient.html.j2")
        .render(
            answer=prediction.answer,
            answer_part=f"patient_{prediction.answer.kind}.html.j2",
            picture=prediction.picture,
            modality=study.modality,
            validation=prediction.model.validation,
            num_hospitals=len(prediction.model.sites),
            policy=_policy(PATIENT_STYLE, None),
        )
    )


def _data(prediction: Prediction) -> Markup:
    """Return what the page's script needs to know, safe within a script element."""
    sheets = prediction.sheets.model_dump(mode="json", exclude={"images", "overlays"})
    data = {
        "sheets": sheets,
        "numSlices": prediction.study.num_slices,
        "legend": [one.model_dump() for one in prediction.legend],
    }
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def _metrics(prediction: Prediction) -> list[str]:
    """Return every metric of the release, those of the validation first."""
    names = dict.fromkeys(prediction.model.validation.metrics)
    for site in prediction.model.sites.values():
        names |= dict.fromkeys(site.metrics)
    return list(names)


def _policy(style: str, script: str | None) -> str:
    scripts = "" if script is None else f"script-src '{_hash(script)}'; "
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; {scripts}img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(name: str) -> str:
    content = hashlib.sha256(_text(name).encode()).digest()
    return "sha256-" + base64.b64encode(content).decode()


def _text(name: str) -> str:
    return (files("client") / "templates" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"words": words, "source": _source}
    return environment


def _source(name: str) -> Any:
    return Markup(_text(name))  # our own file, as it is

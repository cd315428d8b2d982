"""The command of ``consilia-site`` that runs a released model on one study, at the hospital."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.studies_cli import AsJson, ConfigFile, console

if TYPE_CHECKING:
    from client.display.prediction import Prediction

app = typer.Typer()


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="The release's folder.")],
    study: Annotated[
        Path, typer.Argument(help="A folder of DICOM files, a DICOM or NIfTI file, a picture.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for the answer; it must not exist.")],
    config: ConfigFile = Path("site.toml"),
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="The coordinator's public key, hexadecimal, where there is no site.toml."
        ),
    ] = None,
    series: Annotated[
        int | None, typer.Option(min=1, help="Which series, where several fit.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="CT, MR, ...; where release or file do not say it.")
    ] = None,
    dicom: Annotated[bool, typer.Option(help="Write DICOM objects for the PACS too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Run a released model on one study: pages for doctor and patient, objects for the PACS.

    Everything stays on this machine. Not for diagnosis.
    """
    from client import config as configs
    from client.predict import Choice
    from client.predict import predict as run

    plugins: tuple[str, ...] = ()
    if coordinator is None:
        site = configs.read(config)
        coordinator, plugins = site.coordinator, site.policy.plugins
    with _telling(is_quiet=as_json) as tell:
        found = run(
            model,
            study,
            out,
            coordinator=coordinator,
            plugins=plugins,
            choice=Choice(modality, series, dicom),
            progress=tell,
        )
    if as_json:
        print(json.dumps(_summary(found)))
    else:
        _show(found)


def _show(found: Prediction) -> None:
    """Print what was written and what the model said; nothing of the patient."""
    from client.display import words

    out = console()
    out.print(f"model {found.model.version}; {found.model.intended_use}", markup=False)
    for line in words.answer(found.answer):
        out.print(f"  {line}", markup=False)
    for caution in found.cautions:
        out.print(f"! {caution}", markup=False)
    names = ", ".join(["prediction.json", "doctor.html", "patient.html", *found.files])
    out.print(f"wrote {names}", markup=False)


def _summary(found: Prediction) -> dict[str, object]:
    """Return what a machine may want to know, without the pictures and without the patient."""
    return {
        "model": found.model.version,
        "answer": found.answer.model_dump(mode="json"),
        "files": ["prediction.json", "doctor.html", "patient.html", *found.files],
        "cautions": list(found.cautions),
    }


@contextmanager
def _telling(*, is_quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done."""
    from rich.console import Console

    err = Console(stderr=True)
    if is_quiet or not err.is_terminal:
        yield lambda _: None
        return
    with err.status("starting") as status:
        yield lambda text: status.update(f"{text} ...")

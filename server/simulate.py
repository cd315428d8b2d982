"""The same study on one machine: functions instead of a network.

Sites are found by entry point (``consilia.runtimes``), never imported: the coordinator's rooms know
nothing of the hospital's. Given the same seed and no privacy noise, the weights are those of the
networked run, bit for bit.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server import fingerprint, store, study
from server.rounds import Ask
from server.start import FILE as START_FILE
from shared_models import plan as plans
from shared_models.contracts import FingerprintReport, StudyReport
from shared_models.errors import DocumentError
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.registry import find
from shared_models.signing import public_key, sign
from shared_models.wire import Letter

AnswerLetter = Callable[[Letter], Letter]


def simulate(
    plan: StudyPlan,
    site_dirs: Sequence[Path],
    out: Path,
    *,
    validation_manifest: Path | None = None,
    validation_root: Path | None = None,
    start: Path | None = None,
) -> StudyReport:
    """Run ``plan`` over the sites whose ``site.toml`` stand in ``site_dirs``, into ``out``.

    A key made for the occasion signs plan and orders; approvals and ledgers are kept in a temporary
    folder, so that a rehearsal is neither charged nor mistaken for a study. ``start`` is the file
    of the weights to begin with, if the plan states a warm start.

    Raises:
        ConsiliaError: if a site cannot be read or objects, all objections at once.
    """
    with _rehearsed(plan, site_dirs, out, validation_manifest, validation_root) as ask:
        if start is not None:
            shutil.copyfile(start, out / START_FILE)
        return study.run(out, lambda _: ask)


def take_fingerprint(plan: StudyPlan, site_dirs: Sequence[Path], out: Path) -> FingerprintReport:
    """Ask the sites for the fingerprint ``plan`` is for, as ``simulate`` runs a study.

    Raises:
        ConsiliaError: if a site cannot be read or objects, all objections at once.
    """
    with _rehearsed(plan, site_dirs, out, None, None) as ask:
        return fingerprint.run(out, lambda _: ask)


@contextmanager
def _rehearsed(
    plan: StudyPlan,
    site_dirs: Sequence[Path],
    out: Path,
    validation_manifest: Path | None,
    validation_root: Path | None,
) -> Iterator[Ask]:
    """Sign ``plan`` with a key made for the occasion, let the sites approve it, lay out ``out``."""
    key = Ed25519PrivateKey.generate()
    plan = plan.model_copy(update={"coordinator": public_key(key)})
    signed = SignedPlan(plan, sign(plan, key=key))
    with tempfile.TemporaryDirectory(prefix="consilia-") as scratch:
        folder = Path(scratch)
        answers, keys = _opened(site_dirs, signed, public_key(key), folder)
        _prepare(out, signed, key, keys, folder, validation_manifest, validation_root)
        yield ask_functions(answers)


def ask_functions(answers: Mapping[str, AnswerLetter]) -> Ask:
    """Return an ``ask`` that hands letters to functions, one site after the other, by name."""

    def ask(
        letters: Mapping[str, Letter], deadline_s: float
    ) -> Iterator[tuple[str, Letter | None]]:
        for site in sorted(letters):
            yield site, answers[site](letters[site])

    return ask


def _opened(
    site_dirs: Sequence[Path], signed: SignedPlan, coordinator: str, folder: Path
) -> tuple[dict[str, AnswerLetter], dict[str, str]]:
    introduce: Any = find("runtimes", "introduction", builtin={}, plugins=_own_distribution())
    rehearse: Any = find("runtimes", "in-process", builtin={}, plugins=_own_distribution())
    files = [site_dir / "site.toml" if site_dir.is_dir() else site_dir for site_dir in site_dirs]
    trusted = dict(introduce(file) for file in files)
    answers, keys = {}, {}
    for file in files:
        seat = rehearse(
            file, signed=signed, coordinator=coordinator, state_dir=folder, trusted=trusted
        )
        answers[seat.name], keys[seat.name] = seat.answer, seat.public_key
    missing = sorted(set(signed.plan.sites) - set(answers))
    if missing:
        raise DocumentError(f"the plan names sites that were not given: {', '.join(missing)}")
    return answers, keys


def _prepare(
    out: Path,
    signed: SignedPlan,
    key: Ed25519PrivateKey,
    keys: Mapping[str, str],
    folder: Path,
    validation_manifest: Path | None,
    validation_root: Path | None,
) -> None:
    """Lay out the run directory; the occasional key stays in the temporary folder."""
    key_file = folder / "coordinator.pem"
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (out / "approvals").mkdir(parents=True)
    (out / "plan.toml").write_text(plans.render(*signed), encoding="utf-8")
    for site in keys:
        found = next((folder / site / "studies").glob("*/approval.json"))
        (out / "approvals" / f"{site}.json").write_bytes(found.read_bytes())
    store.write_settings(
        out,
        store.RunSettings(
            signing_key=key_file,
            sites={site: store.SiteKeys(signing=public) for site, public in keys.items()},
            validation_manifest=validation_manifest,
            validation_root=validation_root,
            data="simulation in one process",
        ),
    )


def _own_distribution() -> tuple[str, ...]:
    from importlib.metadata import version

    return (f"consilia=={version('consilia')}",)

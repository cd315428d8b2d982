"""What the coordinator does beside its rounds, without a network and without a SuperLink."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, nullcontext
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any

import pytest
from cryptography import x509
from typer.testing import CliRunner

from server import consortium, control, desk, serve, store
from server import office as offices
from server.cli import app
from server.conduct import News
from server.office import Office
from shared_models.errors import ConsiliaError
from shared_models.plan import StudyPlan
from shared_models.signing import public_key

KEYS = store.SiteKeys(signing="ab" * 32, node="n")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let nothing happen, time and again; the list holds how that ended."""
    ended = list[str]()

    def nothing(*_: Any, **__: Any) -> Iterator[News]:
        try:
            while True:
                yield News("idle")
        finally:
            ended.append("closed")

    monkeypatch.setattr(serve, "conduct", nothing)
    monkeypatch.setattr(control, "serve", lambda *_, **__: nullcontext())
    return ended


def test_the_servers_certificate_is_issued_anew_in_good_time_while_it_runs(
    office: Office, idle: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(consortium, "SERVER_DAYS", consortium.RENEW_DAYS + 1)
        (office.folder / "tls" / "server.crt").unlink()
        file = offices.certify(office).certificate
    monkeypatch.setattr(serve, "CERTIFY_EVERY_S", 0.0)
    with closing(serve.serve(office, stop=Event())) as news:
        before = file.read_bytes()
        assert [next(news).kind for _ in range(3)] == ["idle"] * 3
        assert file.read_bytes() == before, "it holds for long enough"
        monkeypatch.setattr(consortium, "RENEW_DAYS", consortium.RENEW_DAYS + 2)
        next(news)
        renewed = x509.load_pem_x509_certificate(file.read_bytes())
        assert renewed.not_valid_after_utc > datetime.now(UTC) + timedelta(days=300)
        (office.folder / "tls" / "server.crt").unlink()
        (office.folder / "tls" / "ca.key").write_bytes(b"broken")
        assert next(news).kind == "idle", "an authority that cannot be read ended the rounds"
    assert idle == ["closed"]


def test_a_closed_study_is_wanted_no_more_and_never_again(
    office: Office, idle: list[str], plan: StudyPlan
) -> None:
    at = desk.Desk(office.folder, office.key, {"north": KEYS, "south": KEYS})
    ours = plan.model_copy(update={"coordinator": public_key(office.key)})
    settings = store.RunSettings(signing_key=office.folder / "signing.pem", sites={})
    today = datetime.now(UTC).date()
    run_dirs = [
        desk.propose(at, one, settings=settings, today=today).run_dir
        for one in (ours, ours.model_copy(update={"seed": 7}))
    ]
    for run_dir in run_dirs:
        serve.want(office, run_dir)
    known = serve._known(office)
    assert serve._wanted(office.folder, known()) == sorted(run_dirs)
    for _ in range(2):
        serve.close(office, run_dirs[0])
    assert serve._wanted(office.folder, known()) == [run_dirs[1]]
    assert store.read_failure(run_dirs[0]) == ("the study was closed: it takes no more orders",)
    with pytest.raises(ConsiliaError, match="was closed, for good"):
        serve.want(office, run_dirs[0])
    (run_dirs[0] / serve.WANTED).touch()  # whoever makes the mark by hand
    assert serve._wanted(office.folder, known()) == [run_dirs[1]]
    states = {
        one.run_dir: one.state
        for one in desk.studies(office.folder, today=today, closed=offices.closed(office))
    }
    assert states == {run_dirs[0]: "closed", run_dirs[1]: "offered"}


def test_the_command_closes_a_study_and_a_closed_one_is_not_run(
    office: Office, plan: StudyPlan
) -> None:
    at = desk.Desk(office.folder, office.key, {"north": KEYS, "south": KEYS})
    ours = plan.model_copy(update={"coordinator": public_key(office.key)})
    settings = store.RunSettings(signing_key=office.folder / "signing.pem", sites={})
    found = desk.propose(at, ours, settings=settings, today=datetime.now(UTC).date())
    where = ["--office", str(office.folder)]
    runner = CliRunner()
    closed = runner.invoke(app, ["close", found.study[:8], *where])
    assert (closed.exit_code, "cannot be undone" in closed.output) == (0, True)
    run = runner.invoke(app, ["run", found.study[:8], *where])
    assert isinstance(run.exception, ConsiliaError)
    (told,) = json.loads(runner.invoke(app, ["studies", *where, "--json"]).output)
    assert told["state"] == "closed"

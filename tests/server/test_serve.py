"""What the coordinator does beside its rounds, without a network and without a SuperLink."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any

import pytest
from cryptography import x509

from server import consortium, control, serve
from server import office as offices
from server.conduct import News
from server.office import Office


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

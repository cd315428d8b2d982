"""The outbox: the same bytes for the same question, and nothing for any other."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import outbox
from client.config import PolicySettings
from client.outbox import find, keep
from shared_models import wire
from shared_models.contracts import Evaluation, RoundOrder, SiteReply
from shared_models.signing import public_key
from shared_models.weights import Array, digest
from shared_models.wire import Letter, seal

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OURS = public_key(KEY)
NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ORDER = RoundOrder(
    study="5a" * 32,
    round_=2,
    kind="train",
    site="north",
    weights_digest="d0" * 32,
    issued_at=NOON,
    expires_at=NOON,
)
UPDATE = np.arange(5, dtype=np.float32)


@pytest.fixture(scope="module")
def policy(site_text: str) -> PolicySettings:
    from client import config

    return config.parse(site_text).policy


def reply(update: Array | None = UPDATE, **changed: Any) -> Letter:
    said = SiteReply(
        study=ORDER.study,
        round_=2,
        kind="train",
        site="north",
        num_patients=12,
        update_digest=None if update is None else digest(update),
        evaluation=Evaluation(metrics={"auc": 0.1 + 0.2}, num_patients=6, num_images=6),
    )
    return seal(said.model_copy(update=changed), key=KEY, vector=update)


@pytest.mark.parametrize("update", [UPDATE, None])
def test_a_reply_is_found_as_it_was_sent(
    update: Array | None, tmp_path: Path, policy: PolicySettings
) -> None:
    assert find(tmp_path, ORDER, policy=policy, key=OURS) is None
    keep(tmp_path, ORDER, letter=reply(update), policy=policy)
    assert find(tmp_path, ORDER, policy=policy, key=OURS) == reply(update)


def test_a_reply_of_many_buckets_is_found_as_it_was_sent(
    tmp_path: Path, policy: PolicySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "BUCKET_BYTES", 8)
    keep(tmp_path, ORDER, letter=reply(), policy=policy)
    found = find(tmp_path, ORDER, policy=policy, key=OURS)
    assert found == reply()
    assert [len(bucket) for bucket in found.buckets] == [8, 8, 4]


@pytest.mark.parametrize(
    "changed",
    [
        {"study": "5b" * 32},
        {"round_": 3},
        {"kind": "alone"},
        {"site": "south"},
        {"weights_digest": "d1" * 32},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_reply_is_found_for_the_question_it_answered_and_for_no_other(
    changed: dict[str, Any], tmp_path: Path, policy: PolicySettings
) -> None:
    keep(tmp_path, ORDER, letter=reply(), policy=policy)
    assert find(tmp_path, ORDER.model_copy(update=changed), policy=policy, key=OURS) is None
    later = {name: NOON.replace(hour=13) for name in ("issued_at", "expires_at")}
    assert find(tmp_path, ORDER.model_copy(update=later), policy=policy, key=OURS) is not None


def test_a_reply_made_under_other_rules_of_the_sites_policy_is_not_found(
    tmp_path: Path, policy: PolicySettings
) -> None:
    keep(tmp_path, ORDER, letter=reply(), policy=policy)
    stricter = policy.model_copy(update={"min_test_patients": policy.min_test_patients + 1})
    assert find(tmp_path, ORDER, policy=stricter, key=OURS) is None


def test_a_reply_the_site_did_not_sign_is_not_found(tmp_path: Path, policy: PolicySettings) -> None:
    keep(tmp_path, ORDER, letter=reply(), policy=policy)
    other = public_key(Ed25519PrivateKey.generate())
    assert find(tmp_path, ORDER, policy=policy, key=other) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_a_file_that_is_cut_short_or_changed_is_no_reply(
    tmp_path: Path, policy: PolicySettings, data: st.DataObject
) -> None:
    keep(tmp_path, ORDER, letter=reply(), policy=policy)
    (file,) = (tmp_path / outbox.FOLDER).iterdir()
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:place]
    else:
        byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
        damaged = whole[:place] + bytes([byte]) + whole[place + 1 :]
    file.write_bytes(damaged)
    assert find(tmp_path, ORDER, policy=policy, key=OURS) is None


def test_the_newest_reply_takes_the_older_ones_place(
    tmp_path: Path, policy: PolicySettings
) -> None:
    keep(tmp_path, ORDER, letter=reply(), policy=policy)
    (tmp_path / outbox.FOLDER / ".a.killed.tmp").write_bytes(b"half a reply")
    newer = reply(UPDATE + 1)
    keep(tmp_path, ORDER, letter=newer, policy=policy)
    assert find(tmp_path, ORDER, policy=policy, key=OURS) == newer
    assert len(list((tmp_path / outbox.FOLDER).iterdir())) == 1


def test_only_the_owner_can_read_it_and_its_name_is_the_studys(
    tmp_path: Path, policy: PolicySettings
) -> None:
    keep(tmp_path, ORDER, letter=reply(), policy=policy)
    (file,) = (tmp_path / outbox.FOLDER).iterdir()
    assert file.name == f"{ORDER.study}.train"
    assert file.stat().st_mode & 0o777 == 0o600

"""A new site: keys that never leave, a site.toml that loads, nothing ever overwritten."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import example, given
from hypothesis import strategies as st

from client import config, setup
from shared_models.errors import DocumentError
from shared_models.signing import load_key, public_key

COORDINATOR = "ab" * 32
TEXTS: dict[str, Any] = {
    "name": "north",
    "coordinator": COORDINATOR,
    "address": "fl.example.org:9092",
    "root_certificates": "ca.pem",
    "manifest": "manifest.csv",
    "root": ".",
}


def created(folder: Path, **changed: Any) -> setup.Identity:
    given_: dict[str, Any] = TEXTS | {
        "root_certificates": Path("ca.pem"),
        "manifest": Path("manifest.csv"),
        "root": Path(),
    }
    return setup.create_unenrolled(folder, **given_ | changed)


def test_a_new_site_can_be_read_with_the_keys_it_names(tmp_path: Path) -> None:
    identity = created(tmp_path / "site")
    site = config.read(tmp_path / "site" / "site.toml")
    assert identity.name == site.name == "north"
    assert identity.signing == public_key(load_key(site.signing_key))
    private = serialization.load_ssh_private_key(site.link.node_key.read_bytes(), password=None)
    assert private.public_key() == serialization.load_ssh_public_key(identity.node.encode())
    assert site.coordinator == COORDINATOR
    assert site.policy.coordinators == (COORDINATOR,)


def test_private_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    created(tmp_path)
    for file in (tmp_path / "keys").iterdir():
        if b"PRIVATE" in file.read_bytes():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sum(b"PRIVATE" in file.read_bytes() for file in (tmp_path / "keys").iterdir()) == 2


def test_what_goes_to_the_coordinator_holds_public_keys_only(tmp_path: Path) -> None:
    text = created(tmp_path).model_dump_json()
    files = [file.read_text() for file in (tmp_path / "keys").iterdir()]
    secret = [line for file in files if "PRIVATE" in file for line in file.splitlines()]
    assert len(secret) > 5
    assert not any(line in text for line in secret)


def test_two_sites_share_no_key(tmp_path: Path) -> None:
    one, two = created(tmp_path / "a"), created(tmp_path / "b")
    assert one.signing != two.signing
    assert one.node != two.node


@pytest.mark.parametrize("name", ["site.toml", "keys/signing.pem", "keys/node"])
def test_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / name).write_text("theirs")
    with pytest.raises(FileExistsError):
        created(tmp_path)
    assert (tmp_path / name).read_text() == "theirs"


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"name": "north clinic"}, DocumentError),
        ({"name": 'north"\ncoordinator = "x'}, ValueError),
        ({"coordinator": "abc"}, DocumentError),
        ({"address": "fl.example.org"}, DocumentError),
        ({"max_epsilon": 0.0}, DocumentError),
        ({"max_epsilon": float("inf")}, DocumentError),
        ({"root": Path("a\tb")}, ValueError),
    ],
)
def test_a_value_that_does_not_belong_is_refused_before_anything_is_made(
    changed: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        created(tmp_path / "site", **changed)
    assert not (tmp_path / "site").exists()


@example('a "quoted" \\ $name ${root}')
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_printable_text_comes_back_from_toml_as_it_was(text: str) -> None:
    if not text.isprintable():
        with pytest.raises(ValueError, match="printable"):
            setup.config_text(**TEXTS | {"manifest": text})
        return
    data = tomllib.loads(setup.config_text(**TEXTS | {"manifest": text}))
    told = {"manifest": text, "root": ".", "classes": [], "mapping": "labels.json"}
    assert data["data"] == told
    assert set(data) == set(tomllib.loads(setup.config_text(**TEXTS)))


@pytest.mark.parametrize("allowed", [False, True])
def test_whether_studies_without_privacy_are_allowed_is_written_down(allowed: bool) -> None:
    site = config.parse(setup.config_text(**TEXTS, allow_without_privacy=allowed))
    assert site.policy.allow_without_privacy is allowed


@given(st.floats(1e-3, 1e3))
def test_the_lifetime_allows_two_studies(max_epsilon: float) -> None:
    policy = config.parse(setup.config_text(**TEXTS, max_epsilon=max_epsilon)).policy
    assert policy.max_epsilon_per_study == max_epsilon
    assert policy.max_epsilon_lifetime == 2 * max_epsilon


def test_by_default_nothing_leaves_without_privacy() -> None:
    assert not config.parse(setup.config_text(**TEXTS)).policy.allow_without_privacy


def test_every_setting_of_a_site_stands_in_its_commented_file() -> None:
    data = tomllib.loads(setup.config_text(**TEXTS, control="fl.example.org:443"))
    assert set(data) == set(config.SiteConfig.model_fields)
    for table in ("link", "data", "policy", "performance", "ingest", "cache"):
        model = config.SiteConfig.model_fields[table].annotation
        assert isinstance(model, type)
        assert set(data[table]) == set(model.model_fields)  # type: ignore[attr-defined]


def test_a_site_that_never_joined_has_no_control_plane() -> None:
    link = config.parse(setup.config_text(**TEXTS)).link
    assert (link.control, link.certificate) == (None, None)


def test_control_and_its_certificate_go_together() -> None:
    text = setup.config_text(**TEXTS, control="fl.example.org:443")
    with pytest.raises(DocumentError, match="control and certificate together"):
        config.parse(text.replace('certificate = "keys/control.pem"', ""))

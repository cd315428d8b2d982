"""site.toml: read whole, objected to in full, and never quoted."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from client import config
from client.config import PerformanceSettings, SiteConfig
from shared_models.errors import DocumentError

SECRET = "MARKED-7731"


def written(folder: Path, data: dict[str, Any]) -> Path:
    file = folder / "site.toml"
    file.write_text(tomli_w.dumps(data))
    return file


@pytest.fixture
def data(site_text: str) -> dict[str, Any]:
    return tomllib.loads(site_text)


def test_the_written_site_toml_loads(site_text: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(site_text)
    site = config.read(tmp_path / "site.toml")
    assert isinstance(site, SiteConfig)
    assert site.name == "north"
    assert site.link.address == "fl.example.org:9092"
    assert site.policy.max_epsilon_per_study == 4.0
    assert site.policy.max_epsilon_lifetime == 8.0
    assert not site.policy.allow_without_privacy


def test_relative_paths_are_relative_to_the_files_folder(
    site_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.toml").write_text(site_text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    site = config.read(Path("../site.toml"))
    folder = tmp_path.resolve()
    assert site.state_dir == folder / "state"
    assert site.signing_key == folder / "keys" / "signing.pem"
    assert site.link.root_certificates == folder / "ca.pem"
    assert site.link.node_key == folder / "keys" / "node"
    assert site.data.manifest == folder / "data" / "manifest.csv"
    assert site.data.root == folder / "data"


def test_absolute_paths_stay(data: dict[str, Any], tmp_path: Path) -> None:
    data["state_dir"] = "/var/lib/consilia"
    data["data"]["root"] = "/archive"
    site = config.read(written(tmp_path, data))
    assert site.state_dir == Path("/var/lib/consilia")
    assert site.data.root == Path("/archive")


def test_every_path_is_made_absolute(site_text: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(site_text)
    site = config.read(tmp_path / "site.toml")
    found = [
        value
        for part in (site, site.link, site.data, site.policy, site.ingest, site.cache)
        for value in dict(part).values()
        if isinstance(value, Path)
    ]
    assert len(found) == 10
    assert all(path.is_absolute() for path in found)


def test_performance_may_be_left_out(data: dict[str, Any], tmp_path: Path) -> None:
    del data["performance"]
    assert config.read(written(tmp_path, data)).performance == PerformanceSettings()


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ((), "state_dirs: unknown key; known here: cache, coordinator, data, ingest, limits, link"),
        (
            ("link",),
            "link.state_dirs: unknown key; known here: address, certificate, control, node_",
        ),
        (("data",), "data.state_dirs: unknown key; known here: classes, manifest, mapping,"),
        (("policy",), "policy.state_dirs: unknown key; known here: allow_fingerprint, allow_wi"),
        (("performance",), "performance.state_dirs: unknown key; known here: autocast, device"),
        (("ingest",), "ingest.state_dirs: unknown key; known here: folder, labels, modalities"),
        (("ingest", "terms"), "ingest.terms.state_dirs: unknown key; known here: cleared, dates"),
        (("pacs", "station"), "pacs.station.state_dirs: unknown key; known here: bind, port, res"),
    ],
    ids=["top", "link", "data", "policy", "performance", "ingest", "terms", "station"],
)
def test_unknown_keys_list_the_known_ones(
    where: tuple[str, ...], sentence: str, data: dict[str, Any], tmp_path: Path
) -> None:
    table = data
    for name in where:
        table = table[name]
    table["state_dirs"] = SECRET
    with pytest.raises(DocumentError) as caught:
        config.read(written(tmp_path, data))
    (objection,) = caught.value.objections
    assert objection.startswith(sentence)
    assert SECRET not in objection


WRONG: dict[str, Any] = {
    "name": f"{SECRET} clinic",
    "coordinator": SECRET,
    "schema_version": 7731,
    "link.address": f"{SECRET}/7731",
    "data.root": 7731,
    "policy.coordinators": [SECRET],
    "policy.purposes": [SECRET],
    "policy.tasks": [SECRET],
    "policy.max_rounds": -7731,
    "policy.min_patients": 1,
    "policy.max_delta": 7731.5,
    "policy.max_epsilon_per_study": -7731.5,
    "policy.max_update_mb": float("inf"),
    "policy.metrics": [SECRET],
    "policy.allow_without_privacy": SECRET,
    "policy.quiet_hours": [SECRET],
    "performance.device": SECRET,
    "performance.threads": 0,
}


def test_all_objections_come_at_once_and_no_value_is_repeated(
    data: dict[str, Any], tmp_path: Path
) -> None:
    for path, value in WRONG.items():
        *tables, last = path.split(".")
        table = data[tables[0]] if tables else data
        table[last] = value
    with pytest.raises(DocumentError) as caught:
        config.read(written(tmp_path, data))
    places = [objection.split(":")[0].removesuffix(".0") for objection in caught.value.objections]
    assert sorted(places) == sorted(WRONG)
    assert SECRET not in str(caught.value)
    assert "7731" not in str(caught.value)


def test_a_missing_key_is_named(data: dict[str, Any], tmp_path: Path) -> None:
    del data["signing_key"]
    del data["policy"]["max_delta"]
    with pytest.raises(DocumentError) as caught:
        config.read(written(tmp_path, data))
    assert set(caught.value.objections) == {
        "signing_key: field required",
        "policy.max_delta: field required",
    }


@pytest.mark.parametrize(
    "text", [f"name = {SECRET}", f'name = "{SECRET}', f'a = 1\na = "{SECRET}"', f"[{SECRET}"]
)
def test_what_is_not_toml_is_said_without_its_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(DocumentError, match=r"site.toml is not TOML: .* \(at ") as caught:
        config.read(tmp_path / "site.toml")
    assert SECRET not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"there is no file .*site.toml"):
        config.read(tmp_path / "site.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_bytes(b"name = '\xff\xfe'")
    with pytest.raises(DocumentError, match="as text"):
        config.read(tmp_path / "site.toml")


@given(st.text(max_size=30))
def test_any_text_is_a_configuration_or_a_document_error(text: str) -> None:
    with pytest.raises((DocumentError, tomllib.TOMLDecodeError)):
        config.parse(text)


def test_a_configuration_cannot_be_changed(site_of) -> None:
    site = site_of()
    with pytest.raises(ValueError, match="frozen"):
        site.policy.max_delta = 0.5


@pytest.mark.parametrize(
    "hours",
    [
        "07:00-19:00",
        "mon-fri 07:00-19:00",
        "sat,sun 00:00-24:00",
        "mon-wed,fri 22:00-06:00",
    ],
)
def test_quiet_hours_are_read_as_written(hours: str, data: dict[str, Any], tmp_path: Path) -> None:
    data["policy"] |= {"quiet_hours": [hours], "time_zone": "Europe/Berlin"}
    found = config.read(written(tmp_path, data)).policy
    assert (found.quiet_hours, found.time_zone) == ((hours,), "Europe/Berlin")


@pytest.mark.parametrize(
    "hours",
    [
        *("7:00-19:00", "07:00", "07:00-24:30", "24:00-07:00", "25:00-07:00", "07:60-08:00", ""),
        *("mo 07:00-19:00", "mon-tue-wed 07:00-19:00", "mon 07:00-19:00 ", "07:00-07:00"),
        *("mon,07:00-19:00", "MON 07:00-19:00", "mon  07:00-19:00", "07:00-19:00,20:00-21:00"),
    ],
)
def test_hours_that_cannot_be_told_are_refused(
    hours: str, data: dict[str, Any], tmp_path: Path
) -> None:
    data["policy"]["quiet_hours"] = [hours]
    with pytest.raises(DocumentError) as caught:
        config.read(written(tmp_path, data))
    (objection,) = caught.value.objections
    assert objection.startswith("policy")


@pytest.mark.parametrize("zone", ["Europe", "Europe/Atlantis", "../UTC", "/etc/localtime"])
def test_a_time_zone_nobody_knows_is_refused(
    zone: str, data: dict[str, Any], tmp_path: Path
) -> None:
    data["policy"]["time_zone"] = zone
    with pytest.raises(DocumentError, match="time_zone known to this machine"):
        config.read(written(tmp_path, data))

"""A name leads to one of ours, or to a plug-in the hospital has listed, or nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_models import imaging, nets, tasks
from shared_models.allowlists import STRATEGIES
from shared_models.registry import find, known, objections_to_params

OURS = {"join": "posixpath:join"}
PLUGIN = "someone-elses-nets==1.2"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install a real distribution with one net, and one that takes the name of ours."""
    info = tmp_path / "someone_elses_nets-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: someone-elses-nets\nVersion: 1.2\n"
    )
    (info / "entry_points.txt").write_text(
        "[consilia.nets]\nwide = someone_elses_nets:make\njoin = someone_elses_nets:make\n"
    )
    (tmp_path / "someone_elses_nets.py").write_text("def make(*, width):\n    return width\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield PLUGIN
    sys.modules.pop("someone_elses_nets", None)


def test_a_builtin_is_found_by_its_name() -> None:
    assert find("nets", "join", builtin=OURS)("a", "b") == "a/b"


def test_an_unknown_name_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"^no nets called 'medain'; known: join$"):
        find("nets", "medain", builtin=OURS)


def test_a_plugin_is_found_if_its_distribution_is_listed(plugin: str) -> None:
    assert find("nets", "wide", builtin=OURS, plugins=[plugin])(width=3) == 3
    assert known("nets", builtin=OURS, plugins=[plugin]) == ["join", "wide"]


@pytest.mark.parametrize(
    "listed", [[], ["someone-elses-nets"], ["someone-elses-nets==1.3"], ["other==1.2"]]
)
def test_a_plugin_nobody_listed_in_this_version_does_not_exist(
    plugin: str, listed: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"known: join$"):
        find("nets", "wide", builtin=OURS, plugins=listed)
    assert "someone_elses_nets" not in sys.modules


def test_a_plugin_cannot_take_the_name_of_ours(plugin: str) -> None:
    assert find("nets", "join", builtin=OURS, plugins=[plugin])("a", "b") == "a/b"


def test_a_plugin_of_another_kind_is_not_found(plugin: str) -> None:
    with pytest.raises(ValueError, match=r"no tasks called 'wide'; known: $"):
        find("tasks", "wide", builtin={}, plugins=[plugin])


def make(*, size: int, spacing: float = 1.0) -> None:
    """Stand for a maker."""


@pytest.mark.parametrize(
    ("params", "objections"),
    [
        ({"size": 1}, []),
        ({"size": 1, "spacing": 2.0}, []),
        ({}, ["missing parameter 'size'"]),
        ({"size": 1, "sice": 2}, ["unknown parameter 'sice'; known: size, spacing"]),
        ({"x": 2}, ["unknown parameter 'x'; known: size, spacing", "missing parameter 'size'"]),
    ],
)
def test_parameters_are_objected_to_all_at_once(
    params: dict[str, int], objections: list[str]
) -> None:
    assert objections_to_params(make, params) == objections


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        ("nets", nets.BUILTIN),
        ("tasks", tasks.BUILTIN),
        ("steps", imaging.BUILTIN),
        ("strategies", STRATEGIES),
    ],
)
def test_every_name_of_ours_leads_somewhere(kind: str, builtin: dict[str, str]) -> None:
    assert builtin
    assert all(callable(find(kind, name, builtin=builtin)) for name in builtin)


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys; from shared_models import nets, tasks;"
        "from shared_models.registry import known;"
        "known('nets', builtin=nets.BUILTIN); known('tasks', builtin=tasks.BUILTIN);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

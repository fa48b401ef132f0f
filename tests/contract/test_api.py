"""The public surface is the one that docs/api.md records, and CHANGELOG.md speaks of each change to it."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from hf_rlhf import API_VERSION
from hf_rlhf.axes import AXES, Plugin
from hf_rlhf.registry import api_version
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def surface() -> ModuleType:
    """docs/surface.py as a module."""
    specification = importlib.util.spec_from_file_location("docs_surface", ROOT / "docs" / "surface.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def now(surface: ModuleType) -> str:
    """The surface as the code has it."""
    text: str = surface.surface()
    return text


def test_the_surface_is_the_recorded_one(surface: ModuleType, now: str) -> None:
    recorded = surface.recorded((ROOT / "docs" / "api.md").read_text())
    before, after = set(recorded.splitlines()), set(now.splitlines())
    assert recorded == now, (
        f"the plugin API changed: gone {sorted(before - after)}, new {sorted(after - before)}. Is it meant? Then run "
        "`python docs/surface.py`, say in CHANGELOG.md under API what changed, with the digest that it prints, and raise "
        "hf_rlhf.API_VERSION once it was released: the first number where a right plugin may become wrong, else the second"
    )


def test_the_changelog_speaks_of_this_surface(surface: ModuleType, now: str) -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    section = text.partition("\n### API\n")[2].partition("\n### ")[0]
    assert f"API {API_VERSION}" in section
    assert f"`{surface.digest(now)}`" in section, (
        f"CHANGELOG.md under API has another digest than {surface.digest(now)}: say there what changed, then put it in"
    )


def test_a_change_is_seen(surface: ModuleType, now: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(self, firmly: bool) -> None:  # type: ignore[no-untyped-def]
        """A new method."""

    monkeypatch.setattr(Plugin, "hold", hold, raising=False)
    changed = surface.surface()
    assert set(changed.splitlines()) - set(now.splitlines()) == {"    hold(self, firmly: bool) -> None"}
    assert surface.digest(changed) != surface.digest(now)


@pytest.mark.parametrize("base", [*AXES.values(), Plugin], ids=lambda base: base.__name__)
def test_every_base_class_stands_in_the_surface(base: type, now: str) -> None:
    assert re.search(rf"^class {base.__name__}\b", now, re.MULTILINE)


def test_the_surface_holds_no_imports(now: str) -> None:
    for name in ("dataclass", "ABC", "annotations", "Tensor", "torch"):
        assert not re.search(rf"^(class )?{name}\b", now, re.MULTILINE)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('hf_rlhf_api = "1.0"', "1.0"),
        ('hf_rlhf_api: str = "2.7"', "2.7"),
        ("hf_rlhf_api = 1.0", 1.0),
        ('def f():\n    hf_rlhf_api = "1.0"', None),
        ("x = 1", None),
        ("no python (", None),
    ],
)
def test_a_module_states_its_version_in_its_source(source: str, said: object) -> None:
    assert api_version.stated(source) == said

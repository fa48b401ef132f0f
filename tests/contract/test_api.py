"""The public surface is the one that docs/api.md records, and CHANGELOG.md speaks of each change to it."""

from __future__ import annotations

import re

import pytest

from hf_rlhf import API_VERSION
from hf_rlhf.axes import AXES, Plugin
from hf_rlhf.registry import api_version
from tests.helpers.documentation import surface
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def now() -> str:
    """The surface as the code has it."""
    text: str = surface.surface()
    return text


def test_the_surface_is_the_recorded_one(now: str) -> None:
    recorded = (ROOT / "docs" / "api.md").read_text().partition("```text\n")[2].partition("```\n")[0]
    before, after = set(recorded.splitlines()), set(now.splitlines())
    assert recorded == now, (
        f"the plugin API changed: gone {sorted(before - after)}, new {sorted(after - before)}. Is it meant? Then run "
        "`python docs/generate.py`, say in CHANGELOG.md under API what changed, and raise hf_rlhf.API_VERSION once it was "
        "released: the first number where a right plugin may become wrong, else the second"
    )


def test_the_changelog_speaks_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    section = text.partition("\n### API\n")[2].partition("\n### ")[0]
    assert f"API {API_VERSION}" in section


def test_a_change_is_seen(now: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(self, firmly: bool) -> None:  # type: ignore[no-untyped-def]
        """A new method."""

    monkeypatch.setattr(Plugin, "hold", hold, raising=False)
    changed = surface.surface()
    assert set(changed.splitlines()) - set(now.splitlines()) == {"    hold(self, firmly: bool) -> None"}


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

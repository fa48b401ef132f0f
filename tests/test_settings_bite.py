"""Every plugin and every setting has two values that give different results, and equal values give equal ones."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from bites import BITES

from hf_rlhf.axes import RewardSource
from hf_rlhf.config.offline_sections import OfflineDataset
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.conformance.common import equal
from hf_rlhf.contract.model_settings import Lora
from hf_rlhf.registry.host import get_host
from hf_rlhf.registry.settings_schema import settings_of

for more in sorted(Path(__file__).parent.glob("bites_*.py")):
    importlib.import_module(more.stem)


SHARED = {setting.name for setting in settings_of(RewardSource)}
"""Settings of every reward source."""


def expected() -> set[str]:
    """`axis.name.setting`, `axis.name` where a plugin has no setting, `section.setting`, `rewards.setting` of every source."""
    host, keys = get_host(), {f"rewards.{name}" for name in SHARED}
    for point in entry_points(group="hf_rlhf"):
        if point.dist and point.dist.name == "hf_rlhf":
            settings = {setting.name for setting in settings_of(host.get(*point.name.split(".")))}
            settings -= SHARED if point.name.startswith("rewards.") else set()
            keys |= {f"{point.name}.{name}" for name in settings} or {point.name}
    for section, cls in {**SECTIONS, "model.lora": Lora, "offline.dataset": OfflineDataset}.items():
        keys |= {f"{section}.{setting.name}" for setting in settings_of(cls)}
    return keys


def test_every_plugin_and_every_setting_has_an_entry():
    assert set(BITES) == expected()


@pytest.mark.parametrize("name", sorted(BITES))
def test_it_bites(name: str, tmp_path: Path):
    bite = BITES[name]
    first, second = bite.show(tmp_path, bite.first), bite.show(tmp_path, bite.second)
    assert not equal(first, second), f"{name}: {bite.first!r} and {bite.second!r} give the same"


RUNS = ["kl.in_loss.beta", "critic.separate.coef", "evaluation.prompts", "rollout.generate.top_p", "update.epochs"]


@pytest.mark.parametrize("name", RUNS)
def test_equal_settings_give_equal_results(name: str, tmp_path: Path):
    bite = BITES[name]
    assert equal(bite.show(tmp_path, bite.first), bite.show(tmp_path, bite.first))

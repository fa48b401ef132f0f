"""Every plugin and every setting has two values that give different results, and equal values give equal ones."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from hf_rlhf.axes import Environment, RewardSource
from hf_rlhf.config.offline_sections import OfflineDataset
from hf_rlhf.config.sections import SECTIONS
from hf_rlhf.conformance.common import equal
from hf_rlhf.contract.model_settings import Lora
from hf_rlhf.registry.host import get_host
from hf_rlhf.registry.settings_schema import settings_of
from tests.contract import setting_effects
from tests.contract.setting_effects.base import EFFECTS

for module in pkgutil.iter_modules(setting_effects.__path__, f"{setting_effects.__name__}."):
    importlib.import_module(module.name)


SHARED = {
    axis: {setting.name for setting in settings_of(base)}
    for axis, base in (("rewards", RewardSource), ("environment", Environment))
}
"""Settings of every reward source, and of every environment."""
OWN = {"environment.tools.workers", "environment.tools.num_workers"}
"""Shared settings that mean something else for one plugin: its calls rather than its episodes."""


def expected() -> set[str]:
    """`axis.name.setting`, `axis.name` where a plugin has no setting, `section.setting`, `rewards.setting` of every source, and
    so of every environment."""
    host, keys = get_host(), OWN | {f"{axis}.{name}" for axis, names in SHARED.items() for name in names}
    for point in entry_points(group="hf_rlhf"):
        if point.dist and point.dist.name == "hf_rlhf":
            settings = {setting.name for setting in settings_of(host.get(*point.name.split(".")))}
            settings -= SHARED.get(point.name.split(".")[0], set())
            keys |= {f"{point.name}.{name}" for name in settings} or {point.name}
    for section, cls in {**SECTIONS, "model.lora": Lora, "offline.dataset": OfflineDataset}.items():
        keys |= {f"{section}.{setting.name}" for setting in settings_of(cls)}
    return keys


def test_every_plugin_and_every_setting_has_an_entry():
    assert set(EFFECTS) == expected()


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_it_has_an_effect(name: str, tmp_path: Path):
    effect = EFFECTS[name]
    first, second = effect.show(tmp_path, effect.first), effect.show(tmp_path, effect.second)
    assert not equal(first, second), f"{name}: {effect.first!r} and {effect.second!r} give the same"


RUNS = ["kl.in_loss.beta", "critic.separate.coef", "evaluation.prompts", "rollout.generate.top_p", "update.epochs"]


@pytest.mark.parametrize("name", RUNS)
def test_equal_settings_give_equal_results(name: str, tmp_path: Path):
    effect = EFFECTS[name]
    assert equal(effect.show(tmp_path, effect.first), effect.show(tmp_path, effect.first))

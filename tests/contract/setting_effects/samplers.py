"""What shows each setting of the samplers of prompts: the rows that they draw after some rollouts."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from hf_rlhf import load_plugin
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers import runs


def order(folder: Path, sampler: str) -> Any:
    made = runs.trainer(folder, sampler=sampler)
    for _ in range(20):  # the warm-up, in which nothing is observed, gives another order as well
        made.stream.next(1)
    return [prompt.ids for prompt in made.stream.next(6)]


EFFECTS["sampler.shuffled"] = SettingEffect("shuffled", "difficulty", order)


def draws(setting: str) -> Any:
    """Return what counts the draws of each of six rows: rows 2 and 3 pass in every other rollout, the others never."""

    def show(folder: Path, value: Any) -> Any:
        plugin = load_plugin("sampler", "difficulty", **{"warmup": 2, setting: value})
        drawn = []
        for rollout in range(300):
            rows = plugin.next(2, 6, Random(rollout))
            drawn += rows
            plugin.observe(rows, [0.4 * (row in (2, 3)) + 0.3 * (rollout % 2) for row in rows])
        return [drawn.count(row) for row in range(6)]

    return show


for setting, first, second in (("passes", 0.5, 0.9), ("window", 1, 8), ("warmup", 0, 200), ("floor", 0.05, 1.0)):
    EFFECTS[f"sampler.difficulty.{setting}"] = SettingEffect(first, second, draws(setting))

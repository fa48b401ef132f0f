"""Patterns of the run doctor: each finds something in its own log, and the next pattern of the table does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_rlhf import load_plugin, load_recipe
from hf_rlhf.metrics.doctor import Doctor, core_ranges
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers.ill_logs import LOGS


def finds(name: str, log: str) -> list[str]:
    """What a pattern alone says of a log."""
    recipe: Any = load_recipe("ppo", ["rewards.1={use: format, pattern: x}", "rewards.2={use: exact_match}"]).raw
    doctor = Doctor(
        {**recipe, "update": {"mini_batches": 1, "epochs": 1}}, core_ranges(), [load_plugin("doctor", name)]
    )
    for step, entry in enumerate(LOGS[log](recipe), 1):
        doctor.add(step, entry)
    return [finding.text for finding in doctor.findings]


for first, second in zip(LOGS, [*list(LOGS)[1:], next(iter(LOGS))], strict=True):

    def show(folder: Path, value: str, log: str = first) -> list[str]:
        """What the pattern `value` says of the log of `first`."""
        return finds(value, log)

    EFFECTS[f"doctor.{first}"] = SettingEffect(first, second, show)

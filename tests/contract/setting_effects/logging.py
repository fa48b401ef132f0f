"""What the settings of logging change; see `base`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers import runs


def names_logged(folder: Path, value: Any) -> list[str]:
    made = runs.trained(folder, logging={"metric_aliases": value}, training={"max_steps": 1})
    return sorted(made.state.log_history[0])


EFFECTS["logging.metric_aliases"] = SettingEffect("none", "trl", names_logged)

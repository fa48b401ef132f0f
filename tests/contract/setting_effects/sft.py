"""Two values of each setting of `trainer.sft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.helpers import sft_runs as sft


def learned(folder: Path, settings: dict[str, Any]) -> list[Any]:
    """Rows and labels as they are trained on."""
    trainer = sft.made(folder, *(f"trainer.{name}={value}" for name, value in settings.items()))
    return [list(row) for row in trainer.train_dataset["labels"]]


def of(setting: str) -> Any:
    return lambda folder, value: learned(folder, {setting: value})


def first_loss(folder: Path, value: Any) -> float:
    """Of rows that have the columns of every format."""
    trainer = sft.made(folder, f"trainer.format={value}", given=sft.MIXED)
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model.eval(), batch))


EFFECTS["trainer.sft.format"] = SettingEffect("messages", "text", first_loss)
EFFECTS["trainer.sft.completion_only_loss"] = SettingEffect("true", "false", of("completion_only_loss"))
EFFECTS["trainer.sft.packing"] = SettingEffect("false", "true", of("packing"))
EFFECTS["trainer.sft.max_length"] = SettingEffect("null", "9", of("max_length"))

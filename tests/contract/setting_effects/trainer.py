"""Two values of each setting of trainers without rollouts, and of their dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_rlhf import load_plugin
from hf_rlhf.config.offline_sections import OfflineDataset
from hf_rlhf.data.offline_rows import read_rows
from hf_rlhf.training.offline.setup import make_trainer
from tests.contract.setting_effects.base import EFFECTS, SettingEffect
from tests.contract.setting_effects.sections import FOLDER, dataset_folder
from tests.helpers import offline_runs as off


def trainer_with(folder: Path, name: str, setting: str, value: Any) -> Any:
    recipe = off.recipe(folder, name)
    settings = {**recipe.raw["trainer"], setting: value}
    recipe.plugins["trainer"] = load_plugin("trainer", settings.pop("use"), **settings)
    out = str(folder / "out")
    return make_trainer(recipe, out)


def first_loss(name: str, setting: str) -> Any:
    """The loss of the first rows before training."""

    def show(folder: Path, value: Any) -> float:
        trainer = trainer_with(folder, name, setting, value)
        batch = trainer.data_collator(list(trainer.train_dataset)[:8])
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model.eval(), batch))

    return show


def rows_kept(name: str) -> Any:
    return lambda folder, value: len(trainer_with(folder, name, "max_length", value).train_dataset)


for trainer_name in off.KINDS:
    EFFECTS[f"trainer.{trainer_name}.max_length"] = SettingEffect(None, 7, rows_kept(trainer_name))
for name, setting, first, second in (
    ("reward_model", "margin", None, 2.0),
    ("reward_model", "center_rewards_coefficient", None, 5.0),
    ("token_reward_model", "loss", "binary_cross_entropy", "squared_error"),
    ("process_reward_model", "delimiter", "\n", "\n\n"),
):
    EFFECTS[f"trainer.{name}.{setting}"] = SettingEffect(first, second, first_loss(name, setting))


def read(setting: str, **others: Any) -> Any:
    """The prompts that are read, for training and evaluation."""

    def show(folder: Path, value: Any) -> Any:
        place = dataset_folder(folder)
        names = {"chosen": "question", "rejected": "prompt"}
        settings = {"path": "{data}/a.jsonl", "held_out": 0, "columns": names, **others, setting: value}
        for name, text in settings.items():
            settings[name] = text.replace("{data}", str(place)) if isinstance(text, str) else text
        both = read_rows(OfflineDataset(**settings), load_plugin("trainer", "reward_model"))
        return [[row["chosen"] for row in part or []] for part in both]

    return show


def prompts_read(folder: Path, column: str | None) -> Any:
    place = dataset_folder(folder) / "a.jsonl"
    settings = OfflineDataset(
        path=str(place), held_out=0, prompt_column=column, columns={"chosen": "question", "rejected": "question"}
    )
    return [row["prompt"] for row in read_rows(settings, load_plugin("trainer", "reward_model"))[0]]


EFFECTS["offline.dataset.prompt_column"] = SettingEffect("prompt", None, prompts_read)


def of_dataset(setting: str, first: Any, second: Any, **others: Any) -> None:
    EFFECTS[f"offline.dataset.{setting}"] = SettingEffect(first, second, read(setting, **others))


of_dataset("path", "{data}/a.jsonl", "{data}/b.jsonl")
of_dataset("name", "one", "two", **FOLDER)
of_dataset("split", "train", "test", **FOLDER)
of_dataset("eval_path", None, "{data}/test.jsonl")
of_dataset("eval_split", None, "test", **FOLDER)
of_dataset("held_out", 0, 2)
of_dataset("columns", {"chosen": "question", "rejected": "prompt"}, {"chosen": "prompt", "rejected": "question"})

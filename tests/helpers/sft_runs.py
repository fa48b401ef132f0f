"""Small runs of `trainer.sft`: rows, the packaged recipe over a tiny model, and trainers that have not trained yet."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe
from hf_rlhf.training.offline.setup import make_trainer
from tests.helpers import offline_runs as off
from tests.helpers.models import CHAT_TEMPLATE


def rows(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts and completions of unequal length."""
    draw = random.Random(seed)
    return [{"prompt": f"{i}+", "completion": draw.choice("abc") * draw.randint(1, 7)} for i in range(count)]


def conversation(*turns: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant, by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


MIXED = [
    {"messages": conversation(f"{i}?", "yes", "sure?", "no"), "text": f"{i} is a number", **row}
    for i, row in enumerate(rows())
]
"""Rows that every format can read."""


def recipe(folder: Path, *words: str, given: Sequence[dict[str, Any]] | None = None) -> OfflineRecipe:
    """The packaged recipe over a tiny model in float64 and `rows`, six steps unless the words say otherwise."""
    if not (folder / "model").is_dir():
        off.save_model(folder / "model")
    data = off.write(folder / "rows.jsonl", rows() if given is None else given)
    small = [f"model.path={folder / 'model'}", "model.dtype=float64", f"dataset.path={data}", "training.max_steps=6"]
    small += ["training.use_cpu=true", "training.per_device_train_batch_size=4", "training.learning_rate=0.01"]
    small += ["training.warmup_steps=0", "dataset.held_out=2"]
    made = load_recipe("sft", [*small, f"model.chat_template={chat(folder)}", *words])
    assert isinstance(made, OfflineRecipe)
    return made


def chat(folder: Path) -> Path:
    """A chat template's file."""
    file = folder / "chat.jinja"
    file.write_text(CHAT_TEMPLATE)
    return file


def made(folder: Path, *words: str, given: Sequence[dict[str, Any]] | None = None) -> Any:
    """The trainer, before training."""
    chosen, out = recipe(folder, *words, given=given), str(folder / "out")
    return make_trainer(chosen, out)


def run(folder: Path, *words: str, given: Any = None, resume: bool = False, out: str = "out") -> Any:
    """The summary of a run in `folder / out`."""
    return train(recipe(folder, *words, given=given), str(folder / out), resume)

"""Small runs without rollouts: rows of three kinds, recipes over a tiny model, and what a run leaves."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_rlhf.cli.runs.run import train
from hf_rlhf.config.recipe import OfflineRecipe, load_recipe
from hf_rlhf.testing import tiny_policy

KINDS = {"reward_model": "rm", "process_reward_model": "rm_process", "token_reward_model": "rm_token"}
"""Trainer -> its recipe."""


def rows(trainer: str, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in which `a` is good and `z` is bad, two for each prompt, of unequal length."""
    draw = random.Random(seed)

    def text(letter: str) -> str:
        return letter * draw.randint(1, 6)

    made: list[dict[str, Any]] = []
    for i in range(count):
        prompt = f"{i // 2}?"
        if trainer == "reward_model":
            made.append({"prompt": prompt, "chosen": text("a"), "rejected": text("z")})
        elif trainer == "process_reward_model":
            labels = [draw.random() < 0.5 for _ in range(draw.randint(1, 3))]
            made.append({"prompt": prompt, "completions": [text("za"[good]) for good in labels], "labels": labels})
        else:
            good, bad = text("a"), text("z")
            ends = [len(good), len(good + bad)]
            spans = [{"start": 0, "end": ends[0], "label": 1.0}, {"start": ends[0], "end": ends[1], "label": 0.0}]
            made.append({"prompt": prompt, "completion": good + bad + "?", "spans": spans})
    return made


def write(file: Path, given: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    return file


def save_model(folder: Path, dtype: torch.dtype = torch.float64, **config: Any) -> Path:
    """The tiny policy and its tokenizer."""
    model, tokenizer = tiny_policy(dtype=dtype)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(folder: Path, trainer: str, *words: str, given: Sequence[dict[str, Any]] | None = None) -> OfflineRecipe:
    """The packaged recipe over a tiny model and `rows`, six steps unless the words say otherwise."""
    if not (folder / "model").is_dir():
        save_model(folder / "model")
    data = write(folder / "rows.jsonl", rows(trainer) if given is None else given)
    small = [f"model.path={folder / 'model'}", "model.dtype=float64", f"dataset.path={data}", "training.max_steps=6"]
    small += ["training.use_cpu=true", "training.per_device_train_batch_size=4", "training.learning_rate=0.01"]
    small += ["training.warmup_steps=0"]
    made = load_recipe(KINDS[trainer], [*small, *words])
    assert isinstance(made, OfflineRecipe)
    return made


def run(folder: Path, trainer: str, *words: str, given: Any = None, resume: bool = False, out: str = "out") -> Any:
    """The summary of a run in `folder / out`."""
    return train(recipe(folder, trainer, *words, given=given), str(folder / out), resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What lies in model.safetensors."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

"""Several processes train on a dataset as one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_rlhf.cli.runs.offline_run import make
from hf_rlhf.cli.runs.rollout_run import check, training_keywords
from tests.helpers import offline_runs as off
from tests.helpers.processes import run_ranks


def parameters(folder: Path) -> torch.Tensor:
    return torch.cat([x.flatten() for x in off.weights(folder).values()])


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Four rows of each step on one process, two on each of two; labels are unevenly spread over rows."""
    words = ("training.optim=sgd", "training.learning_rate=0.1", "training.max_grad_norm=0", "training.max_steps=3")
    words += ("training.train_sampling_strategy=sequential",)
    commands = []
    for trainer in off.KINDS:
        recipe = off.recipe(tmp_path / trainer, trainer, *words, "training.per_device_train_batch_size=2")
        (tmp_path / f"{trainer}.yaml").write_text(recipe.dump())
        commands.append(
            f"train(load_recipe({str(tmp_path / trainer) + '.yaml'!r}), {str(tmp_path / trainer / 'two')!r})"
        )
    code = (
        "from hf_rlhf.config.recipe import load_recipe\nfrom hf_rlhf.cli.runs.rollout_run import train\n"
        + "\n".join(commands)
    )
    run_ranks(code)
    for trainer in off.KINDS:
        summary = off.run(tmp_path / trainer, trainer, *words, out="one")
        one, two = (parameters(tmp_path / trainer / name) for name in ("one", "two"))
        moved = one - torch.cat([x.flatten() for x in start(tmp_path / trainer, trainer, *words)])
        assert moved.norm() > 1e-4
        assert (one - two).norm() < 1e-6 * moved.norm()
        other = json.loads((tmp_path / trainer / "two" / "summary.json").read_text())["after"]
        own = {name: x for name, x in summary["after"].items() if "/" in name}
        assert {name: other[name] for name in own} == pytest.approx(own)


def start(folder: Path, trainer: str, *words: str) -> list[torch.Tensor]:
    recipe = off.recipe(folder, trainer, *words)
    first = make(recipe, training_keywords(recipe, str(folder / "x")), check(recipe, str(folder / "x")), [])
    first.model.save_pretrained(folder / "start")
    return list(off.weights(folder / "start").values())

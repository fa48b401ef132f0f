"""`training.fsdp` in recipes without rollouts: the parameters of whole models, exact resume, plain folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_rlhf.cli.runs.run import train
from tests.helpers import dpo_runs as dpo
from tests.helpers import offline_runs as off
from tests.helpers import sft_runs as sft
from tests.helpers.processes import run_ranks

STEPS = ["training.optim=adamw_torch", "training.max_grad_norm=0.1", "training.max_steps=2", "training.save_steps=1"]
STEPS += ["training.save_strategy=steps", "training.eval_strategy=steps", "training.eval_steps=1"]
STEPS += ["training.train_sampling_strategy=sequential", "training.gradient_accumulation_steps=2"]
SHARDED = "training.fsdp=true"
FAMILIES: dict[str, list[str]] = {
    "reward_model": ["training.fsdp_config={reshard_after_forward: false, activation_checkpointing: true}"],
    "process_reward_model": [],
    "token_reward_model": ["model.lora={r: 4, target_modules: all-linear}"],
    "sft": [],
    "dpo": [],
    "dpo with an adapter": ["model.lora={r: 4, target_modules: all-linear}"],
    "dpo, precomputed": ["trainer.reference=precomputed"],
}


def recipe(folder: Path, family: str, *words: str) -> Any:
    name, made = family.partition(" ")[0].strip(","), {"sft": sft.recipe, "dpo": dpo.recipe}
    return made[name](folder, *words) if name in made else off.recipe(folder, name, *words)


def on_two(*runs: tuple[Any, Path, bool]) -> None:
    """Train recipes in folders, with or without resuming, on the same two processes."""
    code = "from hf_rlhf.config.recipe import load_recipe\nfrom hf_rlhf.cli.runs.run import train\n"
    for i, (chosen, folder, resume) in enumerate(runs):
        file = folder.parent / f"{i}.yaml"
        file.write_text(chosen.dump())
        code += f"train(load_recipe({str(file)!r}), {str(folder)!r}, {resume})\n"
    run_ranks(code)


def flat(folder: Path) -> torch.Tensor:
    return torch.cat([x.flatten() for _, x in sorted(off.weights(folder).items())])


def measured(folder: Path) -> dict[str, float]:
    after = json.loads((folder / "summary.json").read_text())["after"]
    return {name: x for name, x in after.items() if "/" in name}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_that_shard_train_and_measure_as_whole_models_do_and_resume_exactly(family, tmp_path):
    """An odd number of rows is held out. TRL computes the head of SFT in float32, which rounds sums of micro-batches."""
    words = [*STEPS, *FAMILIES[family], "dataset.held_out=3"]
    plain = [word for word in words if "fsdp" not in word]
    whole, parts, one, again = (tmp_path / name for name in ("whole", "parts", "one", "again"))
    small = "training.per_device_train_batch_size=2"
    sharded = recipe(tmp_path, family, *words, small, SHARDED)
    on_two((recipe(tmp_path, family, *plain, small), whole, False), (sharded, parts, False))
    train(recipe(tmp_path, family, *plain, "training.per_device_train_batch_size=4"), str(one))
    assert flat(parts).norm() > 0
    begin = flat(tmp_path / "model")
    moved = (flat(one)[: len(begin)] - begin).norm() if len(begin) == len(flat(one)) else flat(one).norm()
    assert moved > 1e-3
    assert (flat(parts) - flat(whole)).norm() <= 1e-12 * moved
    assert (flat(parts) - flat(one)).norm() <= (1e-6 if family == "sft" else 1e-12) * moved
    assert measured(parts) == pytest.approx(measured(one), rel=1e-6, abs=1e-9)
    shutil.copytree(parts, again)
    shutil.rmtree(again / "checkpoint-2")
    on_two((sharded, again, True))
    assert off.same(off.weights(again), off.weights(parts))

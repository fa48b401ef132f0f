"""trainer.dpo as a program: the command line, and two processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from hf_rlhf.config.recipe import load_recipe
from tests.helpers import dpo_runs as dpo
from tests.helpers import offline_runs as off
from tests.helpers.processes import run_ranks, warm


def test_the_command_line_trains_a_policy_that_a_recipe_goes_on_from(tmp_path):
    off.save_model(tmp_path / "model")
    off.write(tmp_path / "pairs.jsonl", off.rows("reward_model", 80))
    words = ["train", "dpo", "--model", "model", "--dataset", "pairs.jsonl", "--output-dir", "out", "--max-steps", "3"]
    words += [
        "--per_device_train_batch_size",
        "4",
        "trainer.loss_type=fidelity",
        "trainer.beta=0.3",
        "training.use_cpu=true",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*warm("hf_rlhf"), *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pairs/accuracy" in done.stdout
    assert "drift/k2" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["steps"], summary["rows"]["evaluation"]) == (3, 8)
    assert load_recipe(tmp_path / "out" / "recipe.yaml").trainer().beta == 0.3
    wrong = [*warm("hf_rlhf"), "check", "dpo", "trainer.loss_type=aot"]
    done = subprocess.run(wrong, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "trainer.loss_type" in done.stderr


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    """With precomputed log-probs, of which each process computes its share."""
    words = ("training.optim=sgd", "training.learning_rate=0.1", "training.max_grad_norm=0", "training.max_steps=3")
    words += ("training.train_sampling_strategy=sequential", "trainer.reference=precomputed")
    recipe = dpo.recipe(tmp_path, *words, "training.per_device_train_batch_size=2")
    (tmp_path / "two.yaml").write_text(recipe.dump())
    code = "from hf_rlhf.config.recipe import load_recipe\nfrom hf_rlhf.cli.runs.rollout_run import train\n"
    code += f"train(load_recipe({str(tmp_path / 'two.yaml')!r}), {str(tmp_path / 'two')!r})"
    run_ranks(code)
    summary = dpo.run(tmp_path, *words, out="one")
    start, one, two = (flat(tmp_path / name) for name in ("model", "one", "two"))
    assert (one - start).norm() > 1e-4
    assert (one - two).norm() < 1e-6 * (one - start).norm()
    other = json.loads((tmp_path / "two" / "summary.json").read_text())["after"]
    own = {name: x for name, x in summary["after"].items() if name.startswith(("pairs/", "drift/", "likelihood/"))}
    assert {name: other[name] for name in own} == pytest.approx(own, abs=1e-9)


def flat(folder: Path) -> torch.Tensor:
    return torch.cat([x.flatten() for _, x in sorted(off.weights(folder).items())])

"""A checkpoint from before the modules moved into packages (commit 759054d) resumes as if nothing had moved.

`tests/data/checkpoint_759054d.zip` holds `checkpoint-4` of the run below, written by that commit in the middle of a rollout,
and `after.json`: the sum and norm of each parameter after the ten steps of the run that was not stopped.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments

from hf_rlhf import RLHFTrainer
from hf_rlhf.config.recipe import resolve
from hf_rlhf.runtime import checkpoint_manifest
from hf_rlhf.testing import tiny_policy
from tests.helpers.paths import DATA

RECIPE: dict[str, Any] = {
    "rollout": {"use": "generate", "prompts": 3, "num_generations": 4, "max_new_tokens": 6},
    "rewards": [{"use": "format", "pattern": ".*[a-f].*", "normalize": "mean_std"}],
    "kl": [{"use": "in_reward", "controller": "adaptive"}, {"use": "in_loss", "estimator": "k3"}],
    "reference": {"use": "ema", "decay": 0.7},
    "advantages": {"use": "gae", "lam": 0.95},
    "critic": {"use": "value_head", "learning_rate": 0.02},
    "update": {"mini_batches": 3, "epochs": 2, "ema": 0.8},
}


def trainer(folder: Path, steps: int = 10, **changes: Any) -> RLHFTrainer:
    """A run in float64 whose weights take a few kB."""
    tokenizer = tiny_policy()[1]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=6,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = torch.nn.Module.to(LlamaForCausalLM(config), torch.float64).eval()
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=steps,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=4,
    )
    data = [{"prompt": f"{a}+{b}="} for a, b in ((1, 2), (33, 4), (5, 66), (7, 7), (80, 9))]
    made = RLHFTrainer(model, resolve({**RECIPE, **changes}), args, train_dataset=data, processing_class=tokenizer)
    made.remove_callback(PrinterCallback)
    return made


def after(made: RLHFTrainer) -> dict[str, list[float]]:
    """Name -> (sum, norm) of each parameter of policy and critic."""
    return {name: [p.sum().item(), p.norm().item()] for name, p in made.actor_critic.named_parameters()}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with the old checkpoint in it."""
    with zipfile.ZipFile(DATA / "checkpoint_759054d.zip") as packed:
        packed.extractall(tmp_path)
    return tmp_path


def resumed(folder: Path, steps: int = 10) -> RLHFTrainer:
    made = trainer(folder, steps)
    made.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    made.close()
    return made


def test_a_checkpoint_from_before_the_packages_resumes_to_the_parameters_of_its_own_run(stored):
    """Policy, value head, optimizer, moving reference, average, the buffer of a half-used rollout, the prompt stream, a reward's
    running mean and a KL controller: had one begun anew, the parameters would differ in the first digits."""
    due = json.loads((stored / "after.json").read_text())
    made = resumed(stored)
    assert made.state.global_step == 10
    assert after(made).keys() == due.keys()
    for name, numbers in after(made).items():
        assert numbers == pytest.approx(due[name], rel=1e-9, abs=1e-11), name


def test_it_gets_a_run_id_that_its_next_checkpoints_keep(stored):
    assert "run_id" not in checkpoint_manifest.read_manifest(stored / "checkpoint-4")
    made = resumed(stored, steps=8)
    assert made.collector.policy.version == f"{made.run_id}:8"
    assert checkpoint_manifest.read_manifest(stored / "checkpoint-8")["run_id"] == made.run_id


def test_a_setting_that_it_does_not_know_must_have_the_value_that_it_was_trained_with(stored):
    made = trainer(stored, update={**RECIPE["update"], "fused_loss": "off"})
    with pytest.raises(checkpoint_manifest.CheckpointError, match=r"update\.fused_loss: 'auto' in .*, 'off' now"):
        made.train(resume_from_checkpoint=str(stored / "checkpoint-4"))
    made.close()

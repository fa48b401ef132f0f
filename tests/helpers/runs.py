"""Small runs in this process: a recipe in Python, scripted completions of a task, and a trainer over them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from hf_rlhf import RLHFTrainer
from hf_rlhf.config.recipe import Recipe, resolve
from hf_rlhf.testing import tiny_policy

FORMAT = {"use": "format", "pattern": "[ -O].*", "label": "early"}
"""A reward that about half of all texts get, sampled at random or scripted."""
SCRIPTED = {"use": "scripted", "prompts": 4, "num_generations": 4}
SAMPLED = {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": 5}
DISTILLED: dict[str, Any] = {
    "rollout": {"use": "mixed", "column": "answer", "prompts": 4, "num_generations": 4, "max_new_tokens": 5},
    "rewards": [],
    "kl": [{"use": "in_loss", "estimator": "jsd", "beta": 1.0}],
    "advantages": "reinforce",
    "policy_loss": "reinforce",
    "reference": "frozen",
}
"""Completions of both the policy and the dataset, compared with the policy's initial distributions."""
BASE: dict[str, Any] = {
    "rollout": SCRIPTED,
    "rewards": [FORMAT],
    "advantages": "group_norm",
    "reference": "none",
    "update": {"mini_batches": 2},
}


def problems(count: int = 6, seed: int = 0, completions: int = 8, played: bool = False) -> list[dict[str, Any]]:
    """Additions with scripted completions: the first is right, of the others about half start with an early letter. `played`:
    with the columns that games read."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        a, b = draw.randint(1, 9), draw.randint(1, 99)
        texts = [str(a + b), "zz zz"] + [
            draw.choice("0 Bz") + "".join(draw.choice("01 aA") for _ in range(draw.randint(0, 6)))
            for _ in range(completions - 2)
        ]
        masks = [[1] + [draw.randint(0, 1) for _ in text] for text in texts]
        games = {"secret": "4", "heap": "5", "opponent": "self"}
        row = {"prompt": f"{a}+{b}=", "answer": str(a + b), "completions": texts, "masks": masks}
        made.append(row | games if played else row)
    return made


def recipe(**parts: Any) -> Recipe:
    """BASE with some keys replaced; a plugin may be given as an instance."""
    return resolve({**BASE, **parts})


def trainer(
    folder: Path,
    *,
    data: Any = None,
    eval_data: Any = None,
    policy: Any = None,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    training: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    tokenizer: Any = None,
    **parts: Any,
) -> RLHFTrainer:
    """A trainer with plain SGD over `problems`, two optimizer steps unless `training` says otherwise.

    `policy` is what the trainer gets as its model: `tiny_policy`'s unless it or the recipe's `model` is given.
    """
    own, its = tiny_policy(dtype=dtype)
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    settings |= {"use_cpu": True, "save_strategy": "no"}
    settings |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 64, "logging_steps": 1}
    args = TrainingArguments(str(folder), report_to="none", disable_tqdm=True, **{**settings, **(training or {})})
    made = RLHFTrainer(
        own if policy is None and "model" not in parts else policy,
        recipe(**parts),
        args,
        train_dataset=problems() if data is None else data,
        eval_dataset=eval_data,
        processing_class=tokenizer or its,
        callbacks=callbacks,
        peft_config=adapter() if lora else None,
    )
    made.remove_callback(PrinterCallback)
    return made


def adapter() -> Any:
    """A LoRA configuration whose adapter starts at zero."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def trained(folder: Path, **options: Any) -> RLHFTrainer:
    """A trainer after training."""
    made = trainer(folder, **options)
    made.train(overwrite=True)
    made.close()
    return made


def parameters(made: Any) -> torch.Tensor:
    """All parameters of a trainer's model, with its critic, or of a module, in one vector."""
    module = made if isinstance(made, torch.nn.Module) else getattr(made, "actor_critic", made.model)
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def entries(made: RLHFTrainer) -> list[dict[str, float]]:
    """What was logged at each optimizer step."""
    return [entry for entry in made.state.log_history if "loss" in entry]


def save_classifier(folder: Path, seed: int = 0) -> str:
    """A tiny sequence classifier with the tokenizer of `tiny_policy`, as a reward model lies on disk."""
    from transformers import LlamaForSequenceClassification

    policy, tokenizer = tiny_policy()
    policy.config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForSequenceClassification(policy.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

"""A small run that tests start in this process or, as a program, in processes of their own.

`python -m tests.helpers.stepping SPEC.json` trains on scripted completions in float64 with plain SGD, unless the specification
says otherwise, and writes the trained parameters. With RANK and WORLD_SIZE set it joins the other processes over gloo.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from hf_rlhf import RLHFTrainer, load_plugin
from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.config.sections import Update
from hf_rlhf.modeling.sharding import whole
from hf_rlhf.testing import tiny_policy
from tests.helpers.models import tiny_moe
from tests.helpers.paths import environment
from tests.helpers.processes import ranks, warm
from tests.helpers.waits import scaled

NONE = {"rollout_correction": "none", "reference": "none", "critic": "none", "optimizer": "trainer"}
SCRIPTED = {"use": "scripted", "prompts": 4, "num_generations": 4, "mask_column": "masks", "logps_column": "logps"}
DEFAULTS: dict[str, Any] = {
    "algorithm": {
        "rollout": SCRIPTED,
        "rewards": [{"use": "length", "label": "short", "target": 1, "maximum": 9}],
        "advantages": {"use": "group_norm"},
        "policy_loss": {"use": "ppo_clip"},
        "aggregation": {"use": "token_mean"},
    },
    "update": {"mini_batches": 2, "epochs": 2},
    "training": {},
    "dtype": "float64",
    "prompts": 6,
}


def make(axis: str, chosen: Any) -> Any:
    """A plugin from a name, or `module:Class`, or a mapping with `use`."""
    settings = dict(chosen) if isinstance(chosen, dict) else {"use": chosen}
    module, _, name = settings.pop("use").rpartition(":")
    return getattr(import_module(module), name)(**settings) if module else load_plugin(axis, name, **settings)


def make_algorithm(spec: dict[str, Any], update: dict[str, Any]) -> Algorithm:
    """An algorithm from axis choices."""
    parts: dict[str, Any] = {}
    for axis, chosen in {**NONE, **spec}.items():
        parts[axis] = [make(axis, one) for one in chosen] if isinstance(chosen, list) else make(axis, chosen)
    return Algorithm(**parts, update=Update(**update))


def rows(count: int, seed: int = 0, completions: int = 8) -> list[dict[str, Any]]:
    """Prompts with scripted completions of unequal length, some with tool tokens that the policy did not sample."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        lengths = [draw.randint(1, 9) for _ in range(completions)]
        texts = [[draw.randrange(40, 70) for _ in range(n)] for n in lengths]
        masks = [[1 if draw.random() > 0.3 else 0 for _ in range(n)] for n in lengths]
        for mask, text in zip(masks, texts, strict=True):
            mask[-1] = 1
            text[-1] = 1 if draw.random() < 0.7 else text[-1]  # the end-of-sequence token
        prompt = "".join(draw.choice("abcdef") for _ in range(1 + i % 5))
        row = {"prompt": prompt, "completions": texts, "masks": masks, "answer": draw.choice("abcdef")}
        games = {"secret": "4", "heap": "5", "opponent": ("policy", "perfect")[i % 2]}
        made.append({**row, **games, "logps": [[-3 - 3 * draw.random() for _ in mask] for mask in masks]})
    return made


class StopAt(TrainerCallback):
    """Saves and stops at a step, or kills the process there, after the checkpoint was saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


def make_trainer(spec: dict[str, Any], callbacks: list[Any] | None = None) -> RLHFTrainer:
    """The trainer of a specification; what it leaves out is in DEFAULTS."""
    spec = {**DEFAULTS, **spec}
    torch.manual_seed(0)
    model, tokenizer = tiny_policy(seed=0, dtype=getattr(torch, spec["dtype"]))
    if spec.get("experts"):
        model = tiny_moe(len(tokenizer), dtype=getattr(torch, spec["dtype"]))
    algorithm = make_algorithm({**DEFAULTS["algorithm"], **spec["algorithm"]}, spec["update"])
    training = {
        "max_steps": 8,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "per_device_train_batch_size": 64,
        **spec["training"],
    }
    args = TrainingArguments(
        spec["output_dir"], use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **training
    )
    data = rows(spec["prompts"])
    trainer = RLHFTrainer(
        model,
        algorithm,
        args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=lora(spec),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def lora(spec: dict[str, Any]) -> Any:
    """A LoRA configuration where the specification asks for one."""
    if not spec.get("lora"):
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=True)


def parameters(trainer: RLHFTrainer) -> torch.Tensor:
    """All parameters, the critic's included, in one vector."""
    return torch.cat([whole(p.detach()).flatten().double() for p in trainer.actor_critic.parameters()])


def run(spec: dict[str, Any], resume: Any = None, stop: int | None = None) -> torch.Tensor:
    """The parameters after training."""
    trainer = make_trainer(spec, [StopAt(stop)] if stop else None)
    trainer.train(resume_from_checkpoint=resume, overwrite=not resume)
    found = parameters(trainer)
    trainer.close()
    return found


def start(specs: dict[str, Any], folder: Path, processes: int = 1, **options: Any) -> list[subprocess.Popen[bytes]]:
    """The same as a program, one specification after the other, in `processes` processes.

    The first process writes the parameters of specification `name` to `folder`/`name`.pt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.json"
    path.write_text(json.dumps({"specs": specs, "folder": str(folder), **options}))
    words, started = [*warm("tests.helpers.stepping"), str(path)], []
    for number, variables in enumerate(ranks(processes) if processes > 1 else [{}]):
        with open(folder / f"log{number}.txt", "wb") as log:
            started.append(subprocess.Popen(words, env=environment(**variables), stdout=log, stderr=log))
    return started


def finish(started: list[subprocess.Popen[bytes]], folder: Path) -> dict[str, torch.Tensor]:
    """Waits for the processes; the parameters they trained, by specification."""
    codes = [process.wait(timeout=scaled(400)) for process in started]
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log*.txt")))
    assert codes == [0] * len(codes), f"exit codes {codes}\n{logs}"
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def main(path: Path) -> None:
    """One process of `start`."""
    torch.set_num_threads(1)
    order = json.loads(path.read_text())
    for name, spec in order["specs"].items():
        trained = run(spec, resume=order.get("resume"), stop=order.get("stop"))
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(trained, Path(order["folder"]) / f"{name}.pt")


if __name__ == "__main__":
    from hf_rlhf.cli.main import _end as end  # threads of a process group may abort an ordinary end

    main(Path(sys.argv[1]))
    end(0)

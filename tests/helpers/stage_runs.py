"""A small staged recipe over a tiny model: sft, rm and ppo, a few steps each."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hf_rlhf.cli.runs.pipeline_run import choose_root, run_stages
from hf_rlhf.config.pipeline import load_pipeline
from hf_rlhf.config.recipe_yaml import write_yaml
from tests.helpers import offline_runs as off
from tests.helpers import sft_runs as sft
from tests.helpers.paths import environment
from tests.helpers.processes import warm
from tests.helpers.waits import scaled

STEPS = {"training.use_cpu": True, "training.max_steps": 4, "training.learning_rate": 0.01, "training.warmup_steps": 0}


def stages(folder: Path) -> dict[str, Any]:
    """Its stages, over files that are made in the folder."""
    if not (folder / "model").is_dir():
        off.save_model(folder / "model")
    rows = off.write(folder / "rows.jsonl", sft.rows())
    pairs = off.write(folder / "pairs.jsonl", off.rows("reward_model"))
    prompts = off.write(folder / "prompts.jsonl", [{"prompt": f"{i}=", "answer": "a"} for i in range(40)])
    offline = {**STEPS, "training.per_device_train_batch_size": 4}
    rewards = [{"use": "reward_model", "model": "stage:rm"}, {"use": "exact_match", "column": "answer", "weight": 0}]
    rl = {"model.path": "stage:sft", "rewards": rewards, "dataset.path": str(prompts), "dataset.held_out": 4}
    return {
        "sft": {"recipe": "sft", "set": {**offline, "model.path": str(folder / "model"), "dataset.path": str(rows)}},
        "rm": {"recipe": "rm", "set": {**offline, "model.path": "stage:sft", "dataset.path": str(pairs)}},
        "ppo": {"recipe": "instructgpt_ppo", "set": {**STEPS, **rl, "rollout.prompts": 8}},
    }


def write(folder: Path, given: dict[str, Any] | None = None, name: str = "tiny") -> str:
    """Its file."""
    file = folder / f"{name}.yaml"
    file.write_text("# A small one.\n" + write_yaml({"stages": stages(folder) if given is None else given}))
    return str(file)


def run(folder: Path, *words: str, out: str = "out", resume: bool = True, given: Any = None) -> dict[str, Any]:
    """The summary of a run in `folder / out`."""
    staged = load_pipeline(write(folder, given), words)
    return run_stages(staged, choose_root(str(folder / out), staged.name, resume))


KILLED = """
import os, signal, sys, threading, time
from torch.optim import optimizer

steps, place = int(sys.argv.pop(1)), sys.argv.pop(1)

def hook(*_):
    global steps
    steps -= 1
    if not steps:
        while any(thread.name.startswith("hf_rlhf-seal") for thread in threading.enumerate()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

getattr(optimizer, f"register_optimizer_step_{place}_hook")(hook)
from hf_rlhf.cli.main import main

main()
"""


def killed(folder: Path, steps: int, place: Literal["pre", "post"], *words: str) -> None:
    """`hf-rlhf WORDS` in a process that SIGKILL ends in its optimizer step of this number, counted over all stages: when the
    gradients are there and the weights are as they were, or when the weights are new and nothing else is. The checkpoint
    before it is sealed then."""
    process = _process(folder, [*warm("-c"), KILLED, str(steps), place, *words])
    printed, _ = process.communicate(timeout=scaled(150))
    assert process.returncode == -signal.SIGKILL, printed


def command(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    """`hf-rlhf WORDS` in a process of its own, in the folder."""
    return _process(folder, [*warm("hf_rlhf"), *words], **variables)


def _process(folder: Path, words: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    env = environment(HF_HUB_OFFLINE="1", **variables)
    return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

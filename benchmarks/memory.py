"""Memory by phase as it is forecast before a run and as the run measures it.

`python -m benchmarks.memory [--cases NAME ...] [--json PATH]`

Each case is a short run of a small Qwen2 model with random weights in a process of its own, on CPU. A forecast is the
largest that can happen, so completions are all of the greatest length but for those that a random model ends. Measured is
the resident set above the process: what the process holds before it trains, without the policy's weights. `exact` runs tell
the C library to return every large block to the system when it is freed (MALLOC_MMAP_THRESHOLD_), so that the resident set
is what tensors take; in `default` runs what the library keeps for later is part of the number. On CPU, bf16 takes more than
tensors, for what oneDNN makes and keeps. The result goes to benchmarks/results/memory.json and, as a table, to memory.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import keep

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 32
BASE: dict[str, Any] = {
    "rollout": {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": 97},
    "rewards": [{"use": "format", "pattern": ".*[02468]"}],
    "advantages": "group_norm",
    "reference": "none",
    "update": {"max_tokens_per_micro_batch": 768},
}
LOSS_KL = {"kl": [{"use": "in_loss"}], "reference": "frozen"}
PPO = {
    "advantages": "gae",
    "critic": "separate",
    "kl": [{"use": "in_reward"}],
    "reference": "frozen",
    "update": {"max_tokens_per_micro_batch": 768, "epochs": 2},
}
CASES: dict[str, dict[str, Any]] = {
    "grpo, vocabulary 4k": {},
    "grpo, vocabulary 32k": {"vocabulary": 32768},
    "grpo, unbounded": {"recipe": {"update": {}}},
    "grpo, padded": {"recipe": {"update": {"attention": "padded", "max_tokens_per_micro_batch": 768}}},
    "grpo, reference": {"recipe": LOSS_KL},
    "ppo, separate critic": {"recipe": PPO, "training": {"max_steps": 4}},
    "LoRA": {"lora": True},
    "LoRA, vocabulary 32k": {"lora": True, "vocabulary": 32768},
    "checkpointing": {"training": {"gradient_checkpointing": True}, "recipe": {"update": {}}},
    "bf16 autocast": {"training": {"bf16": True}},
    "SGD": {"training": {"optim": "sgd"}},
}
"""Name -> what differs from BASE, from a vocabulary of 4096 and from two steps of AdamW."""
ALLOCATORS: dict[str, dict[str, str]] = {"exact": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "default": {}}


def run_case(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """One run in this process: MiB of each phase above the process, forecast and measured.

    A run of a far smaller model comes first, so that every library is loaded when the process is weighed.
    """
    from hf_rlhf.contract.model_settings import Model
    from hf_rlhf.runtime.peak_memory import MIB, resident
    from hf_rlhf.training.memory.estimate import estimate, tensor_bytes

    _train(case, f"{folder}/first", hidden=16, layers=1)
    model, args, peft_config, recipe, made = make_run(case, f"{folder}/second", hidden=256, layers=6)
    trim()
    own = {"model": model, "peft_config": peft_config, "prompt_tokens": PROMPT_TOKENS}
    phases = estimate(Model(), recipe.algorithm(), args, **own).phases
    process = (resident() - tensor_bytes(model)) / MIB if args.device.type == "cpu" else 0.0
    trainer = made()
    del model
    trim()
    trainer.train()
    trainer.close()
    measured: dict[str, float] = {}
    for entry in trainer.state.log_history:
        for name, x in entry.items():
            if name.startswith("memory/") and name.endswith("/peak"):
                phase = name.split("/")[1]
                measured[phase] = max(x - process, measured.get(phase, 0.0))
    return {"forecast": {phase: sum(parts.values()) for phase, parts in phases.items()}, "measured": measured}


def _train(case: dict[str, Any], folder: str, **sizes: int) -> None:
    *_, made = make_run(case, folder, **sizes)
    trainer = made()
    trainer.train()
    trainer.close()


def make_run(case: dict[str, Any], folder: str, *, hidden: int, layers: int) -> tuple[Any, Any, Any, Any, Any]:
    """Return a model, arguments, adapter and recipe, and a function that creates their trainer."""
    from transformers import PrinterCallback, TrainingArguments

    from benchmarks.work import Line, make_model, make_tokenizer
    from hf_rlhf import RLHFTrainer
    from hf_rlhf.config.recipe import resolve

    sizes = {"hidden": hidden, "layers": layers, "intermediate": 4 * hidden}
    line = Line(name="memory", vocabulary=case.get("vocabulary", 4096), **sizes)
    model, tokenizer = make_model(line), make_tokenizer(line.vocabulary)
    rows = [{"prompt": " ".join(f"w{4 + (7 * i + j) % 4000}" for j in range(PROMPT_TOKENS))} for i in range(64)]
    recipe = resolve({**BASE, **case.get("recipe", {})})
    training: dict[str, Any] = {"learning_rate": 1e-6, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    training |= {"use_cpu": True, **case.get("training", {})}
    args = TrainingArguments(folder, report_to="none", disable_tqdm=True, **training)
    peft_config = None
    if case.get("lora"):
        from peft import LoraConfig

        peft_config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    kept = [model]

    def made() -> Any:
        trainer = RLHFTrainer(
            kept.pop(), recipe, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return model, args, peft_config, recipe, made


def trim() -> None:
    """Hands freed memory back to the system, where the C library can."""
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def in_own_process(name: str, allocator: str, module: str = "benchmarks.memory") -> dict[str, Any]:
    """`run_case` of a module in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", module, "--one", name, "--folder", folder]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ALLOCATORS[allocator]}
        )
    return {"case": name, "allocator": allocator, **json.loads(done.stdout.splitlines()[-1])}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown: MiB of each phase above the process."""
    lines = ["| case | allocator | phase | forecast | measured | ratio |", "|" + "---|" * 6]
    for row in rows:
        for phase, total in row["forecast"].items():
            measured = row["measured"][phase]
            cells = [row["case"], row["allocator"], phase, f"{total:.0f}", f"{measured:.0f}", f"{total / measured:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the cases and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_case(CASES[options.one], options.folder)))
        return
    rows = []
    for name in options.cases:
        for allocator in options.allocators:
            rows.append(in_own_process(name, allocator))
            print("\n".join(table(rows[-1:]).splitlines()[2:]), flush=True)
    command = "python -m benchmarks.memory"
    text = f"# Memory\n\n`{command}`: MiB above the process, forecast and measured.\n\n{table(rows)}\n"
    keep(options.json, command, {"rows": rows}, text)


if __name__ == "__main__":
    main()

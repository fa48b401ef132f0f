"""Peak memory with an adapter: a KL in the loss to the base with its adapter off, next to the same run without a reference.

`python -m benchmarks.lora_memory [--repeats N] [--json PATH]`

Each run is a process of its own on CPU: two optimizer steps, a rollout each, of a Qwen2 of 107 M parameters with random
weights in float32, LoRA of rank 16 on every linear layer. Kinds of runs take turns; `frozen`, a copy of the adapter on the
same base, runs once for comparison. `process` is the most that the process held (the resident set), `above` is that less what
it held before the model was made, libraries being loaded. Two allocators, as in `benchmarks.memory`: `exact` hands every large
block back when it is freed. The result goes to benchmarks/results/lora_memory.json and, as a table, to lora_memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import keep

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 24
LIMIT = 1.15
"""Maximum memory of `adapter_off`, relative to `none`."""
KL = [{"use": "in_loss", "beta": 0.04, "estimator": {"use": "k3"}}]
KINDS: dict[str, dict[str, Any]] = {
    "none": {"reference": "none"},
    "adapter_off": {"kl": KL, "reference": "adapter_off"},
    "frozen": {"kl": KL, "reference": "frozen"},
}
ALLOCATORS: dict[str, dict[str, str]] = {"exact": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "default": {}}
SIZES = {
    "large": {"hidden": 768, "layers": 12, "intermediate": 3072, "heads": 12},
    "small": {"hidden": 256, "layers": 6, "intermediate": 1024, "heads": 8},
}


def run(kind: str, folder: str, size: str = "large") -> dict[str, float]:
    """One run in this process: MiB, parameters. A run of a far smaller model loads every library first."""
    from benchmarks.peak import mib, peak
    from hf_rlhf.runtime.peak_memory import MIB

    _train(kind, f"{folder}/first", hidden=16, layers=1, intermediate=32, heads=4)
    with peak() as phase:
        parameters = _train(kind, f"{folder}/second", **SIZES[size])
    return {"process": phase.peak / MIB, "above": mib(phase), "parameters": parameters}


def _train(kind: str, folder: str, **sizes: int) -> int:
    """Trains two steps; the number of the base's parameters."""
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainingArguments

    from benchmarks.work import Line, make_model, make_tokenizer
    from hf_rlhf import RLHFTrainer
    from hf_rlhf.config.recipe import resolve

    line = Line(name="lora", **sizes)
    recipe = resolve(
        {
            "rollout": {"use": "generate", "prompts": 2, "num_generations": 4, "max_new_tokens": 16},
            "rewards": [{"use": "format", "pattern": ".*[02468]"}],
            "advantages": "group_norm",
            "update": {"max_tokens_per_micro_batch": 512},
            **KINDS[kind],
        }
    )
    args = TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-6,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
    )
    rows = [{"prompt": " ".join(f"w{4 + (7 * i + j) % 4000}" for j in range(PROMPT_TOKENS))} for i in range(8)]
    trainer = RLHFTrainer(
        make_model(line),
        recipe,
        args,
        train_dataset=rows,
        processing_class=make_tokenizer(line.vocabulary),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.close()
    return sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" not in name)


def in_own_process(kind: str, allocator: str, size: str = "large") -> dict[str, Any]:
    """`run` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.lora_memory", "--one", kind, "--folder", folder]
        done = subprocess.run(
            [*command, "--size", size],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ALLOCATORS[allocator]},
        )
    return {"kind": kind, "allocator": allocator, **json.loads(done.stdout.splitlines()[-1])}


def table(runs: list[dict[str, Any]]) -> str:
    """Medians over the processes in MiB with the least and the most, and ratios to the runs without a reference."""
    lines = ["| allocator | reference | process, MiB | to none | above, MiB | to none |", "|" + "---|" * 6]
    for allocator in ALLOCATORS:
        for kind in KINDS:
            own = [r for r in runs if (r["kind"], r["allocator"]) == (kind, allocator)]
            bare = [r for r in runs if (r["kind"], r["allocator"]) == ("none", allocator)]
            if not own or not bare:
                continue
            cells = [allocator, kind]
            for what in ("process", "above"):
                sizes, others = [r[what] for r in own], [r[what] for r in bare]
                middle = statistics.median(sizes)
                cells.append(f"{middle:.0f} ({min(sizes):.0f}-{max(sizes):.0f})")
                cells.append(f"{middle / statistics.median(others):.3f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the kinds in turn and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "lora_memory.json")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, default="large", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one, options.folder, options.size)))
        return
    runs = []
    for repeat in range(options.repeats):
        for allocator in ALLOCATORS:
            kinds = ["none", "adapter_off"] if repeat % 2 == 0 else ["adapter_off", "none"]
            for kind in [*kinds, "frozen"] if repeat == 0 else kinds:
                runs.append(in_own_process(kind, allocator))
                print(json.dumps(runs[-1]), flush=True)
    command = "python -m benchmarks.lora_memory"
    count = runs[0]["parameters"] / 1e6
    text = (
        f"# Memory with an adapter\n\n`{command}`: a base of {count:.0f} M parameters in float32, LoRA of rank 16, "
        f"GRPO with `kl: in_loss` or without a KL; {options.repeats} processes each, one of `frozen`. The most that a process "
        "held, and that less what it held before the model was made: medians, least and most.\n\n"
        f"{table(runs)}\n"
    )
    keep(options.json, command, {"runs": runs}, text)


if __name__ == "__main__":
    main()

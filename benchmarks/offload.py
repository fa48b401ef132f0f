"""Memory by phase with and without `offload`.

`python -m benchmarks.offload [--cases NAME ...] [--json PATH]`

Each case is a short run of PPO with AdamW, a reference and a separate critic, on a Qwen2 model of 74 million weights with random
weights, on the CPU in a process of its own; what is offloaded lies in a mapped file. Measured is the resident set: what a
process holds of a file counts, what the system keeps of it in its cache does not. The C library hands every large block back
to the system when it is freed (MALLOC_MMAP_THRESHOLD_). `at most` is over the whole training, the optimizer's own steps
included, which are in no phase. `trained weights` says whether policy and critic ended with the same bits as without
`offload`. The result goes to benchmarks/results/offload.json and, as a table, to offload.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import PROMPT_TOKENS, RESULTS, in_own_process, make_run, trim
from benchmarks.peak import peak
from benchmarks.record import keep
from hf_rlhf.runtime.peak_memory import MIB, Phase

TOKENS = 33
STEPS = 2
PHASES = ("rollout", "forward", "update")


def case(*offloaded: str, **more: Any) -> dict[str, Any]:
    """A run in which these parts are offloaded."""
    recipe: dict[str, Any] = {
        "rollout": {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": TOKENS},
        "advantages": "gae",
        "kl": [{"use": "in_loss"}],
        "reference": {"use": "frozen", "offload": "reference" in offloaded},
        "critic": {"use": "separate", "offload": "critic" in offloaded},
        "update": {"max_tokens_per_micro_batch": 256, "offload": "update" in offloaded},
    }
    training = {"max_steps": STEPS, "gradient_checkpointing": "checkpointing" in more.get("with", ())}
    return {"recipe": recipe, "training": training, "lora": "LoRA" in more.get("with", ())}


CASES: dict[str, dict[str, Any]] = {
    "nothing": case(),
    "reference": case("reference"),
    "critic": case("critic"),
    "update": case("update"),
    "all three": case("reference", "critic", "update"),
    "all three, checkpointing": case("reference", "critic", "update", **{"with": ("checkpointing",)}),
    "nothing, LoRA": case(**{"with": ("LoRA",)}),
}
"""What is offloaded -> the run."""


def run_case(chosen: dict[str, Any], folder: str) -> dict[str, Any]:
    """One run in this process: MiB of each phase, estimated and measured, CPU seconds, and a hash of what it trained."""
    from hf_rlhf.contract.model_settings import Model
    from hf_rlhf.training.memory.estimate import from_model
    from hf_rlhf.training.memory.workload import Workload

    *_, first = make_run(chosen, f"{folder}/first", hidden=16, layers=1)  # so that every library is loaded
    _trained(first)
    model, args, peft_config, recipe, made = make_run(chosen, f"{folder}/second", hidden=768, layers=8)
    setting = Workload(algorithm=recipe.algorithm(), args=args, prompt_tokens=PROMPT_TOKENS)
    trim()
    estimated = from_model(model, Model(), setting, peft_config)
    del model
    trainer, phase, seconds = _trained(made)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    digest = hashlib.sha256()
    for parameter in trainer.actor_critic.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return {
        "estimated": {phase: sum(parts.values()) for phase, parts in estimated.phases.items()},
        "measured": {phase: max(entry[f"memory/{phase}/peak"] for entry in entries) for phase in PHASES},
        "offloaded": max(entry.get("memory/offloaded", 0.0) for entry in entries),
        "peak": phase.peak / MIB,
        "cpu_seconds": seconds,
        "weights": digest.hexdigest(),
    }


def _trained(made: Any) -> tuple[Any, Phase, float]:
    """The trainer after training, what was held meanwhile, and the CPU seconds that it took."""
    trainer, start = made(), time.process_time()
    with peak() as phase:
        trainer.train()
    trainer.close()
    return trainer, phase, time.process_time() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown: MiB, measured and (estimated)."""
    first = {row["case"]: row["weights"] for row in rows}.get("nothing")
    columns = ("offloaded", *PHASES, "at most", "away while sampling", "CPU seconds", "trained weights")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        numbers = [f"{row['measured'][phase]:,.0f} ({row['estimated'][phase]:,.0f})" for phase in PHASES]
        same = "the same bits" if row["weights"] == first else "others"
        cells = [row["case"], *numbers, *(f"{row[key]:,.0f}" for key in ("peak", "offloaded", "cpu_seconds")), same]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the cases and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, default=RESULTS / "offload.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_case(CASES[options.one], options.folder)))
        return
    rows = []
    for name in options.cases:
        rows.append(in_own_process(name, "exact", "benchmarks.offload"))
        print(table(rows).splitlines()[-1], flush=True)
    command = "python -m benchmarks.offload"
    text = f"# Offload\n\n`{command}`: MiB of a process, measured and (estimated).\n\n{table(rows)}\n"
    keep(options.json, command, {"rows": rows}, text)


if __name__ == "__main__":
    main()

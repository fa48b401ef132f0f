"""Reward curves of our recipes next to those of TRL's trainers, over several seeds, on the quickstart's task.

`python -m benchmarks.curves [--seeds 5] [--steps 80] [--jobs 1] [--json PATH]`: GRPO and RLOO, each by us and by TRL, from
the same warmed-up policy with the same settings; the systems draw their own prompts and samples. The result goes to
benchmarks/results/curves.json after every run (what is there already is not run again) and, as a table, to curves.md.

A curve is the mean reward of each rollout. For each tenth of the run, and for the whole, the table has both means over
the seeds and the 95% interval of their difference (Student's t, equal variances; in the tenths for ten comparisons at
once). The systems learn alike where the intervals hold 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from benchmarks.record import head, write

RESULTS = Path(__file__).parent / "results" / "curves.json"
PARTS = 10
PROMPTS, GROUP, LONGEST = 32, 8, 4
TRAINING = {
    "learning_rate": 4e-4,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": PROMPTS * GROUP,
    "logging_steps": 1,
    "save_strategy": "no",
}
"""TrainingArguments of both systems, whose other defaults are the same: AdamW, gradients clipped at norm 1."""

OURS = {
    "grpo": ["kl=[]", "advantages=group_norm", "policy_loss=ppo_clip", "aggregation=seq_mean_token_mean"],
    "rloo": [
        "kl=[{use: in_reward, beta: 0.05, estimator: k1}]",
        "advantages=leave_one_out",
        "policy_loss=reinforce",
        "aggregation=seq_mean_token_sum",
    ],
}
"""Overrides of the recipe quickstart."""
THEIRS: dict[str, dict[str, Any]] = {"grpo": {"loss_type": "grpo"}, "rloo": {"beta": 0.05}}
"""Arguments of TRL's GRPOConfig and RLOOConfig."""
Curve = list[float]


def run_ours(algorithm: str, seed: int, steps: int, folder: str) -> Curve:
    """Mean reward of each rollout."""
    from transformers import PrinterCallback

    from hf_rlhf import RLHFTrainer, load_recipe

    recipe = load_recipe("quickstart", OURS[algorithm])
    assert (recipe.plugins["rollout"].prompts, recipe.plugins["rollout"].num_generations) == (PROMPTS, GROUP)
    recipe.training = {**TRAINING, "max_steps": steps, "seed": seed, "report_to": "none", "disable_tqdm": True}
    trainer = RLHFTrainer(None, recipe, recipe.training_arguments(folder))
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        trainer.close()
    return [entry["reward/total/mean"] for entry in trainer.state.log_history if "loss" in entry]


def run_trl(algorithm: str, seed: int, steps: int, folder: str) -> Curve:
    """Mean reward of each rollout."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    from hf_rlhf.data.addition_task import addition_dataset, addition_model

    def exact_match(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]

    model = addition_model()
    args = getattr(trl, f"{algorithm.upper()}Config")(
        folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        max_steps=steps,
        seed=seed,
        **TRAINING,
        **THEIRS[algorithm],
    )
    trainer = getattr(trl, f"{algorithm.upper()}Trainer")(
        str(model),
        exact_match,
        args,
        train_dataset=Dataset.from_list(addition_dataset()[0]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "loss" in entry]


SYSTEMS = {"ours": run_ours, "trl": run_trl}


def run(system: str, algorithm: str, seed: int, steps: int) -> dict[str, Any]:
    """One run in this process."""
    import torch
    from transformers.utils import logging

    os.environ["CI"] = "1"  # TRL then sends no news of the run
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # faster than several at this size
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        curve = SYSTEMS[system](algorithm, seed, steps, folder)
        seconds = time.process_time() - began
    assert len(curve) == steps, f"{system} logged {len(curve)} of {steps} steps"
    row = {"system": system, "algorithm": algorithm, "seed": seed, "seconds": round(seconds)}
    return {**row, "tenths": parts(curve), "whole": fmean(curve)}


# The table


def parts(curve: Curve) -> Curve:
    """Return the mean of each tenth of a run."""
    edges = [round(i * len(curve) / PARTS) for i in range(PARTS + 1)]
    return [fmean(curve[a:b]) for a, b in pairwise(edges)]


def student(level: float, freedom: int) -> float:
    """Return the t that a Student variable exceeds with probability 1 - level, by bisection on the integral of its density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def below(t: float, pieces: int = 2000) -> float:
        width = t / pieces
        heights = [(1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(pieces + 1)]
        simpson = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        return 0.5 + scale * width * simpson / 3

    low, high = 0.0, 1e3
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < level else (low, middle)
    return high


def difference(ours: list[float], theirs: list[float], comparisons: int = 1) -> tuple[float, float]:
    """Ours minus theirs and the half-width of its 95% interval, among several comparisons that hold at once."""
    freedom = len(ours) + len(theirs) - 2
    pooled = ((len(ours) - 1) * variance(ours) + (len(theirs) - 1) * variance(theirs)) / freedom
    width = math.sqrt(pooled * (1 / len(ours) + 1 / len(theirs)))
    return fmean(ours) - fmean(theirs), student(1 - 0.025 / comparisons, freedom) * width


def table(rows: list[dict[str, Any]]) -> str:
    """For each algorithm a Markdown table of the tenths of the run and of the whole."""
    blocks = []
    for algorithm in OURS:
        found = {
            system: [row for row in rows if (row["system"], row["algorithm"]) == (system, algorithm)]
            for system in SYSTEMS
        }
        lines = ["| part of the run | ours | TRL | difference | 95% interval | holds 0 |", "|---|---|---|---|---|---|"]
        compared = [
            (f"tenth {i + 1}", *([row["tenths"][i] for row in found[system]] for system in SYSTEMS), PARTS)
            for i in range(PARTS)
        ]
        compared.append(("whole", *([row["whole"] for row in found[system]] for system in SYSTEMS), 1))
        for title, ours, theirs, comparisons in compared:
            cells = [f"{fmean(ours):.3f}", f"{fmean(theirs):.3f}"]
            if min(len(ours), len(theirs)) > 1:
                middle, width = difference(ours, theirs, comparisons)
                interval = f"{middle - width:+.3f} to {middle + width:+.3f}"
                cells += [f"{middle:+.3f}", interval, "yes" if abs(middle) <= width else "**no**"]
            else:
                cells += [f"{fmean(ours) - fmean(theirs):+.3f}", "one seed", "-"]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        blocks.append(f"## {algorithm}\n\n" + "\n".join(lines))
    return "\n\n".join(blocks)


def save(rows: list[dict[str, Any]], steps: int, path: Path) -> None:
    """Write rows and, once every system has a run of every algorithm, the table."""
    rows = sorted(rows, key=lambda row: (row["algorithm"], row["system"], row["seed"]))
    found = {**head("python -m benchmarks.curves"), "steps": steps, "rows": rows}
    write(path, found)
    if len({(row["algorithm"], row["system"]) for row in rows}) < len(OURS) * len(SYSTEMS):
        return
    seeds = len({row["seed"] for row in rows})
    title = (
        f"# Reward curves next to TRL's\n\n`{found['command']}`: mean reward of the rollouts, {steps} optimizer steps of "
        f"{PROMPTS} prompts with {GROUP} completions, {seeds} seeds, TRL {found['versions'].get('trl', '')}.\n\n"
    )
    path.with_suffix(".md").write_text(title + table(rows) + "\n")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, ...")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each run, one rollout each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on one core")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    from hf_rlhf.data.addition_task import addition_model

    addition_model()  # made once, before the runs share it
    rows: list[dict[str, Any]] = []
    if options.json.is_file():
        found = json.loads(options.json.read_text())
        rows = found["rows"] if found["steps"] == options.steps else []
    there = {(row["system"], row["algorithm"], row["seed"]) for row in rows}
    wanted = [(system, algorithm, seed) for seed in range(options.seeds) for algorithm in OURS for system in SYSTEMS]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(run, *one, options.steps) for one in wanted if one not in there]
        for done in as_completed(runs):
            row = done.result()
            rows.append(row)
            save(rows, options.steps, options.json)
            last = row["tenths"][-1]
            print(f"{row['algorithm']} {row['system']} seed {row['seed']}: {last:.3f}, {row['seconds']} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()

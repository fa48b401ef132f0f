"""False alarms of the run doctor: five recipes on the quickstart's task, five seeds each.

`python -m benchmarks.doctor [--seeds 5] [--recipes NAME ...]`: runs that learn, so that every finding is a false alarm. See
benchmarks.fits for what changes on the task. Thresholds are those of docs/doctor.md; they were there before the runs.

Results go to benchmarks/results/doctor.json and, as a table, to benchmarks/results/doctor.md. A run that is there is not run
again, unless the recipe or the table of thresholds has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.fits import RIGHT, fitted, located
from benchmarks.record import keep

RESULTS = Path(__file__).parent / "results" / "doctor.json"
RECIPES = ("grpo", "rloo", "ppo", "dapo", "reinforce_plus_plus")


def thresholds() -> dict[str, str]:
    """Return the rule of each installed pattern."""
    from hf_rlhf.metrics.doctor import installed

    return {pattern.name: pattern.rule for pattern in installed()}


def mark(raw: dict[str, Any]) -> str:
    """Return a digest of a recipe and of the thresholds."""
    return hashlib.sha256(json.dumps([raw, thresholds()], sort_keys=True).encode()).hexdigest()[:12]


def run(name: str, seed: int) -> dict[str, Any]:
    """One run: what the doctor found, right answers at its beginning and end, and the doctor's share of the time."""
    from transformers import PrinterCallback, TrainingArguments
    from transformers.utils import logging as transformers_logging

    from hf_rlhf import RLHFTrainer
    from hf_rlhf.config.recipe import resolve
    from hf_rlhf.config.training_arguments import DEFAULTS

    transformers_logging.disable_progress_bar()
    raw = fitted(name, seed)
    recipe = resolve(located(raw), name=name)
    spent = [0.0]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(output_dir=folder, use_cpu=True, **{**DEFAULTS, **recipe.training})
        trainer = RLHFTrainer(None, recipe, args)
        trainer.remove_callback(PrinterCallback)
        trainer.doctor.on_log = timed(trainer.doctor.on_log, spent)  # type: ignore[method-assign]
        began = time.process_time()
        try:
            trainer.train()
        finally:
            trainer.close()
        seconds = time.process_time() - began
        found = trainer.doctor.findings
        right = [
            entry[f"reward/{RIGHT}/mean"] for entry in trainer.state.log_history if f"reward/{RIGHT}/mean" in entry
        ]
    return {
        "recipe": name,
        "seed": seed,
        "mark": mark(raw),
        "steps": trainer.state.global_step,
        "rollouts": len(right),
        "right": [fmean(right[:4]), fmean(right[-4:])],
        "findings": [{**vars(finding), "overrides": list(finding.overrides)} for finding in found],
        "seconds": seconds,
        "doctor_share": spent[0] / seconds,
    }


def timed(function: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    """Wrap a function so that its processor time is added to `spent`."""

    def call(*args: Any, **kwargs: Any) -> None:
        began = time.thread_time()
        function(*args, **kwargs)
        spent[0] += time.thread_time() - began

    return call


def table(rows: list[dict[str, Any]]) -> str:
    """Format the result as a page."""
    count = sum(len(row["findings"]) for row in rows)
    share = [100 * row["doctor_share"] for row in rows]
    lines = [
        "# The run doctor on runs that learn",
        "",
        f"`python -m benchmarks.doctor`: {len(rows)} runs on the quickstart's task, {count} findings. The doctor took "
        f"{fmean(share):.2f} % of their processor time (at most {max(share):.2f} %).",
        "",
        "| recipe | seeds | steps | right answers, first rollouts | last rollouts | findings | share of the time, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        found = [f"{x['pattern']} (seed {row['seed']}, step {x['step']})" for row in own for x in row["findings"]]
        begin, end = ([row["right"][i] for row in own] for i in (0, 1))
        seeds = ", ".join(str(row["seed"]) for row in own)
        shares = fmean(100 * row["doctor_share"] for row in own)
        ranges = " | ".join(f"{fmean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (begin, end))
        lines.append(
            f"| {name} | {seeds} | {own[0]['steps']} | {ranges} | {', '.join(found) or 'none'} | {shares:.2f} |"
        )
    rules = [f"| {name} | {rule} |" for name, rule in thresholds().items()]
    lines += ["", "Patterns and thresholds of these runs:", "", "| pattern | found where |", "|---|---|", *rules]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the results after every run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["runs"] if RESULTS.is_file() else []
    for name in args.recipes:
        for seed in range(args.seeds):
            known = next((row for row in rows if (row["recipe"], row["seed"]) == (name, seed)), None)
            if known is None or known["mark"] != mark(fitted(name, seed)):
                rows = [row for row in rows if row is not known] + [run(name, seed)]
                keep(RESULTS, "python -m benchmarks.doctor", {"runs": rows}, table(rows))
                print(f"{name}, seed {seed}: {rows[-1]['findings'] or 'no findings'}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()

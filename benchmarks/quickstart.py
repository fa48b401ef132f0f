"""Accuracy and time of the quickstart over several seeds.

`python -m benchmarks.quickstart [--seeds 0 1 2] [--cold] [--json PATH] [KEY=VALUE ...]`

Each seed is a run of `hf-rlhf train quickstart` in a process of its own, with the warm-up cached before the first. The
result goes to benchmarks/results/quickstart.json and, as a table, to benchmarks/results/quickstart.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import keep

RESULTS = Path(__file__).parent / "results"


def run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run; its accuracy before and after, and its seconds, start of the process included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_rlhf", "train", "quickstart", "--seed", str(seed)]
        started = time.perf_counter()
        subprocess.run([*command, "--output-dir", f"{folder}/run", *overrides], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    return {
        "seed": seed,
        "before": summary["before"]["accuracy"],
        "after": summary["after"]["accuracy"],
        "seconds": seconds,
        "train_seconds": summary["train_seconds"],
        "steps": summary["steps"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| seed | accuracy before | accuracy after | seconds | of these training |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row['before']:.3f} | {row['after']:.3f} | {row['seconds']:.0f} | {row['train_seconds']:.0f}"
        lines.append(f"| {row['seed']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the seeds and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=RESULTS / "quickstart.json")
    parser.add_argument("--cold", action="store_true", help="make the warm-up anew and time it")
    parser.add_argument("overrides", nargs="*", help="recipe overrides, for instance advantages.use=leave_one_out")
    options = parser.parse_args()
    if options.cold:
        os.environ["HF_RLHF_CACHE"] = tempfile.mkdtemp()
    from hf_rlhf.data.addition_task import addition_model

    started = time.perf_counter()
    addition_model()
    warm_up = time.perf_counter() - started
    rows = [run(seed, options.overrides) for seed in options.seeds]
    command = "python -m benchmarks.quickstart"
    text = f"# Quickstart\n\n`{command}`: held-out accuracy when sampled, 512 problems.\n\n{table(rows)}\n"
    if options.cold:
        text += f"\nThe warm-up, made once and then cached, took {warm_up:.0f} s.\n"
    result = {"overrides": options.overrides, "warm_up_seconds": warm_up if options.cold else None, "rows": rows}
    keep(options.json, command, result, text)
    print(table(rows))


if __name__ == "__main__":
    main()

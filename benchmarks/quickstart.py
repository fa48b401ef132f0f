"""Accuracy and time of the quickstart over several seeds, and the picture of one run.

`python -m benchmarks.quickstart [--seeds 0 1 2] [--cold] [--json PATH] [KEY=VALUE ...]`
`python -m benchmarks.quickstart --picture RUN`: draw docs/quickstart.svg from the folder of a finished run

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
    """Format the rows in Markdown."""
    lines = ["| seed | accuracy before | accuracy after | seconds | of these training |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row['before']:.3f} | {row['after']:.3f} | {row['seconds']:.0f} | {row['train_seconds']:.0f}"
        lines.append(f"| {row['seed']} | {numbers} |")
    return "\n".join(lines)


def picture(run: Path, file: Path) -> None:
    """Draw the reward of every step of a run, and the held-out accuracy before and after it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 11})
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["before"]["accuracy"], summary["after"]["accuracy"]
    steps, rewards = zip(*((r["step"], r["reward/total/mean"]) for r in rows if "reward/total/mean" in r), strict=True)
    figure, axes = pyplot.subplots(figsize=(7.2, 2.7), layout="constrained")
    axes.plot(steps, rewards, color="#7a9cc6", linewidth=1.2, label="mean reward of a rollout (256 completions)")
    axes.plot([0, steps[-1]], [before, after], "o", color="#c0392b", label="held-out problems solved")
    axes.annotate(f"{before:.2f}", (0, before), (6, -4), textcoords="offset points", color="#c0392b")
    axes.annotate(f"{after:.2f}", (steps[-1], after), (6, -4), textcoords="offset points", color="#c0392b")
    axes.set(xlabel="optimizer step", ylim=(0.3, 1.02), title="GRPO on two-digit addition, one CPU core")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run the seeds and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=RESULTS / "quickstart.json")
    parser.add_argument("--cold", action="store_true", help="redo the warm-up and time it")
    parser.add_argument("--picture", type=Path, metavar="RUN", help="draw docs/quickstart.svg from this run's folder")
    parser.add_argument("overrides", nargs="*", help="recipe overrides, for instance advantages.use=leave_one_out")
    options = parser.parse_args()
    if options.picture:
        picture(options.picture, RESULTS.parents[1] / "docs" / "quickstart.svg")
        return
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

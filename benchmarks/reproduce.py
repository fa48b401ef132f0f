"""Qwen3-1.7B on GSM8K and on MATH: the recipe, its seeds, and the curve that they are expected to give, with its band.

`python -m benchmarks.reproduce gsm8k|math [--seeds 0 1 2] [--output-dir FOLDER] [--tiny] [--page] [KEY=VALUE ...]`

Trains benchmarks/reproduce.yaml once per seed, with evaluations on held-out problems, and compares their accuracy with the
band. A run that was interrupted goes on where it stopped, and a finished one is read. Model and datasets come from the Hub. The
result goes to benchmarks/results/reproduce.json and, as a page, to reproduce.md. `--tiny` trains a tiny model with random
weights for two steps on a few rows, and shows nothing but that the code runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.pages import interval, markdown
from benchmarks.record import RESULTS, head, write

ROOT = Path(__file__).parents[1]
ACCURACY = "eval_accuracy"
RECIPE = Path(__file__).parent / "reproduce.yaml"
BANDS: dict[str, dict[int, tuple[float, float]]] = {
    "gsm8k": {0: (0.60, 0.80), 20: (0.65, 0.83), 60: (0.70, 0.86), 100: (0.73, 0.87), 200: (0.75, 0.90)},
    "math": {0: (0.50, 0.73), 20: (0.54, 0.74), 60: (0.58, 0.77), 100: (0.60, 0.79), 200: (0.62, 0.82)},
}
"""Optimizer step -> lowest and highest mean accuracy over the seeds. Written down before any run."""
OVERRIDES = {
    "gsm8k": [],
    "math": [
        "dataset.path=DigitalLearningGmbH/MATH-lighteval",
        "dataset.name=null",
        "dataset.eval_path=HuggingFaceH4/MATH-500",
        'dataset.prompt_template="{problem}\\nReason step by step, and put the final answer in \\\\boxed{{}}."',
        "rewards.0.column=solution",
        "rollout.max_new_tokens=2048",
    ],
}
"""Changes of the recipe for a task."""
TITLES = {"gsm8k": "GSM8K, test split", "math": "MATH-500"}


def train(task: str, seed: int, folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Train one seed, or resume it; returns the evaluations that it logged."""
    if not (folder / "summary.json").exists():
        resume = ["--resume"] if any(folder.glob("checkpoint-*")) else []
        settings = [f"training.seed={seed}", *OVERRIDES[task], *overrides]
        words = [str(RECIPE), *settings, "--output-dir", str(folder), *resume]
        subprocess.run([sys.executable, "-m", "hf_rlhf", "train", *words], check=True, cwd=ROOT)
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = {entry["step"]: entry[ACCURACY] for entry in entries if ACCURACY in entry}
    return [{"step": step, "accuracy": accuracy} for step, accuracy in found.items()]


def small(folder: Path) -> list[str]:
    """Return overrides for a tiny model with a chat template and a few rows, which are made in `folder`."""
    from hf_rlhf.testing import tiny_policy

    model, tokenizer = tiny_policy()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"question": f"{i}+1?", "problem": f"{i}+1?", "answer": f"#### {i + 1}", "solution": f"\\boxed{{{i + 1}}}"}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [f"dataset.path={folder}/rows.jsonl", f"dataset.eval_path={folder}/rows.jsonl", "dataset.eval_split=null"]
    sizes = ["rollout.prompts=2", "rollout.num_generations=2", "rollout.max_new_tokens=4", "evaluation.prompts=4"]
    steps = ["training.max_steps=2", "training.eval_steps=1", "training.save_steps=1", "training.bf16=false"]
    return [f"model.path={folder}/model", "dataset.name=null", *data, *sizes, *steps, "training.use_cpu=true"]


def band(task: str, step: int) -> tuple[float, float]:
    """Return the band at a step, between those that are written down."""
    known = BANDS[task]
    before = max(x for x in known if x <= step)
    after = min((x for x in known if x >= step), default=max(known))
    share = (step - before) / (after - before) if after > before else 0.0
    low, high = (a + share * (b - a) for a, b in zip(known[before], known[after], strict=True))
    return low, high


def table(task: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """One line per evaluation: the band, and the accuracy of the seeds where they have been run."""
    steps = sorted({row["step"] for rows in runs.values() for row in rows}) or sorted(BANDS[task])
    lines = []
    for step in steps:
        low, high = band(task, step)
        found = [row["accuracy"] for rows in runs.values() for row in rows if row["step"] == step]
        inside = ("yes" if low <= mean(found) <= high else "**no**") if found else ""
        lines.append(
            [str(step), f"{low:.2f} to {high:.2f}", interval(found) if found else "not run", f"{len(found)}", inside]
        )
    return markdown(["optimizer step", "expected", "measured", "seeds", "within"], lines)


def page(found: dict[str, Any]) -> str:
    """Format the result as a page."""
    tasks = found.get("tasks", {})
    text = [
        "# Qwen3-1.7B on GSM8K and MATH",
        "`python -m benchmarks.reproduce gsm8k` and `math`: GRPO in three seeds, 200 optimizer steps of 128 problems with 8 "
        "completions ([the recipe](../reproduce.yaml)); accuracy is greedy, on problems that are not trained on.",
        "**The expected curves are expectations, written down before any run**: from what the model does without training and "
        "from what others report of GRPO on small Qwen models. They are no measurement. Measured: mean over seeds and half of "
        "its 95% interval.",
    ]
    for task, title in TITLES.items():
        text += [f"## {title}", table(task, tasks.get(task, {}))]
    return "\n\n".join(text) + "\n"


def main() -> None:
    """Run the seeds of a task and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TITLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two steps")
    parser.add_argument("--page", action="store_true", help="write the page again, from the figures that are there")
    options, overrides = parser.parse_known_args()
    path = options.json or RESULTS / ("reproduce_tiny.json" if options.tiny else "reproduce.json")
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"tasks": {}}
    if not options.page:
        runs = found["tasks"].setdefault(options.task, {})
        options.output_dir.mkdir(parents=True, exist_ok=True)
        given = [*(small(options.output_dir.absolute()) if options.tiny else []), *overrides]
        for seed in options.seeds:
            folder = (options.output_dir / f"{options.task}-{seed}").absolute()
            runs[str(seed)] = train(options.task, seed, folder, given)
            command = "python -m benchmarks.reproduce" + (" --tiny" if options.tiny else "")
            write(path, {**head(command), "overrides": overrides, "tasks": found["tasks"]})
    path.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()

"""The classic pipeline on the quickstart's task: what each stage of `hf-rlhf pipeline instructgpt` reaches.

`python -m benchmarks.pipeline [--seeds N] [--page]`

One run as it stands; then from its fine-tuned model and its reward model PPO with other seeds, PPO whose critic starts from the
policy (head zero) in place of the reward model, and GRPO in PPO's place, as it stands and for fewer rollouts. Each in a
process of its own, about nine minutes together on one core. `--page` writes the page from benchmarks/results/pipeline.json
without running anything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.record import head, write

RESULTS = Path(__file__).parent / "results"
VARIANTS: dict[str, list[str]] = {
    "PPO, critic from the reward model": [],
    "PPO, critic from the policy": ["ppo.critic.init=policy"],
    "GRPO": ["ppo.recipe=grpo"],
    "GRPO, 80 rollouts": ["ppo.recipe=grpo", "ppo.training.max_steps=80"],
}
TRUTH = {"score": "reward/reward_model/mean", "right": "reward/exact_match/mean"}
SHOWN = (1, 2, 3, 4, 5, 10, 20, 30, 40, 50)
"""Rollouts in the table of explained variance."""
SHOWN_METRICS = re.compile(
    r"accuracy\w*|reward/reward_model/mean|rollout/(length/mean|truncated_frac)|tokens/(perplexity|accuracy)"
    r"|(pairs|steps)/(accuracy\w*|count|\w+_wins|all_\w+|log_loss|calibration_error)"
)
"""Held-out metrics that some table shows."""


def shown(metrics: dict[str, float]) -> dict[str, float]:
    """Those of `SHOWN_METRICS`."""
    return {name: x for name, x in metrics.items() if SHOWN_METRICS.fullmatch(name)}


def run(folder: Path, words: list[str]) -> tuple[dict[str, Any], float]:
    """Run the pipeline; returns its summary and its seconds from start to end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    command = [sys.executable, "-m", "hf_rlhf", "pipeline", "instructgpt", "--output-dir", str(folder), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    return json.loads((folder / "summary.json").read_text()), time.perf_counter() - started


def variants(seeds: int) -> dict[str, Any]:
    """Every variant with its seeds; the stages before it are run once."""
    with tempfile.TemporaryDirectory() as made:
        base = Path(made) / "base"
        summary, seconds = run(base, [])
        stages = {name: stage(each) for name, each in summary["stages"].items()}
        found: dict[str, Any] = {"base": stages, "seconds": seconds, "variants": {}}
        for name, words in VARIANTS.items():
            rows = []
            for seed in range(1 if name.startswith("GRPO") else seeds):
                folder = base if not words and seed == 0 else Path(made) / "other"
                if folder != base:
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    for part in ("sft", "rm"):
                        shutil.copytree(base / part, folder / part)
                    shutil.copy(base / "stages.json", folder)
                    run(folder, [*words, *([f"ppo.training.seed={seed}"] if seed else [])])
                rows.append(of_policy(folder / "ppo"))
                print(name, seed, rows[-1]["after"], flush=True)
            found["variants"][name] = rows
    return found


def of_policy(folder: Path) -> dict[str, Any]:
    """Held-out metrics before and after; KL, the critic's explained variance, score and truth at some rollouts."""
    summary = json.loads((folder / "summary.json").read_text())
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [entry["value/explained_var"] for entry in entries if "value/explained_var" in entry]
    steps = [entry for entry in entries if "rollout/rows" in entry]
    kl = [entry.get("kl/rollout/sequence", entry["kl/ref"]) for entry in steps]
    found: dict[str, Any] = {**stage(summary), "kl_last": fmean(kl[-5:])}
    if curve:
        found["explained_var"] = {"at": [curve[n - 1] for n in SHOWN], "last": fmean(curve[-10:])}
    if "reward/exact_match/mean" in steps[0]:
        places = some(len(steps), 9)
        found["truth"] = {"rollout": [place + 1 for place in places], "kl": [kl[place] for place in places]}
        found["truth"] |= {name: [steps[place][key] for place in places] for name, key in TRUTH.items()}
    return found


def some(count: int, parts: int) -> list[int]:
    """About `parts` of `count` places, the first and the last among them."""
    return sorted({*range(0, count, max(1, count // parts)), count - 1})


def stage(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of `SHOWN_METRICS` in a summary, with their costs."""
    kept = {key: summary[key] for key in ("recipe", "steps", "seconds") if key in summary}
    return {**kept, **{when: shown(summary[when]) for when in ("before", "after")}}


def _mean(rows: list[dict[str, Any]], when: str, name: str) -> str:
    values = [row[when][name] for row in rows]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def page(result: dict[str, Any]) -> str:
    """benchmarks/results/pipeline.md."""
    base, versions = result["base"], result["versions"]
    sft, rm = base["sft"], base["rm"]
    pairs = rm["after"]
    lines = [
        "# Pipeline",
        f"`{result['command']}`: supervised fine-tuning, a reward model and PPO on the quickstart's task, 512 held-out "
        f"problems. One core, torch {versions['torch']}, transformers {versions['transformers']}, trl {versions['trl']}. "
        f"`hf-rlhf pipeline instructgpt` took {result['seconds']:.0f} s from start to end, beside other work on the machine.",
        "| stage | steps | seconds | held out | before | after |\n| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(
            [
                f"| `sft` | {sft['steps']} | {sft['seconds']:.0f} | perplexity of the right answer's tokens | "
                f"{sft['before']['tokens/perplexity']:.3f} | {sft['after']['tokens/perplexity']:.3f} |",
                f"| `rm` | {rm['steps']} | {rm['seconds']:.0f} | pairs in the right order (95 %) | "
                f"{rm['before']['pairs/accuracy']:.3f} | **{pairs['pairs/accuracy']:.3f}** "
                f"({pairs['pairs/accuracy_low']:.3f} to {pairs['pairs/accuracy_high']:.3f}) |",
                _policy_line("ppo", base["ppo"], "accuracy", "samples that are right (the rule, weight 0)"),
                _policy_line("ppo", base["ppo"], "reward/reward_model/mean", "score of the reward model"),
            ]
        ),
        "The last stage from the same two models, means over seeds (smallest to largest):",
        "| last stage | seeds | right before | right after | score before | score after | KL in nats at the end |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(
            f"| {name} | {len(rows)} | {_mean(rows, 'before', 'accuracy')} | **{_mean(rows, 'after', 'accuracy')}** | "
            f"{_mean(rows, 'before', 'reward/reward_model/mean')} | {_mean(rows, 'after', 'reward/reward_model/mean')} | "
            f"{fmean(row['kl_last'] for row in rows):.2f} |"
            for name, rows in result["variants"].items()
        ),
        "The critic's explained variance of returns at a rollout, before it learns from it, means over seeds:",
        "| rollout | "
        + " | ".join(map(str, SHOWN))
        + " | last ten |\n|"
        + " --- |" * (len(SHOWN) + 2)
        + "\n"
        + "\n".join(
            f"| {name.partition(', ')[2]} | "
            + " | ".join(f"{fmean(row['explained_var']['at'][i] for row in rows):.2f}" for i in range(len(SHOWN)))
            + f" | {fmean(row['explained_var']['last'] for row in rows):.2f} |"
            for name, rows in result["variants"].items()
            if "explained_var" in rows[0]
        ),
        "Right: a sample at temperature 1 is the sum. Score: what the reward model says of it, which is all that the policy "
        "is trained on. KL: mean log-ratio to the fine-tuned model of a completion of about 3.6 tokens, over the last five "
        "rollouts. GRPO is the packaged recipe: one optimizer step per rollout of 512 completions, so that 200 steps are "
        "200 rollouts, where PPO takes four steps with each of 50 rollouts of 256, and a KL in the loss that holds it less. Its "
        "score rises most and its answers are hardly right more often than before: the reward model is optimized too far "
        "(arXiv:2210.10760), and the rule with weight 0 shows it. With 80 rollouts, over which the learning rate falls to 0, it "
        "stops before that.",
        *_truth(result["variants"]),
    ]
    return "\n\n".join(lines) + "\n"


def _truth(variants: dict[str, Any]) -> list[str]:
    """Return tables of score, correctness and KL over the rollouts, for variants of one seed that recorded them."""
    tables = []
    for name, rows in variants.items():
        if len(rows) == 1 and "truth" in rows[0]:
            found = rows[0]["truth"]
            cells = [
                f"| {title} | " + " | ".join(f"{x:.2f}" for x in found[key]) + " |"
                for title, key in (("score", "score"), ("right", "right"), ("KL in nats", "kl"))
            ]
            rollouts = found["rollout"]
            header = "| rollout | " + " | ".join(map(str, rollouts)) + " |\n|" + " --- |" * (len(rollouts) + 1)
            tables.append(f"{name}, the samples it was trained on:\n\n{header}\n" + "\n".join(cells))
    return tables


def _policy_line(name: str, stage: dict[str, Any], metric: str, what: str) -> str:
    before, after = stage["before"][metric], stage["after"][metric]
    return f"| `{name}` | {stage['steps']} | {stage['seconds']:.0f} | {what} | {before:.3f} | **{after:.3f}** |"


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each PPO")
    parser.add_argument("--json", type=Path, default=RESULTS / "pipeline.json")
    parser.add_argument("--page", action="store_true", help="write the page again, from the figures that are there")
    options = parser.parse_args()
    if not options.page:
        write(options.json, {**head("python -m benchmarks.pipeline"), **variants(options.seeds)})
    result = json.loads(options.json.read_text())
    text = page(result)
    options.json.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

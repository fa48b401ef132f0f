"""`hf-rlhf pipeline instructgpt` on GSM8K from nothing: what each stage reaches on problems that no stage has seen.

`python -m benchmarks.pipeline_gsm8k [--source GSM8K] [--run FOLDER] [--page]`

Runs examples/gsm8k_pipeline.py, about eight minutes on one core that has nothing else to do. `--run` names the folder of a run of
that script that is there; `--page` writes the page from benchmarks/results/pipeline_gsm8k.json without running anything.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pipeline import RESULTS, some, stage
from benchmarks.record import head, write

ROOT = Path(__file__).parents[1]
SOURCE = ROOT.parent / "shared" / "data" / "gsm8k"
SHOWN = (
    "reward/reward_model/mean",
    "reward/numeric/mean",
    "kl/rollout/sequence",
    "value/explained_var",
    "rollout/length/mean",
)


def run(source: Path, folder: Path) -> float:
    """Run the script; returns its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "gsm8k_pipeline.py"), str(source), str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def figures(folder: Path) -> dict[str, Any]:
    """Return the figures of a run of the script."""
    from hf_rlhf_plugins.trainer._measures import wilson

    summary = json.loads((folder / "run" / "summary.json").read_text())
    stages = {name: {**stage(each), "rows": each.get("rows")} for name, each in summary["stages"].items()}
    problems = sum(1 for _ in (folder / "ppo_test.jsonl").open())
    for when in ("before", "after"):
        low, high = wilson(stages["ppo"][when]["accuracy"], problems)
        stages["ppo"][when] |= {"accuracy_low": low, "accuracy_high": high}
    lines = (folder / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()
    rollouts = [entry for entry in map(json.loads, lines) if "rollout/rows" in entry]
    places = some(len(rollouts), 8)
    curve = {"rollout": [place + 1 for place in places]}
    curve |= {name: [rollouts[place][name] for place in places] for name in SHOWN}
    return {"problems": problems, "stages": stages, "curve": curve}


def page(result: dict[str, Any]) -> str:
    """benchmarks/results/pipeline_gsm8k.md."""
    versions, stages = result["versions"], result["stages"]
    sft, rm, ppo = (stages[name] for name in ("sft", "rm", "ppo"))

    def span(found: dict[str, float], name: str) -> str:
        return f"{found[name]:.3f} ({found[f'{name}_low']:.3f} to {found[f'{name}_high']:.3f})"

    def change(stage: dict[str, Any], name: str, digits: int) -> str:
        return " | ".join(f"{stage[when][name]:.{digits}f}" for when in ("before", "after"))

    lines = [
        f"| `sft` | {sft['steps']} | perplexity of the reference solutions' tokens | {change(sft, 'tokens/perplexity', 1)} |",
        f"| | | share of those tokens that are the likeliest | {change(sft, 'tokens/accuracy', 3)} |",
        f"| `rm` | {rm['steps']} | pairs in the right order (95 %) | {span(rm['before'], 'pairs/accuracy')} | "
        f"**{span(rm['after'], 'pairs/accuracy')}** |",
        f"| `ppo` | {ppo['steps']} | score of the reward model | {change(ppo, 'reward/reward_model/mean', 3)} |",
        f"| | | right answers, by `numeric` (95 %) | {span(ppo['before'], 'accuracy')} | **{span(ppo['after'], 'accuracy')}** |",
        f"| | | tokens of a completion | {change(ppo, 'rollout/length/mean', 0)} |",
        f"| | | completions without an end | {change(ppo, 'rollout/truncated_frac', 2)} |",
    ]
    rules = ", ".join(
        f"{title} {rm['after'][f'pairs/{name}']:.3f}"
        for name, title in (("longer_wins", "the longer one"), ("shorter_wins", "the shorter one"))
    )
    titles = ("rollout", "score of the reward model", "right answers", "KL in nats", "explained variance", "tokens")
    rows = [
        [str(rollout)] + [f"{result['curve'][name][i]:.2f}" for name in SHOWN[:-1]]
        + [f"{result['curve'][SHOWN[-1]][i]:.0f}"]
        for i, rollout in enumerate(result["curve"]["rollout"])
    ]  # fmt: skip
    seconds = f"{result['seconds']:.0f} s of processor time" if result["seconds"] else "processor time not taken"
    text = [
        "# GSM8K from nothing",
        f"`{result['command']}`: `hf-rlhf pipeline instructgpt` over the rows and the model that "
        "[examples/gsm8k_pipeline.py](../../examples/gsm8k_pipeline.py) makes: a Llama of 1.1 million new weights, whose "
        f"tokenizer is trained on the training rows. {seconds} on one core, beside other work; torch "
        f"{versions['torch']}, transformers {versions['transformers']}, trl {versions['trl']}. Everything is measured on "
        f"{result['problems']} problems that no stage has seen.",
        "| stage | steps | held out | before | after |\n| --- | --- | --- | --- | --- |\n" + "\n".join(lines),
        "In training:",
        "| " + " | ".join(titles) + " |\n|" + " --- |" * len(titles) + "\n"
        + "\n".join("| " + " | ".join(row) + " |" for row in rows),
        f"Pairs: one of each problem, a correct solution (a person's or a model's) and a model's incorrect one; right by length "
        f"alone: {rules}. Right answers: the number behind `A:`, of one sample per problem at temperature 1; the policy never "
        "sees this rule. KL: mean log-ratio of a completion to the fine-tuned model.",
    ]  # fmt: skip
    return "\n\n".join(text) + "\n"


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of GSM8K's files")
    parser.add_argument("--run", type=Path, help="folder of a run that is there")
    parser.add_argument("--seconds", type=float, help="its processor time")
    parser.add_argument("--json", type=Path, default=RESULTS / "pipeline_gsm8k.json")
    parser.add_argument("--page", action="store_true", help="write the page again, from the figures that are there")
    options = parser.parse_args()
    if not options.page:
        with tempfile.TemporaryDirectory() as made:
            seconds = options.seconds if options.run else run(options.source, Path(made))
            found = {"seconds": seconds, **figures(options.run or Path(made))}
        write(options.json, {**head("python -m benchmarks.pipeline_gsm8k"), **found})
    text = page(json.loads(options.json.read_text()))
    options.json.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

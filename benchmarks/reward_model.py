"""Held-out accuracy of reward models that are trained here, next to what length or one answer for all would reach.

`python -m benchmarks.reward_model [--solutions PATH] [--only NAME ...] [--page]`

Four runs of `hf-rlhf train`, each in a process of its own, one to five minutes each on one core. `addition` is the recipe as it
stands, on the quickstart's model. The others are a small Llama from a configuration, with a byte-level BPE tokenizer trained on
the training texts: nothing is pretrained, so they show what such data alone gives. Their rows are those of
examples/gsm8k_pairs.py from graded solutions of GSM8K problems, no problem on both sides. `--page` writes the table from
benchmarks/results/reward_model.json without running anything.
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

from benchmarks.pipeline import shown
from benchmarks.record import head, write

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"
VOCABULARY, CONTEXT = 1024, 768
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = ["--learning_rate", "1e-3", "--warmup_steps", "20", "--per_device_train_batch_size", "16"]
RUNS: dict[str, dict[str, Any]] = {
    "addition": {"recipe": "rm", "rows": "right and wrong sums", "words": []},
    "pairs of models": {
        "recipe": "rm",
        "rows": "a model's correct solution against a model's incorrect one",
        "files": "pairs",
        "words": [*SMALL, "--num_train_epochs", "6"],
    },
    "pairs with reference": {
        "recipe": "rm",
        "rows": "the same, and the reference solution against incorrect ones",
        "files": "pairs",
        "with_reference": True,
        "words": [*SMALL, "--num_train_epochs", "2"],
    },
    "steps": {
        "recipe": "rm_process",
        "rows": "lines, labelled by the reference's results",
        "files": "steps",
        "words": [*SMALL, "--num_train_epochs", "1"],
    },
}


def run(name: str, solutions: Path) -> dict[str, Any]:
    """One run: rows, held-out metrics before and after, seconds."""
    chosen = RUNS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        command = [sys.executable, "-m", "hf_rlhf", "train", chosen["recipe"], "--output-dir", str(folder / "run")]
        if "files" in chosen:
            kind = chosen["files"]
            words = ["--with-reference"] if chosen.get("with_reference") else []
            script = ROOT / "examples" / "gsm8k_pairs.py"
            subprocess.run([sys.executable, script, solutions, folder, *words], check=True, stdout=subprocess.DEVNULL)
            save_model(folder / f"{kind}_train.jsonl", folder / "model")
            command += ["--model", str(folder / "model"), "--dataset", str(folder / f"{kind}_train.jsonl")]
            command += [f"dataset.eval_path={folder / f'{kind}_test.jsonl'}"]
        started = time.perf_counter()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([*command, *chosen["words"]], check=True, stdout=subprocess.DEVNULL, env=env)
        seconds = time.perf_counter() - started
        summary = json.loads((folder / "run" / "summary.json").read_text())
    kept = {key: summary[key] for key in ("rows", "steps", "train_seconds")}
    kept |= {when: shown(summary[when]) for when in ("before", "after")}
    return {"name": name, "recipe": chosen["recipe"], "what": chosen["rows"], "seconds": seconds, **kept}


def save_model(texts: Path, folder: Path) -> None:
    """Save a Llama with new weights and a tokenizer trained on the texts of a file of rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    words = [x for row in rows for value in row.values() for x in (value if isinstance(value, list) else [value])]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([x for x in words if isinstance(x, str)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", model_max_length=CONTEXT
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **SIZES,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows in Markdown."""
    header = [
        "run",
        "recipe",
        "trained on",
        "held out",
        "accuracy (95 %)",
        "simple rules",
        "log loss",
        "calibration error",
    ]
    lines = [[*header, "seconds"], ["---"] * (len(header) + 1)]
    for row in rows:
        found = row["after"]
        area = next(name.partition("/")[0] for name in found if "/" in name)
        rules = [
            ("longer_wins", "longer"),
            ("shorter_wins", "shorter"),
            ("all_good", "all good"),
            ("all_bad", "all bad"),
        ]
        said = [f"{title} {found[f'{area}/{key}']:.3f}" for key, title in rules if f"{area}/{key}" in found]
        low, high = (found[f"{area}/accuracy_{end}"] for end in ("low", "high"))
        lines.append(
            [
                f"{row['name']}: {row['what']}",
                f"`{row['recipe']}`",
                f"{row['rows']['train']:,}",
                f"{found[f'{area}/count']:,} {area}",
                f"**{found[f'{area}/accuracy']:.3f}** ({low:.3f} to {high:.3f})",
                ", ".join(said),
                f"{found[f'{area}/log_loss']:.3f}",
                f"{found[f'{area}/calibration_error']:.3f}",
                f"{row['seconds']:.0f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(result: dict[str, Any]) -> str:
    """benchmarks/results/reward_model.md."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "trl", "hf_rlhf"))
    return f"""# Reward models

`{result["command"]}`: held-out rows, never seen in training; of GSM8K no problem is on both sides. One core, {versions}.

{table(result["rows"])}

Accuracy: the share of pairs whose chosen completion has the higher score, or of steps whose label is the likelier one, with
Wilson's interval (steps of one solution are not independent, so theirs is too narrow). Simple rules: what the longer or the
shorter completion of each pair, or one label for all steps, would reach on the same rows. But for `addition` the model has no
pretraining: two layers from random weights. An accuracy whose interval holds that of a simple rule says nothing about the
quality of a solution; pairs with the reference can be won by telling people's style from a model's.
"""


def main() -> None:
    """Run and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solutions", type=Path, default=SOLUTIONS, help="example_model_solutions.jsonl of GSM8K")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--json", type=Path, default=RESULTS / "reward_model.json")
    parser.add_argument("--page", action="store_true", help="write the table again, from the figures that are there")
    options = parser.parse_args()
    if not options.page:
        rows = [run(name, options.solutions) for name in options.only]
        write(options.json, {**head("python -m benchmarks.reward_model"), "rows": rows})
    result = json.loads(options.json.read_text())
    options.json.with_suffix(".md").write_text(page(result))
    print(table(result["rows"]))


if __name__ == "__main__":
    main()

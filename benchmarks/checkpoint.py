"""Cost of an exact checkpoint beside Trainer's own, on the same model and optimizer.

`python -m benchmarks.checkpoint [--mib 500] [--times 9] [--folder /dev/shm]`: wall time on tmpfs of `Trainer._save_checkpoint` of
a plain Trainer, of the bytes of the rollout buffer through `torch.save`, and of `RLHFTrainer`'s, in turn and in changing order,
each into an empty folder. The figure is the median over the rounds of ours / (Trainer's + the buffer's). The result goes to
benchmarks/results/checkpoint.json and, as a table, to checkpoint.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import keep

RESULTS = Path(__file__).parent / "results"
LIMIT = 1.10
MIB = 1 << 20
RECIPE: dict[str, Any] = {
    "rollout": {"use": "generate", "prompts": 4, "num_generations": 4, "max_new_tokens": 8},
    "rewards": [{"use": "length", "target": 4, "maximum": 8}],
    "advantages": "group_norm",
    "reference": "none",
    "update": {"mini_batches": 2},
}


def trainers(folder: Path, mib: int) -> tuple[Any, Any]:
    """Return an `RLHFTrainer` after half of a rollout, and a plain Trainer on its model and optimizer; AdamW in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

    from hf_rlhf import RLHFTrainer
    from hf_rlhf.config.recipe import resolve
    from hf_rlhf.testing import tiny_policy

    width = 512
    layer = 4 * width * width + 3 * width * 4 * width
    words = 16384
    layers = max(1, round((mib * MIB / 12 - 2 * words * width) / layer))
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model, tokenizer = LlamaForCausalLM(config), tiny_policy()[1]
    model.lm_head.weight.data[len(tokenizer) :] = -1.0  # words that the tokenizer does not have are hardly sampled
    saving: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "optim": "adamw_torch", "report_to": "none"}
    args = [
        TrainingArguments(str(folder / name), use_cpu=True, disable_tqdm=True, **saving) for name in ("ours", "theirs")
    ]
    rows = [{"prompt": f"{a}+1="} for a in range(8)]
    ours = RLHFTrainer(model, resolve(RECIPE), args[0], train_dataset=rows, processing_class=tokenizer)
    ours.remove_callback(PrinterCallback)
    ours.train()
    plain = Trainer(
        ours.model,
        args[1],
        processing_class=tokenizer,
        optimizers=(ours.optimizer, ours.lr_scheduler),
        train_dataset=rows,
    )
    plain.state = ours.state
    return ours, plain


def measure(folder: Path, mib: int, times: int) -> dict[str, Any]:
    """Return the seconds of each round, after one that does not count."""
    ours, plain = trainers(folder, mib)
    buffer = ours.buffer.state_dict()
    parts: dict[str, Callable[[], Any]] = {
        "Trainer": lambda: plain._save_checkpoint(plain.model, None),
        "buffer": lambda: torch.save(buffer, folder / "buffer.pt"),
        "ours": lambda: ours._save_checkpoint(ours.model_wrapped, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(times + 1):
        for name in list(parts)[:: 1 if number % 2 else -1]:
            for path in (folder / "ours", folder / "theirs"):
                shutil.rmtree(path / "checkpoint-1", ignore_errors=True)
            began = time.perf_counter()
            parts[name]()
            seconds[name].append(time.perf_counter() - began)
            written = [p for p in (folder / "ours").glob("checkpoint-1/**/*") if p.is_file()]
            size = sum(p.stat().st_size for p in written) or None
    seconds = {name: x[1:] for name, x in seconds.items()}
    ratios = [a / (b + c) for a, b, c in zip(seconds["ours"], seconds["Trainer"], seconds["buffer"], strict=True)]
    ours.close()
    state = sum(p.numel() for p in ours.model.parameters()) * 12 / MIB
    return {
        "mib": state,
        "checkpoint_bytes": size,
        "seconds": seconds,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def table(found: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    medians = {name: statistics.median(x) for name, x in found["seconds"].items()}
    low, high = min(found["ratios"]), max(found["ratios"])
    lines = ["| part | seconds, median |", "| --- | --- |", *(f"| {name} | {x:.3f} |" for name, x in medians.items())]
    said = (
        f"{found['mib']:.0f} MiB of weights and optimizer state, {len(found['ratios'])} rounds on one thread: ours takes "
        f"{found['ratio']:.3f} of Trainer's and the buffer's (median of the rounds; {low:.3f} to {high:.3f})."
    )
    return "\n".join([*lines, "", said, ""])


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=500)
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--folder", default="/dev/shm")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        found = measure(Path(folder), chosen.mib, chosen.times)
    print(table(found))
    if chosen.mib >= 500 and chosen.times >= 9:
        keep(RESULTS / "checkpoint.json", "python -m benchmarks.checkpoint", found, table(found))
    if found["ratio"] > LIMIT:
        raise SystemExit(f"the ratio must be at most {LIMIT}, got {found['ratio']:.3f}")


if __name__ == "__main__":
    main()

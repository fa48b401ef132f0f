"""`hf-rlhf pipeline instructgpt` on GSM8K, with a small model that knows nothing beforehand.

    python examples/gsm8k_pipeline.py GSM8K OUTPUT [--steps SFT RM PPO] [STAGE.KEY=VALUE]...

GSM8K is a folder with the files of its repository `train.jsonl` and `example_model_solutions.jsonl` (problems, their reference
solutions, and solutions of two models that say whether they are correct). Written to OUTPUT are

    sft_train.jsonl, sft_test.jsonl      prompt, completion: correct solutions, of people and of models
    pairs_train.jsonl, pairs_test.jsonl  prompt, chosen, rejected: correct solutions against incorrect ones of the same problem
                                         (gsm8k_pairs.py, --with-reference); of a test problem one pair, so that they are
                                         independent of each other
    ppo_train.jsonl, ppo_test.jsonl      prompt, answer
    model/                               a Llama of 1.1 million weights, all of them new, and a byte-level BPE tokenizer
                                         trained on sft_train.jsonl
    run/                                 what `hf-rlhf pipeline` leaves

and the command is printed. A fifth of the problems with graded solutions is the test side of all three stages; no stage
trains on them. The policy is trained on the reward model's score alone: `rewards.numeric`, which reads the answer, has weight 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gsm8k_pairs import graded, in_test, pairs

TEST_SHARE = 0.2
VOCABULARY, CONTEXT, COMPLETION = 2048, 640, 128
"""Maximum number of tokens in the vocabulary, a row and a completion."""
LONGEST_PROMPT = CONTEXT - COMPLETION
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
STEPS = (320, 80, 96)
"""Optimizer steps of sft, rm and ppo."""


def prepare(source: Path, output: Path) -> dict[str, int]:
    """Write the rows and return their number by file name."""
    train, problems = read(source / "train.jsonl"), read(source / "example_model_solutions.jsonl")
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for problem in problems:
        sides["test" if in_test(problem["question"], TEST_SHARE) else "train"].append(problem)
    people = [row(problem["question"], completion=solution(problem["answer"])) for problem in train]
    files = {
        "sft_train": [*people, *(made for problem in sides["train"] for made in correct(problem))],
        "sft_test": [row(problem["question"], completion=problem["ground_truth"].strip()) for problem in sides["test"]],
        "ppo_train": [row(problem["question"], answer=answer(solution(problem["answer"]))) for problem in train],
        "ppo_test": [row(problem["question"], answer=answer(problem["ground_truth"])) for problem in sides["test"]],
    }
    of_problem = {side: [list(pairs(problem, True)) for problem in own] for side, own in sides.items()}
    files["pairs_train"] = [made for rows in of_problem["train"] for made in rows]
    files["pairs_test"] = [rows[0] for rows in of_problem["test"] if rows]
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(made) + "\n" for made in rows)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {f"{name}.jsonl": len(rows) for name, rows in files.items()}


def read(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def row(question: str, **more: str) -> dict[str, str]:
    """Return a row whose prompt is the question and a line break."""
    return {"prompt": question + "\n", **more}


def solution(reference: str) -> str:
    """Convert a reference solution to the format of models' solutions: `A: 72` for `#### 72`."""
    return reference.replace("\n#### ", "\nA: ").strip()


def answer(text: str) -> str:
    """Return the text after the last `A:`."""
    return text.rpartition("A:")[2].strip()


def correct(problem: dict[str, Any]) -> Iterable[dict[str, str]]:
    """Yield the reference solution and the models' correct ones, without duplicates."""
    texts = [problem["ground_truth"].strip(), *(text for text, right in graded(problem) if right)]
    return [row(problem["question"], completion=text) for text in dict.fromkeys(texts)]


def save_model(texts: Path, folder: Path) -> None:
    """Save a Llama with new weights and a tokenizer trained on the rows of a file."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for made in read(texts) for text in made.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", model_max_length=CONTEXT
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
        **SIZES,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def overrides(folder: Path, steps: Sequence[int]) -> list[str]:
    """STAGE.KEY=VALUE of `hf-rlhf pipeline instructgpt` over what `prepare` and `save_model` wrote."""
    sft, rm, ppo = steps
    chosen: dict[str, str | dict[str, Any] | list[Any]] = {
        "sft.model.path": str(folder / "model"),
        "sft.trainer.max_length": str(CONTEXT),
        "sft.training": {"max_steps": sft, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 20}
        | {"train_sampling_strategy": "group_by_length", "weight_decay": 0.1}
        | {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 16},
        "rm.trainer.max_length": str(CONTEXT),
        "rm.training": {"max_steps": rm, "learning_rate": 5e-4, "lr_scheduler_type": "linear", "warmup_steps": 20}
        | {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "weight_decay": 0.1},
        "ppo.dataset.max_prompt_tokens": str(LONGEST_PROMPT),
        "ppo.dataset.overlong_prompts": "drop",
        "ppo.rollout.prompts": "32",
        "ppo.rollout.max_new_tokens": str(COMPLETION),
        "ppo.rewards": [
            {"use": "reward_model", "model": "stage:rm"},
            {"use": "numeric", "column": "answer", "answer_after": "A:", "strict": True, "weight": 0},
        ],
        "ppo.training": {"max_steps": ppo, "learning_rate": 1e-4, "lr_scheduler_type": "linear"}
        | {"per_device_train_batch_size": 16},
    }
    for stage, rows in (("sft", "sft"), ("rm", "pairs"), ("ppo", "ppo")):
        for key, side in (("path", "train"), ("eval_path", "test")):
            chosen[f"{stage}.dataset.{key}"] = str(folder / f"{rows}_{side}.jsonl")
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in chosen.items()]


def main() -> None:
    """Prepare missing files and run the pipeline, or resume it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder with train.jsonl and example_model_solutions.jsonl")
    parser.add_argument("output", type=Path, help="output folder")
    parser.add_argument("--steps", type=int, nargs=3, default=STEPS, metavar=("SFT", "RM", "PPO"))
    parser.add_argument("words", nargs="*", metavar="STAGE.KEY=VALUE", help="further overrides")
    options = parser.parse_args()
    folder = options.output.absolute()
    if not (folder / "model" / "config.json").is_file():
        for name, count in prepare(options.source, folder).items():
            print(f"{folder / name}: {count} rows")
        save_model(folder / "sft_train.jsonl", folder / "model")
    command = ["pipeline", "instructgpt", "--output-dir", str(folder / "run"), *overrides(folder, options.steps)]
    command += options.words
    print(shlex.join(["hf-rlhf", *command]), flush=True)
    sys.exit(subprocess.call([sys.executable, "-m", "hf_rlhf", *command], env={**os.environ, "HF_HUB_OFFLINE": "1"}))


if __name__ == "__main__":
    main()

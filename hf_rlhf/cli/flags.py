"""Flags of TRL and transformers that name settings of a recipe."""

from __future__ import annotations

from itertools import zip_longest
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

FLAGS = {
    "model": "model.path",
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    "lora_target_parameters": "model.lora.target_parameters",
    "lora_modules_to_save": "model.lora.modules_to_save",
    "use_dora": "model.lora.use_dora",
    "use_rslora": "model.lora.use_rslora",
    "load_in_4bit": "model.load_in_4bit",
    "load_in_8bit": "model.load_in_8bit",
    "bnb_4bit_quant_type": "model.bnb_4bit_quant_type",
    "use_bnb_nested_quant": "model.use_bnb_nested_quant",
    "save_merged": "model.save_merged",
    "dataset": "dataset.path",
    "dataset_name": "dataset.path",
    "dataset_config": "dataset.name",
    "dataset_train_split": "dataset.split",
    "dataset_test_split": "dataset.eval_split",
    "dataset_streaming": "dataset.streaming",
    "num_generations": "rollout.num_generations",
    "max_completion_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "min_p": "rollout.min_p",
    "repetition_penalty": "rollout.repetition_penalty",
    "num_iterations": "update.epochs",
    "beta": "kl.0.beta",
    "max_length": "trainer.max_length",
    "center_rewards_coefficient": "trainer.center_rewards_coefficient",
}
"""Flag, with TRL's spellings -> recipe key. Every field of TrainingArguments is a flag too."""


TEXT = frozenset(
    {"model.path", "model.revision", "dataset.path", "dataset.name", "dataset.split", "dataset.eval_split"}
)
"""Recipe keys whose flags take plain text, not YAML."""

SAMPLES = "--show-completions"
EVERY = 10
"""Steps between completions where the flag has no number."""
ShowCompletions = Annotated[
    int | None,
    typer.Option(
        SAMPLES,
        "--show_completions",
        metavar="[N]",
        min=1,
        help=f"Print a completion, with its prompt and reference, every N steps ({EVERY} by default).",
    ),
]


class WithSamples(TyperCommand):
    """A command whose `--show-completions` may stand without a number."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse, with the default number where none follows."""
        filled = [
            f"{word}={EVERY}" if word.replace("_", "-") == SAMPLES and not after.isdecimal() else word
            for word, after in zip_longest(args, args[1:], fillvalue="")
        ]
        return super().parse_args(ctx, filled)

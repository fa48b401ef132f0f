"""Sections of a recipe that are not plugins: model, dataset, update, evaluation, logging.

They are validated as plugins are. `training` is not among them: it is passed to `transformers.TrainingArguments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from hf_rlhf.axes import Count, NonNegative
from hf_rlhf.contract.base import HubDataset
from hf_rlhf.contract.model_settings import Model


@dataclass(kw_only=True)
class Dataset:
    """The prompts. Every column other than the prompt reaches the rewards."""

    path: HubDataset | None = None
    """A JSON, JSONL, CSV or Parquet file, a folder saved by `datasets`, a name on the Hub, `builtin:addition`,
    `builtin:calculator`, `builtin:guessing`, or `builtin:nim`."""
    name: str | None = None
    """Configuration name of a dataset on the Hub."""
    split: str = "train"
    """Split to train on."""
    eval_path: HubDataset | None = None
    """Like `path`, for evaluation."""
    eval_split: str | None = None
    """Split to evaluate on, of `eval_path` or `path`."""
    held_out: Annotated[int, Ge(0)] = 64
    """Rows held out for evaluation where there is no evaluation data: at most a tenth of the dataset."""
    prompt: str = "prompt"
    """Column of the prompt: text, or a list of chat messages."""
    prompt_template: str | None = None
    """A text with {column} placeholders that makes the prompt, e.g. "Question: {question}\\nAnswer:"."""
    chat: bool = False
    """Wrap a text prompt as one user message and apply the tokenizer's chat template."""
    system: str | None = None
    """A system message before the prompt, for chat prompts."""
    max_prompt_tokens: Count | None = None
    """Longest prompt in tokens; by default the context that the completion leaves."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """Action for longer prompts."""
    shuffle: bool = True
    """Shuffle the prompts in each epoch."""
    streaming: bool = False
    """Read the dataset as a stream (needs `training.max_steps`)."""


@dataclass(kw_only=True)
class Update:
    """Optimizer steps of a rollout: mini_batches x epochs of them."""

    mini_batches: Count = 1
    """Optimizer steps per pass over a rollout (verl: train_batch_size / ppo_mini_batch_size)."""
    epochs: Count = 1
    """Passes over a rollout (TRL: num_iterations; verl: ppo_epochs)."""
    max_tokens_per_micro_batch: Count | None = None
    """Most tokens in one forward and backward, a prompt counted once for its rows there (where rows are padded, with their
    padding). Packed rows then have no other bound; without it, and where rows are padded, there are at most
    `training.per_device_train_batch_size` rows."""
    ema: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Decay of a moving average of the policy's weights, taken after each optimizer step in float32 (InstructGPT: 0.992). It is
    saved as a model of its own, in the folder `ema` of the output folder and of checkpoints; nothing is trained with it. None:
    no average."""
    attention: Literal["auto", "packed", "flex", "padded"] = "auto"
    """Layout of rows in the model. `packed`: without padding, a prompt's completions after one copy of it; `flex`: the same
    through FlexAttention; `padded`: one prompt and completion per row. `auto`: `flex` on CUDA, `packed` elsewhere or where
    `flex` fails, `padded` if the architecture does not support it or an update rule takes second derivatives. Each is tried
    once against padded rows, and a warning gives the reason for what is not used."""
    fused_loss: Literal["auto", "off"] = "auto"
    """`auto`: where policy loss and KL are `token_level`, differentiate them on the tiles of the language-model head, whose
    logits are then made once. `off`: call them on (B, T) tensors, and `backward()` differentiates what they return. Both
    give the same numbers up to rounding."""
    old_logps: Literal["auto", "trainer", "lazy", "sampler"] = "auto"
    """Source of the log-probs of the policy that sampled. `trainer`: a forward before the first update, if anything reads
    them. `auto`: the same, or without it what the rollout engine noted, if that is exact. `lazy`: the update's own forward, in
    the only optimizer step of a rollout; a rollout correction is then taken in the loss. `sampler`: the engine, exact or not;
    the ratio of the policy loss then corrects for it, and no other correction may."""
    offload: bool = False
    """Keep the state of the update in main memory while completions are sampled and scored: the optimizer's state and the
    average of `update.ema`, including the critic's. Gradients are freed before each rollout in any case. The trained
    parameters are bit-identical. See docs/memory.md."""


@dataclass(kw_only=True)
class Evaluation:
    """Rollouts of held-out prompts."""

    num_generations: Count = 1
    """Completions per prompt; with several, pass@k and maj@k are reported."""
    temperature: NonNegative | None = None
    """Sampling temperature, by default the rollout's; 0 is greedy."""
    prompts: Count | None = None
    """Number of prompts at most; by default all."""
    ema: bool = False
    """Also roll out the moving average of the policy (update.ema); its metrics are named `eval_ema/...`."""


@dataclass(kw_only=True)
class Logging:
    """Output besides the metrics."""

    completions: Annotated[int, Ge(0)] | Literal["all"] = 16
    """Completions per log entry in the table and in completions/*.parquet (0: none, neither for the report). `all`: a file for
    each rollout with the rows of all processes, those that were dropped included; trackers get the first 16."""
    entropy: Literal["sampled", "exact"] = "sampled"
    """policy/entropy: an estimate from the sampled tokens, which costs nothing, or the exact entropy."""
    metric_aliases: Literal["none", "trl"] = "none"
    """Also log metrics under TRL's names (`reward`, `completions/mean_length`, ...), so that dashboards for TRL work."""


SECTIONS: dict[str, type] = {
    "model": Model,
    "dataset": Dataset,
    "update": Update,
    "evaluation": Evaluation,
    "logging": Logging,
}
"""Recipe key -> settings class."""

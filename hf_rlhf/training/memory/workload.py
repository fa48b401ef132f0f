"""What a run holds and computes, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import TrainingArguments

from hf_rlhf.config.algorithm import Algorithm
from hf_rlhf.runtime.peak_memory import MIB
from hf_rlhf.training.memory.fake_tensor_trace import MicroBatch
from hf_rlhf.training.micro_batches import Batching

PROMPT_TOKENS = 256
"""Longest prompt where nothing says how long prompts are."""


GROWTH = 32
"""Completion tokens for which a rollout's cache has room at first; the room doubles from there."""


PREFILL = 16384
"""Prompt tokens that enter the model at a time in a rollout."""


SCORES = 3
"""Copies of a step's attention scores at a time: scores, those with the prompt's, their softmax."""


LIBRARIES = 120 * MIB
"""What a process on CPU grows by between a plan and its first rollout, the model apart: libraries that training loads."""


TRAINER = 12 * MIB
"""Of that, what a trainer's own objects and first steps take where the libraries are there."""


@dataclass(kw_only=True)
class Workload:
    """What decides how much memory a run takes, beside the model."""

    algorithm: Algorithm
    args: TrainingArguments
    prompt_tokens: int | None = None
    """Of the longest prompt; None where nothing is known of them."""
    process: float | None = None
    """Bytes of this process on CPU without any model; what it holds now, without the policy, when left out."""
    context: int | None = None
    """Most tokens of a row that the model takes."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, assumed where nothing is known."""
        room = PROMPT_TOKENS if self.context is None else max(1, self.context - (self.completion_tokens or 0))
        return self.prompt_tokens or min(PROMPT_TOKENS, room)

    @cached_property
    def processes(self) -> int:
        return int(self.args.world_size)

    @cached_property
    def device(self) -> str:
        return self.args.device.type

    @property
    def autocast(self) -> torch.dtype | None:
        """In which forwards run, where it is not the weights' own."""
        return torch.bfloat16 if self.args.bf16 else None

    @property
    def completion_tokens(self) -> int | None:
        """Of the longest completion, where the rollout engine says so."""
        return getattr(self.algorithm.rollout, "max_new_tokens", None)

    @property
    def checkpointed(self) -> bool:
        """Whether layers run again in the backward."""
        return bool(getattr(self.args, "activation_checkpointing", False) or self.args.gradient_checkpointing)

    def rows(self, prompts: int) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and completions of this process's share of `prompts` prompts, each of the greatest length."""
        group, share = self.algorithm.rollout.num_generations, -(-prompts // self.processes)
        longest, tokens = self.longest_prompt, self.completion_tokens or 1
        ids = [[i // 2**15, i % 2**15, *[0] * (longest - 2)] for i in range(share)]
        return [row for row in ids for _ in range(group)], [[0] * tokens] * (share * group)

    def largest(self, prompts: int, attention: str) -> tuple[MicroBatch, int]:
        """The largest micro-batch of the rows of `prompts` prompts over all processes, and how many there are."""
        before, after = self.rows(prompts)
        batching = Batching(
            pad=0,
            max_rows=self.args.per_device_train_batch_size,
            max_tokens=self.algorithm.update.max_tokens_per_micro_batch,
            attention=attention,  # type: ignore[arg-type]
        )
        parts = batching.cut(range(len(before)), before, after)
        part = max(parts, key=len)
        chosen = MicroBatch(
            prompts=[before[i] for i in part],
            completions=[after[i] for i in part],
            attention=attention,
            autocast=self.autocast,
        )
        return chosen, len(parts)


def room(tokens: int) -> int:
    """Tokens for which a completion's cache has room in the end."""
    size = GROWTH
    while size < tokens:
        size *= 2
    return size

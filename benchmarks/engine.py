"""The rollout engine `generate` with completions of given lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.work import EOS, FIRST_WORD, Line, forced_lengths
from hf_rlhf_plugins.rollout.generate import Generate

if TYPE_CHECKING:
    from hf_rlhf.batch import Completions, Prompt
    from hf_rlhf.modeling.policy import Policy


@dataclass(kw_only=True)
class Forced(Generate):
    """Row i of rollout number n ends with the end of sequence after as many tokens as its line says, never before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.line: Line | None = None
        self.lengths: list[list[int]] = []
        """Completion lengths of each rollout so far, in tokens."""

    @classmethod
    def of(cls, line: Line) -> Forced:
        """For the rollouts of a line, counted from 0."""
        engine = cls(prompts=line.prompts, num_generations=line.group, max_new_tokens=line.longest)
        engine.line = line
        return engine

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], num_generations: int, *, temperature: float | None = None
    ) -> Completions:
        found = super().__call__(policy, prompts, num_generations, temperature=temperature)
        self.lengths.append([len(ids) for ids in found.ids])
        return found

    def sampler(
        self, prompts: Sequence[Prompt], num_generations: int, temperature: float, device: torch.device, logps: bool
    ) -> Any:
        """Return `Generate`'s sampler, with tokens replaced to give the prescribed lengths."""
        assert self.line is not None, "made by Forced.of"
        own = super().sampler(prompts, num_generations, temperature, device, logps)
        return Ending(own, forced_lengths(self.line, len(self.lengths)).to(device), temperature)


class Ending:
    """A sampler that ends each row at its length. Log-probs stay those of the policy, also of tokens put in."""

    def __init__(self, own: Any, lengths: Tensor, temperature: float):
        self.own, self.lengths, self.temperature = own, lengths, temperature

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """See `Generate.sampler`."""
        ends = self.lengths.index_select(0, rows) <= step + 1
        ending = (logits[ends] / self.temperature).log_softmax(-1)[:, EOS]
        instead = (logits[:, FIRST_WORD] - logits[:, EOS]) / self.temperature
        tokens, logps = self.own(logits, rows, step)
        early = (tokens == EOS) & ~ends
        if logps is not None:
            logps = (logps + instead).where(early, logps).masked_scatter(ends, ending)
        return tokens.masked_fill(early, FIRST_WORD).masked_fill(ends, EOS), logps

"""A critic without a network: one learned value per token of the vocabulary.

Try it: `hf-rlhf train quickstart 'advantages={use: gae}' 'critic={use: token_table, learning_rate: 0.01}'`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hf_rlhf import hookimpl
from hf_rlhf.axes import Algorithm, Critic, TokenBatch, TrainedCritic
from torch import Tensor

hf_rlhf_api = "1.0"


class ValueTable(torch.nn.Module):
    """Return the value of the token before each sampled one, (n,)."""

    def __init__(self, tokens: int, start: float) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.full((tokens,), start))

    def forward(self, batch: TokenBatch, states: Tensor | None) -> Tensor:
        input_ids, before = batch.padded
        return self.values[input_ids.flatten()[before]]


@dataclass(kw_only=True)
class TokenTable(TrainedCritic):
    """One learned value per token of the vocabulary: that of the token before the sampled one."""

    name = "token_table"

    start: float = 0.0
    """Initial value of every token."""

    def build(self, policy: Any, algorithm: Algorithm) -> torch.nn.Module:
        return ValueTable(len(policy.get_input_embeddings().weight), self.start)


@hookimpl
def critic() -> list[type[Critic]]:
    return [TokenTable]

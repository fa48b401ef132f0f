"""A critic without a network: one learned value for each token, that of the state after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Critic, TrainedCritic

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from torch import Tensor
    from transformers import PreTrainedModel

hf_rlhf_api = "1.0"


class Table(torch.nn.Embedding):
    """One value per token of the vocabulary."""

    def forward(self, batch: Any, states: Tensor | None) -> Tensor:  # type: ignore[override]
        """(n,) the value of the token before each sampled one."""
        input_ids, before = batch.padded
        return super().forward(input_ids.flatten()[before]).squeeze(-1)


@dataclass(kw_only=True)
class MyName(TrainedCritic):
    """A table of values that starts at `start`."""

    name = "my_name"
    metrics = (
        Metric(
            "spread",
            "reward",
            "standard deviation of the values in the table",
            (1e-6, None),
            "The table does not learn: raise `critic.learning_rate`.",
        ),
    )

    start: float = 0.0
    """Every value before the first update."""

    def __post_init__(self) -> None:
        self._table: Table | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.learning_rate is None:
            yield (
                "the learning rate of a policy is too small for a table: set critic.learning_rate, for instance to 0.01"
            )

    def build(self, policy: PreTrainedModel, algorithm: Algorithm) -> torch.nn.Module:
        words: Any = policy.get_input_embeddings().num_embeddings
        self._table = Table(words, 1)
        torch.nn.init.constant_(self._table.weight, self.start)
        return self._table

    def report(self) -> Mapping[str, float]:
        return {} if self._table is None else {"spread": float(self._table.weight.detach().std())}


@hookimpl
def critic() -> list[type[Critic]]:
    return [MyName]

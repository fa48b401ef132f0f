"""Reward model trained on pairs (Bradley-Terry; arXiv:2203.02155), by TRL's `RewardTrainer`.

The loss is -logsigmoid(c - r - m) + lambda (c + r)^2, averaged over the pairs, with the scores c and r of the chosen and the
rejected completion, a margin m (arXiv:2307.09288) and lambda = `center_rewards_coefficient` (arXiv:2312.09244). Departures
from TRL: a text is tokenized as `rewards.reward_model` will read it, without an end-of-sequence token; pairs that are too
long are counted; a constant margin; no telemetry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_rlhf import hookimpl
from hf_rlhf.axes import Footprint, Materials, NonNegative, OfflineTrainer

from ._conversations import ids_of
from ._measures import of_pairs
from ._metrics import OF_REWARD
from ._scores import of_texts

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase, Trainer


@dataclass(kw_only=True)
class RewardModelTrainer(OfflineTrainer):
    """Fits a sequence classifier with one output to score the chosen completion above the rejected one.

    Rows have `chosen` and `rejected`: texts or conversations, including their prompt unless there is a column `prompt`.
    Pairs of equal tokens are dropped.
    """

    name = "reward_model"
    words = "reward model: a classifier that scores the chosen above the rejected completion"
    head = "sequence"
    rows: ClassVar[str] = "preference"
    reward: ClassVar[str] = "reward_model"
    metrics = OF_REWARD

    margin: NonNegative | None = None
    """Margin between the scores of every pair; None: the column `margin` if there is one, else 0."""
    center_rewards_coefficient: NonNegative | None = None
    """Weight of the squared sum of a pair's scores, which keeps scores near 0 (TRL recommends 0.01)."""

    def columns(self) -> set[str]:
        return {"chosen", "rejected"}

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
        answers = [(name, row[name]) for name in ("chosen", "rejected")]
        chosen, rejected = ids_of(tokenizer, row.get("prompt"), *answers)
        margin = row.get("margin", 0.0) if self.margin is None else self.margin
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(
                f"margin must be a number, got {margin!r}. Fix the column, or set trainer.margin for every pair"
            )
        if chosen == rejected:
            return None
        return {"chosen_ids": chosen, "rejected_ids": rejected, "margin": float(margin)}

    def footprint(self, adapter: bool) -> Footprint:
        return Footprint(texts=2)

    def build(self, materials: Materials) -> Trainer:
        from trl import RewardConfig, RewardTrainer

        args = RewardConfig(
            **materials.arguments,
            max_length=None,
            disable_dropout=False,
            center_rewards_coefficient=self.center_rewards_coefficient,
        )
        return materials.trainer(RewardTrainer, args)

    def measure(self, trainer: Trainer, examples: datasets.Dataset) -> dict[str, float]:
        chosen, rejected = list(examples["chosen_ids"]), list(examples["rejected_ids"])
        scores = of_texts(trainer, chosen + rejected)
        return of_pairs(scores[: len(chosen)], scores[len(chosen) :], [*map(len, chosen)], [*map(len, rejected)])


@hookimpl
def trainer() -> list[type[OfflineTrainer]]:
    return [RewardModelTrainer]

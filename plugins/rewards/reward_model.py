"""Score of a reward model: a sequence classifier with one output and its own tokenizer (arXiv:2203.02155).

It need not share the policy's tokenizer: it receives text and uses its own tokenizer and chat template. Of a classifier with
several labels, one scores: an objective of a multi-objective model, or the good one of two.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource, chat
from hf_rlhf.batch import Rollouts

from ._models.batches import Row
from ._models.classifier import ModelReward
from ._models.loading import Loaded
from ._models.text import answered, row_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RewardModel(ModelReward):
    """The classifier's score of each prompt with its completion, independent of batching.

    The model is an `AutoModelForSequenceClassification`, or a causal model's trunk with a value head (as saved by TRL's
    `AutoModelForCausalLMWithValueHead`, LLaMA-Factory and OpenRLHF), scored at the last token.
    """

    name = "reward_model"

    value: Literal["logit", "log_odds", "probability"] = "logit"
    """The label's logit, its log-odds against the other labels (with two labels: its logit minus the other's), or its
    probability (softmax over the labels; sigmoid for a single label or problem_type multi_label_classification)."""
    pair: bool = False
    """Encode prompt and completion as two texts joined by the tokenizer's separator, as BERT-like models are trained."""

    def refusals(self) -> Iterator[str]:
        yield from super().refusals()
        if self.pair and self.chat:
            yield f"{self.asker}: only one of pair (two texts) and chat (one text) may be true. Set one of them to false"

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        with self._session() as held:
            limit = held.limit(self.max_length)
            rows: list[Row | chat.ChatError] = []
            openings = rollouts.openings or [""] * len(rollouts)
            for row in zip(rollouts.prompts, rollouts.completions, openings, strict=True):
                try:
                    rows.append(self._row(held, *row, limit))
                except chat.ChatError as error:
                    rows.append(error)
            refused = [row for row in rows if isinstance(row, chat.ChatError)]
            if refused and len(refused) == len(rows):
                raise refused[0]
            for refusal in refused:
                logger.warning("%s: %r has no score for a row: %s", self.asker, self.model, refusal)
            scores = iter(self._scores(held, [row for row in rows if isinstance(row, Row)], self.value))
            return [next(scores) if isinstance(row, Row) else None for row in rows]

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[Any] | str:
        read = super()._prompt(tokenizer, prompt)
        if self.pair and not isinstance(read, str):
            raise ValueError(f"{self.asker}: pair needs text prompts, got conversations. Set pair: false")
        return read

    def _row(self, held: Loaded, prompt: Any, completion: str, opening: str, limit: int | None) -> Row:
        prompt = self._prompt(held.tokenizer, prompt)
        if isinstance(prompt, str):
            texts = (prompt, completion) if self.pair else (prompt + completion,)
            return row_of(held.tokenizer, texts, chat=False, limit=limit)
        text = chat.render(held.tokenizer, answered(prompt, completion, opening), training=True)[0]
        return row_of(held.tokenizer, (text,), chat=True, limit=limit)


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [RewardModel]

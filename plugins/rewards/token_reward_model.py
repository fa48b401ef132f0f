"""Per-token rewards by a model: a token classifier with one output (after arXiv:1706.03741).

In the paper a network scores each time step and is trained by a Bradley-Terry model on sums over segments; `model` is such
a network. Departures: time steps are the model's tokens, there is one network instead of an ensemble, and scores are not
normalized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts, Spans

from ._models.token_classifier import TokenModelReward


@dataclass(kw_only=True)
class TokenRewardModel(TokenModelReward):
    """The model's score at each of its own tokens of the completion, as a reward where that token ends.

    The model is an `AutoModelForTokenClassification`, or a causal model's trunk with a value head. It need not share the
    policy's tokenizer. The end-of-sequence token has no text and no reward; an empty completion has total 0.
    """

    name = "token_reward_model"

    value: Literal["logit", "log_odds", "probability"] = "logit"
    """The label's logit, its log-odds against the other labels, or its probability."""

    def __call__(self, rollouts: Rollouts) -> list[Spans | None]:
        found = self.read(rollouts.prompts, rollouts.completions, self.value, rollouts.openings)
        return [None if row is None else Spans([(token.end, token.score) for token in row]) for row in found]


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [TokenRewardModel]

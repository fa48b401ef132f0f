"""A reward for each step by a process reward model (arXiv:2305.20050, in reinforcement learning as in arXiv:2312.08935).

Departure: a step is what `delimiter` ends, not a sentence that annotators or a special token marked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from typing import Annotated, Literal

from annotated_types import MinLen

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts, Spans

from ._token_classifier import Read, TokenClassifierReward


@dataclass(kw_only=True)
class ProcessRewardModel(TokenClassifierReward):
    """What the classifier says at the last character of each step, as a reward there.

    Its one output is the log-odds of a good step; of two outputs (as TRL's PRMTrainer saves) the second one's against the
    first one's. Steps of white space do not count; a completion without any has total 0. Rewards add up over the steps:
    with probabilities, more steps earn more, so limit their number or give `value: logit`.
    """

    name = "process_reward_model"
    labels = frozenset({1, 2})

    delimiter: Annotated[str, MinLen(1)] = "\n\n"
    """What ends a step. The last step is read as if it followed."""
    value: Literal["probability", "logit"] = "probability"
    """The probability that the step is good, or its log-odds as the model gives them."""

    def __call__(self, rollouts: Rollouts) -> list[Spans | None]:
        closed = [text if self._is_closed(text) else text + self.delimiter for text in rollouts.completions]
        found = self.read(rollouts.prompts, closed)
        return [
            None if tokens is None else Spans(list(self._rewards(text, len(own), tokens)))
            for text, own, tokens in zip(closed, rollouts.completions, found, strict=True)
        ]

    def _is_closed(self, text: str) -> bool:
        """Whether nothing but white space follows the last delimiter."""
        return not text.rpartition(self.delimiter)[2].strip()

    def _rewards(self, text: str, length: int, tokens: list[Read]) -> Iterator[tuple[int, float]]:
        """(end, reward) of each step of the closed text that the model saw; no end lies beyond the completion's length."""
        start = 0
        while (at := text.find(self.delimiter, start)) >= 0:
            end = at + len(self.delimiter)
            token = _at(tokens, end) if text[start:at].strip() else None
            if token is not None:
                yield min(end, length), self._reward(token.logit)
            start = end

    def _reward(self, logit: float) -> float:
        if self.value == "logit":
            return logit
        return 1 / (1 + exp(-logit)) if logit >= 0 else exp(logit) / (1 + exp(logit))


def _at(tokens: list[Read], end: int) -> Read | None:
    """The token that holds the character before `end`, else the last one before it; None where the model saw none."""
    holding = next((token for token in tokens if token.start < end <= token.end), None)
    return holding or next((token for token in reversed(tokens) if token.end <= end), None)


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [ProcessRewardModel]

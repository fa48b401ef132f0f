"""Rewards completions that say certain words."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import MinLen

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts


@dataclass(kw_only=True)
class Keyword(RewardSource):
    """The share of `words` that occur in the completion, upper and lower case alike."""

    name = "keyword"

    words: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["because"])
    """What is looked for."""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        texts = [completion.lower() for completion in rollouts.completions]
        return [sum(word.lower() in text for word in self.words) / len(self.words) for text in texts]


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Keyword]

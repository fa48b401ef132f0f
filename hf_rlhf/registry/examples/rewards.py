"""Reward completions on a single line.

Try it: `hf-rlhf train quickstart 'rewards=[{use: one_line}, {use: exact_match}]'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class OneLine(RewardSource):
    """1 for a completion on a single line, 0 for any other."""

    name = "one_line"
    rowwise = True

    blank: float = 0.0
    """Reward of a completion without any text."""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        texts = [completion.strip() for completion in rollouts.completions]
        return [float("\n" not in text) if text else self.blank for text in texts]


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [OneLine]

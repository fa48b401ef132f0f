"""Return minus the greedy completion's (ReMax, arXiv:2310.10505).

The greedy completion of the same prompt is generated separately and is not a row of the batch, so the baseline is
independent of the row and the gradient unbiased. Departure: the return counts from each token on (causality); with one
reward at the end, as in the paper, that is the same. The greedy score includes no KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._tokens import given, reward_to_go

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class ReMax(AdvantageEstimator):
    """Rewards from each token on, minus the score of the greedy completion of the same prompt.

    One row per prompt is enough. Per-step and per-token rewards credit the tokens up to theirs; those of the greedy
    completion count by their sum.
    """

    name = "remax"
    words = "reward to go minus the score of the prompt's greedy completion"
    needs = frozenset({"greedy"})

    def __call__(self, scored: Scored) -> Tensor:
        greedy = given(scored.greedy, "greedy", "remax")
        return (reward_to_go(scored.token_rewards, scored.mask) - greedy.unsqueeze(1)) * scored.mask


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [ReMax]

"""Rewards from each token on: the policy gradient with causality (Sutton et al., 2000).

With gamma < 1 the expected gradient is not that of the discounted return, which would need a further gamma^t; like most
implementations, this plugin omits that factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Fraction

from ._tokens import discounted, reward_to_go

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class RewardToGo(AdvantageEstimator):
    """Discounted sum of the rewards from each token on: G_t = R_t + gamma G_{t+1}, over sampled tokens only.

    Per-step and per-token rewards credit the tokens up to theirs and no later ones.
    """

    name = "reward_to_go"

    gamma: Fraction = 1.0
    """Discount from one sampled token to the next; tool output between them does not discount."""

    def in_words(self) -> str:
        return discounted("reward to go", self.gamma)

    def __call__(self, scored: Scored) -> Tensor:
        return reward_to_go(scored.token_rewards, scored.mask, self.gamma)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [RewardToGo]

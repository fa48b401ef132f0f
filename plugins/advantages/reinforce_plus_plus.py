"""REINFORCE++ (arXiv:2501.03262): reward to go, whitened over all tokens of the rollout.

The paper's KL is `kl: in_reward` with k1, not part of this plugin. Biased at finite N, because mean and variance depend
on the row; long completions count more in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Fraction

from ._tokens import discounted, reward_to_go, whiten_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class ReinforcePlusPlus(AdvantageEstimator):
    """Rewards from each token on, normalized to mean 0 and variance 1 over all tokens; 0 if all are equal.

    Per-step and per-token rewards credit the tokens up to theirs.
    """

    name = "reinforce_plus_plus"
    across_groups = True

    gamma: Fraction = 1.0
    """Discount from one sampled token to the next."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom: 1 divides by the number of tokens minus 1 (verl), 0 by their number (OpenRLHF)."""

    def in_words(self) -> str:
        return f"{discounted('reward to go', self.gamma)}, whitened over all tokens"

    def __call__(self, scored: Scored) -> Tensor:
        to_go = reward_to_go(scored.token_rewards, scored.mask, self.gamma)
        return whiten_tokens(to_go, scored.mask, self.ddof)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [ReinforcePlusPlus]

"""Generalised advantage estimation (arXiv:1506.02438).

The scan steps over the tokens that the policy sampled: discount, lambda and the next value ignore tool output between
them. The value after the last token is 0, also where the completion was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Fraction
from hf_rlhf.batch import Credit

from ._tokens import gae_scan, whiten_tokens

if TYPE_CHECKING:
    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GAE(AdvantageEstimator):
    """A_t = d_t + gamma lam A_{t+1} with d_t = R_t + gamma V_{t+1} - V_t; the critic's targets are A + V.

    With lam = 1 any critic leaves the gradient unbiased; smaller lam trades noise for the critic's error.
    """

    name = "gae"
    needs = frozenset({"values"})

    gamma: Fraction = 1.0
    """Discount from one sampled token to the next."""
    lam: Fraction = 0.95
    """Weight of later steps' errors: 0 is the one-step error, 1 the return minus the value."""
    whiten: bool = False
    """Bring the advantages to mean 0 and (unbiased) variance 1 over all tokens; the critic's targets stay."""

    def __call__(self, scored: Scored) -> Credit:
        if scored.values is None:
            raise ValueError("gae needs values: Scored.values is None; give the recipe a critic")
        advantages = gae_scan(scored.token_rewards, scored.values, scored.mask, self.gamma, self.lam)
        returns = (advantages + scored.values) * scored.mask
        if self.whiten:
            advantages = whiten_tokens(advantages, scored.mask)
        return Credit(advantages=advantages, returns=returns)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GAE]

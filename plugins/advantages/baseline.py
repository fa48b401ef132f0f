"""Reward to go minus a selectable baseline (REINFORCE with baseline; Williams 1992, Greensmith et al. 2004).

A baseline that does not depend on the row's own tokens leaves the expected gradient unchanged and only affects its
variance: `constant`, `ema`, `others_mean`, `greedy` and `critic` are all of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Baseline, Fraction, check_output, choice
from hf_rlhf.batch import Credit

from ._tokens import discounted, reward_to_go

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class WithBaseline(AdvantageEstimator):
    """A_t = G_t - b, where G_t is the discounted sum of the rewards from token t on.

    Per-step and per-token rewards credit the tokens up to theirs. If the baseline is a critic, its targets are G_t.
    """

    name = "baseline"

    baseline: Baseline = choice("others_mean")
    """The baseline b: constant, ema (of earlier rollouts' returns), others_mean (of the group), greedy or critic."""
    gamma: Fraction = 1.0
    """Discount from one sampled token to the next; no baseline except the critic's discounts."""

    def in_words(self) -> str:
        return f"{discounted('reward to go', self.gamma)} minus {self.baseline.in_words()}"

    @property
    def across_groups(self) -> bool:
        """True if the baseline depends on rows of other prompts."""
        return self.baseline.across_groups

    def __call__(self, scored: Scored) -> Tensor | Credit:
        to_go = reward_to_go(scored.token_rewards, scored.mask, self.gamma)
        baseline = check_output("baseline", self.baseline, self.baseline(scored), scored.mask, inputs=vars(scored))
        advantages = (to_go - baseline).masked_fill(scored.mask == 0, 0.0)
        if "values" in self.baseline.needs:
            return Credit(advantages=advantages, returns=to_go)
        return advantages


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [WithBaseline]

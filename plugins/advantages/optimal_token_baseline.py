"""Minimum-variance baseline at each token (arXiv:2602.07078).

The weight of a row at token t is the squared norm of the gradient of its tokens up to t with respect to the logits,
sum_s (1 - 2 p_s + sum_v p_v^2), from the forward pass alone. As in the paper the baseline includes the row itself, which
biases the gradient; `leave_one_out` excludes it and is exact. t counts positions in the completion, tool tokens included, or
with `align: sampled` the tokens that the row sampled, so that answers of tools, whose lengths differ, shift nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._groups import sum_of_group, sum_of_others
from ._tokens import given, reward_to_go

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class OptimalTokenBaseline(AdvantageEstimator):
    """Rewards from token t on, minus their group's mean at t weighted by W_t = sum_{s <= t} (1 - 2 p_s + sum_v p_v^2).

    The mean is over the rows that sampled a token at t; if that is one row, or all weights are 0, the baseline is 0.
    Per-step and per-token rewards credit the tokens up to theirs.
    """

    name = "optimal_token_baseline"
    words = "reward to go minus its group's mean at each token, weighted by squared gradient norms"
    needs = frozenset({"groups", "old_logps", "sum_sq_probs"})

    leave_one_out: bool = False
    """Exclude the row itself from the mean, so that the baseline is independent of it and the gradient unbiased."""
    align: Literal["position", "sampled"] = "position"
    """Tokens of a group that are compared: those at the same `position` of the completion, or those that are the same number
    of tokens `sampled` into it."""

    def __call__(self, scored: Scored) -> Tensor:
        mask, off = scored.mask, scored.mask == 0
        probs = given(scored.old_logps, "old_logps", self.name).masked_fill(off, 0.0).exp()
        squares = given(scored.sum_sq_probs, "sum_sq_probs", self.name).masked_fill(off, 0.0)
        # a rounding error below 0 would flip the sign of a weight
        energy = ((1 - 2 * probs + squares).clamp(min=0) * mask).cumsum(1) * mask
        to_go = reward_to_go(scored.token_rewards, mask)
        place = (mask.cumsum(1) - 1).clamp(min=0).long() if self.align == "sampled" else None
        if place is not None:
            mask, energy, to_go = (x.new_zeros(x.shape).scatter_add(1, place, x) for x in (mask, energy, to_go))
        add = sum_of_others if self.leave_one_out else sum_of_group
        total = add(scored, energy)
        alone = (sum_of_group(scored, mask) <= 1) | (total <= 0)
        baseline = add(scored, energy * to_go) / total.masked_fill(alone, 1.0)
        found = (to_go - baseline.masked_fill(alone, 0.0)) * mask
        return found if place is None else found.gather(1, place) * scored.mask


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [OptimalTokenBaseline]

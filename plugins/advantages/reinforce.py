"""Full return on every token: the plain policy gradient (REINFORCE, Williams 1992), without causality or baseline.

Departure: `gamma` counts only tokens that the policy sampled, so tool output between them does not discount.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Fraction

from ._tokens import discounted

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class Reinforce(AdvantageEstimator):
    """The row's discounted return, on each of its tokens: A_t = sum_s gamma^s R_s.

    Per-step and per-token rewards enter at their tokens and credit every token of the row, later ones included.
    """

    name = "reinforce"

    gamma: Fraction = 1.0
    """Discount per sampled token; the first one counts in full."""

    def in_words(self) -> str:
        return discounted("return", self.gamma)

    def __call__(self, scored: Scored) -> Tensor:
        steps = (scored.mask.cumsum(1) - 1).clamp(min=0)
        discounted = (self.gamma**steps * scored.token_rewards * scored.mask).sum(1, keepdim=True)
        return discounted * scored.mask


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [Reinforce]

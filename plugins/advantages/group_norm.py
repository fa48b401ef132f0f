"""Group-normalised advantages (GRPO, arXiv:2402.03300), with TRL's constants: ddof 1 and eps 1e-4.

Dividing by the deviation weighs prompts by difficulty: the expected gradient is not that of the mean reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GroupNorm(AdvantageEstimator):
    """Return minus its group's mean, over its group's standard deviation, on each token.

    Exactly 0 where all returns of the group are equal or one row remains.
    """

    name = "group_norm"
    needs = frozenset({"groups"})

    eps: Positive = 1e-4
    """Added to the standard deviation, so that nearly equal returns are not blown up (verl: 1e-6)."""

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        centred = (returns - scored.group_mean(returns)).masked_fill(scored.group_is_flat(returns), 0.0)
        normalised = centred / (scored.group_std(returns) + self.eps)
        return normalised[:, None] * scored.mask


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GroupNorm]

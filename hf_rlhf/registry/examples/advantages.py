"""The sign of a completion's return relative to its group.

Try it: `hf-rlhf train quickstart 'advantages={use: group_sign}'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Positive
from hf_rlhf.batch import Scored
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class GroupSign(AdvantageEstimator):
    """+1 above the group's mean, -1 below it, 0 at it."""

    name = "group_sign"
    needs = frozenset({"groups"})

    scale: Positive = 1.0
    """Factor of the signs."""

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        sign = (returns - scored.group_mean(returns)).sign().masked_fill(scored.group_is_flat(returns), 0)
        return self.scale * sign.unsqueeze(1) * scored.mask


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GroupSign]

"""Group-normalized advantages (GRPO, arXiv:2402.03300), with TRL's constants: ddof 1 and eps 1e-4.

Dividing by the std weights prompts by difficulty: the expected gradient is not that of the mean reward. Dialects:
verl eps 1e-6, NeMo-RL eps 1e-6 and `statistics: others`, open-instruct ddof 0 and eps 1e-8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Positive

from ._groups import GroupEstimator, centred, others

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GroupNorm(GroupEstimator):
    """Return minus its group's mean, over its group's standard deviation, on each token.

    Exactly 0 if all returns of the group are equal or one row remains. Per-step and per-token rewards count by their sum.
    """

    name = "group_norm"

    eps: Positive = 1e-4
    """Added to the standard deviation, so that nearly equal returns are not blown up (verl: 1e-6)."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of the std: 1 divides by rows minus 1 (TRL, verl), 0 by rows (open-instruct)."""
    statistics: Literal["group", "others"] = "group"
    """Rows over which mean and std are taken: the whole `group`, or the `others` in it (NeMo-RL). If the others are all
    equal, their mean is subtracted without a division."""

    def in_words(self) -> str:
        if self.statistics == "others":
            return "return minus the mean of the group's other rows, over their standard deviation"
        return "return minus its group's mean, over its group's standard deviation"

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        if self.statistics == "group":
            return centred(scored, returns) / (scored.group_std(returns, self.ddof) + self.eps)
        rest, there = others(scored, returns)
        rows = there.sum(1)
        mean = rest.sum(1) / rows.clamp(min=1)
        deviation = (rest - mean.unsqueeze(1)).masked_fill(~there, 0.0)
        std = ((deviation**2).sum(1) / (rows - self.ddof).clamp(min=1)).sqrt()
        highest = rest.masked_fill(~there, -math.inf).amax(1)
        lowest = rest.masked_fill(~there, math.inf).amin(1)
        scale = (std + self.eps).masked_fill(highest == lowest, 1.0)
        return ((returns - mean) / scale).masked_fill(scored.group_is_flat(returns), 0.0)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GroupNorm]

"""Leave-one-out baseline: the mean return of the group's other rows (as in RLOO, arXiv:2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class OthersMean(Baseline):
    """(sum of the group's returns - r) / (G - 1); r itself if all are equal, 0 if one row remains.

    Per-step and per-token rewards count by their sum, after the KL in the reward.
    """

    name = "others_mean"
    words = "the mean return of the group's other rows"
    needs = frozenset({"groups"})

    def __call__(self, scored: Scored) -> Tensor:
        returns, rows = scored.returns(), scored.group_size()
        mean = (scored.group_sum(returns) - returns) / (rows - 1).clamp(min=1)
        # without rounding: equal returns must leave exactly 0
        equal = returns.where(scored.group_is_flat(returns), mean)
        return equal.masked_fill(rows == 1, 0.0).unsqueeze(1)


@hookimpl
def baseline() -> list[type[Baseline]]:
    return [OthersMean]

"""Leave-one-out advantages (RLOO, arXiv:2402.14740): the others' mean as baseline, so no bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class LeaveOneOut(AdvantageEstimator):
    """Return minus the mean return of the group's other rows, on each token: G/(G-1) (r - mean).

    Exactly 0 where all returns of the group are equal or one row remains.
    """

    name = "leave_one_out"
    needs = frozenset({"groups"})

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        centred = (returns - scored.group_mean(returns)).masked_fill(scored.group_is_flat(returns), 0.0)
        rows = scored.group_size()
        left_out = centred * (rows / (rows - 1).clamp(min=1)).to(returns.dtype)
        return left_out[:, None] * scored.mask


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [LeaveOneOut]

"""Leave-one-out advantages (RLOO, arXiv:2402.14740): the others' mean as an unbiased baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._groups import GroupEstimator, centred

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class LeaveOneOut(GroupEstimator):
    """Return minus the mean return of the group's other rows, on each token: G/(G-1) (r - mean).

    Exactly 0 if all returns of the group are equal or one row remains. Per-step and per-token rewards count by their sum.
    """

    name = "leave_one_out"
    words = "return minus the mean return of the group's other rows"

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        # in the returns' precision: a quotient of counts would be float32
        rows = scored.group_size().to(returns.dtype)
        return centred(scored, returns) * rows / (rows - 1).clamp(min=1)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [LeaveOneOut]

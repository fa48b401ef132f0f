"""Group-centred advantages (Dr. GRPO, arXiv:2503.20783).

The mean includes the row's own return, so the expected gradient is (1 - 1/G) times the policy gradient; `leave_one_out`
gives the full one. A KL in the loss therefore counts G/(G-1) times as much as its beta says.
"""

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
class GroupMean(GroupEstimator):
    """Return minus its group's mean, on each token; exactly 0 if all are equal or one row remains.

    Per-step and per-token rewards count by their sum.
    """

    name = "group_mean"
    words = "return minus its group's mean"

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        return centred(scored, returns)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GroupMean]

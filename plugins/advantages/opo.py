"""Optimal baseline by length (OPO, arXiv:2505.23585).

The baseline of least variance weighs each return by the squared norm of its row's gradient, for which the paper takes the
row's length. As in the paper the own row is in it, which biases the gradient; `leave_one_out` leaves it out and is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._groups import GroupEstimator, sum_of_group, sum_of_others

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class OPO(GroupEstimator):
    """Return minus its group's mean weighted by length, sum_j T_j r_j / sum_j T_j, on each token.

    Exactly 0 where all returns of the group are equal or one row remains. Rewards by step or token count by their sum;
    T counts sampled tokens.
    """

    name = "opo"

    leave_one_out: bool = False
    """Leave the own row out of the mean: then the baseline does not depend on it, and the gradient is unbiased."""

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        lengths = scored.mask.sum(1)
        add = sum_of_others if self.leave_one_out else sum_of_group
        baseline = add(scored, lengths * returns) / add(scored, lengths).clamp(min=1)
        return (returns - baseline).masked_fill(scored.group_is_flat(returns), 0.0)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [OPO]

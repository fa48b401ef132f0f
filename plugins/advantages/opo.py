"""Length-weighted optimal baseline (OPO, arXiv:2505.23585).

The minimum-variance baseline weights each return by the squared norm of its row's gradient, which the paper approximates
by the row's length. As in the paper it includes the row itself, which biases the gradient; `leave_one_out` excludes it and
is exact.
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

    Exactly 0 if all returns of the group are equal or one row remains. Per-step and per-token rewards count by their sum;
    T counts sampled tokens.
    """

    name = "opo"

    leave_one_out: bool = False
    """Exclude the row itself from the mean, so that the baseline is independent of it and the gradient unbiased."""

    def in_words(self) -> str:
        rows = "the group's other rows" if self.leave_one_out else "its group"
        return f"return minus the mean of {rows}, weighted by length"

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        lengths = scored.mask.sum(1)
        add = sum_of_others if self.leave_one_out else sum_of_group
        baseline = add(scored, lengths * returns) / add(scored, lengths).clamp(min=1)
        return (returns - baseline).masked_fill(scored.group_is_flat(returns), 0.0)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [OPO]

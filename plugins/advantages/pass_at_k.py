"""Margin of the best row over the second (arXiv:2503.19595): pass@K with K the size of the group.

The baseline of each row is the best of the others, so only the best row has a nonzero advantage, and the expected
gradient is exactly (1/G) grad E[max of G returns]: pass@G for returns of 0 and 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._groups import GroupEstimator, others

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class PassAtK(GroupEstimator):
    """Return minus the second best return for the group's best row, on each token; 0 for the others.

    0 for all rows if the best is tied, and for a row that remains alone in its group. Per-step and per-token rewards count
    by their sum.
    """

    name = "pass_at_k"

    normalise: Literal["none", "std"] = "none"
    """`std`: divide the margin by the group's std (ddof 1), at most sqrt(G); the gradient is then not that of pass@G."""

    def in_words(self) -> str:
        over = ", over its group's standard deviation" if self.normalise == "std" else ""
        return f"a group's best return minus its second best, for the best row alone{over}"

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        rest, there = others(scored, returns)
        flat = scored.group_is_flat(returns)
        lead = (returns - rest.masked_fill(~there, -math.inf).amax(1)).clamp(min=0).masked_fill(flat, 0.0)
        if self.normalise == "none":
            return lead
        return lead / scored.group_std(returns).masked_fill(flat, 1.0)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [PassAtK]

"""Group mean, batch std (Lite PPO, arXiv:2508.08221): prompts are not reweighted by difficulty.

Every prompt of a rollout is divided by the same number, so prompts keep the weights they have in `group_mean`. Biased at
finite N, because the std depends on the row. Departure: none of the paper's other techniques; its loss is
`aggregation: token_mean`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator, Positive

from ._groups import GroupEstimator, centred

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GroupMeanBatchStd(GroupEstimator):
    """Return minus its group's mean, over the standard deviation of all returns of the rollout, on each token.

    Exactly 0 if all returns of the group are equal or one row remains. Per-step and per-token rewards count by their sum.
    """

    name = "group_mean_batch_std"
    words = "return minus its group's mean, over the rollout's standard deviation"
    across_groups = True

    eps: Positive = 1e-4
    """Added to the standard deviation, so that a rollout of nearly equal returns is not blown up."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of the std: 1 divides by the rollout's rows minus 1, 0 by its rows."""

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        variance = ((returns - returns.mean()) ** 2).sum() / max(len(returns) - self.ddof, 1)
        return centred(scored, returns) / (variance.sqrt() + self.eps)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GroupMeanBatchStd]

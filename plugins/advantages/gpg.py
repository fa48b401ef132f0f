"""Group policy gradient (GPG, arXiv:2504.02546), with the paper's F_norm = 1.

Rows of groups without signal contribute nothing to the gradient; the factor N / N_valid gives their weight to the others,
so that a rollout's gradient does not shrink with the share of such groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._groups import GroupEstimator, centred

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GPG(GroupEstimator):
    """Return minus its group's mean, times N / N_valid, on each token; N_valid counts rows in groups with max != min.

    Exactly 0 if all returns of the group are equal or one row remains. Per-step and per-token rewards count by their sum.
    """

    name = "gpg"
    across_groups = True

    dialect: Literal["paper", "verl"] = "paper"
    """`paper`: N / N_valid; `verl`: N over the number of nonzero returns."""

    def in_words(self) -> str:
        scale = "rows with a signal" if self.dialect == "paper" else "returns other than 0"
        return f"return minus its group's mean, over the share of {scale}"

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        valid = returns != 0 if self.dialect == "verl" else ~scored.group_is_flat(returns)
        return centred(scored, returns) * len(returns) / valid.sum().clamp(min=1)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GPG]

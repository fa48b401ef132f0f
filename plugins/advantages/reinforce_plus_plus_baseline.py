"""REINFORCE++ with the group's mean as baseline (arXiv:2501.03262), whitened over all tokens of the rollout.

The paper's KL is `kl: in_loss` with k2, not part of this plugin. Biased at finite N, because mean and variance depend on
the row; long completions count more in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._groups import GroupEstimator, centred
from ._tokens import whiten_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class ReinforcePlusPlusBaseline(GroupEstimator):
    """Return minus its group's mean on each token, normalized to mean 0 and variance 1 over all tokens.

    Groups of equal returns enter the whitening with 0. Per-step and per-token rewards count by their sum.
    """

    name = "reinforce_plus_plus_baseline"
    words = "return minus its group's mean, whitened over all tokens"
    across_groups = True

    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom: 1 divides by the number of tokens minus 1 (verl), 0 by their number (OpenRLHF)."""

    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        return centred(scored, returns)

    def __call__(self, scored: Scored) -> Tensor:
        return whiten_tokens(super().__call__(scored), scored.mask, self.ddof)


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [ReinforcePlusPlusBaseline]

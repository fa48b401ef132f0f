"""Filter for prompts whose completions all score the same (dynamic sampling, DAPO, arXiv:2503.14476).

Compares the weighted total of the rewards before any KL, as in the paper: after a KL in the reward no two returns are
equal. Set `resample` to refill the rollout as in the paper; without it the rollout gets smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Filter

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class ZeroVariance(Filter):
    """Keeps the rows of groups with at least two different scores; a group of one row is dropped.

    A reward source that does not apply to a row contributes nothing to its total.
    """

    name = "zero_variance"
    words = "groups of equal scores are dropped"
    needs = frozenset({"groups", "scores"})
    across_groups = False

    def __call__(self, scored: Scored) -> Tensor:
        return ~scored.group_is_flat(scored.totals())


@hookimpl
def filters() -> list[type[Filter]]:
    return [ZeroVariance]

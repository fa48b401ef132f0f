"""Value baseline: the critic's value of the state in which each token was sampled (Sutton et al., 2000).

With the estimator `baseline` this is `gae` with lam = 1; the critic's targets are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class CriticValue(Baseline):
    """V_t, computed at rollout time; any values leave the gradient unbiased."""

    name = "critic"
    words = "the critic's value"
    needs = frozenset({"values"})

    def __call__(self, scored: Scored) -> Tensor:
        if scored.values is None:
            raise ValueError("baseline.critic needs values: Scored.values is None. Give the recipe a critic")
        return scored.values


@hookimpl
def baseline() -> list[type[Baseline]]:
    return [CriticValue]

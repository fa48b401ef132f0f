"""The KL of the next token's distributions, summed over the whole vocabulary instead of sampled.

In the loss its gradient is that of the KL state by state, the states being those that were visited; without the noise of
the sampled token. It has no sequence level: the completions that could have been are not there to be summed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Exact(KLEstimator):
    """sum over V of p (log p - log p_ref): exact in each state; a token that the policy never gives adds 0."""

    name = "exact"
    needs = frozenset({"full_distribution"})

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        difference = (logps - ref_logps).masked_fill(logps == float("-inf"), 0.0)
        return (logps.exp() * difference).sum(-1)


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [Exact]

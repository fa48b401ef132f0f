"""Exact KL between the next-token distributions, summed over the whole vocabulary instead of sampled.

In the loss its gradient is that of the KL at each visited state, without the variance of the sampled token. It has no
sequence level, because the sum over all completions is intractable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

from ._distributions import OverDistributions, reverse

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Exact(OverDistributions):
    """sum over V of p (log p - log p_ref): exact in each state; tokens with p = 0 contribute 0."""

    name = "exact"
    words = "exact"

    def divergence(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        return reverse(logps, ref_logps)


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [Exact]

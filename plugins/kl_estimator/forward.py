"""Exact forward KL, from the reference to the policy, between the next-token distributions.

It covers what the reference does where the reverse KL (`exact`) seeks one of its modes. In the loss its gradient is the cross
entropy to the reference's distribution in each visited state: knowledge distillation (arXiv:1503.02531) at those states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

from ._distributions import OverDistributions, forward

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Forward(OverDistributions):
    """sum over V of p_ref (log p_ref - log p): exact in each state; tokens with p_ref = 0 contribute 0."""

    name = "forward"
    words = "forward"

    def divergence(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        return forward(logps, ref_logps)


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [Forward]

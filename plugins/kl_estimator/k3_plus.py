"""Value of k3 with the gradient of k2 (verl's straight-through `low_var_kl+`).

Its value is k3's: unbiased and nonnegative. Its expected gradient in the loss is k2's: on-policy at level sequence exactly
that of the KL, at level token the reverse KL's, state by state. In the reward, where only values count, it is k3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class K3Plus(KLEstimator):
    """exp(-l) - 1 + l with l = log p - log p_ref, and the slope l of l^2 / 2."""

    name = "k3_plus"
    stops_gradient = True

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        difference = logps - ref_logps
        fixed = difference.detach()
        k3 = (-fixed).expm1() + fixed
        # a zero that carries the slope, so that the value stays exactly k3's
        return k3 + fixed * (difference - fixed)


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [K3Plus]

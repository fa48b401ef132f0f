"""Log-ratio with a control variate (k3 of http://joschu.net/blog/kl-approx.html; GRPO, arXiv:2402.03300).

Its value is unbiased; its gradient in the loss is the forward KL's, state by state. It grows as exp(-l) for tokens that
are more likely under the reference than under the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class K3(KLEstimator):
    """exp(-l) - 1 + l with l = log p - log p_ref: unbiased and nonnegative."""

    name = "k3"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        difference = logps - ref_logps
        # expm1 keeps the digits that exp(-l) - 1 loses near l = 0, the usual case
        return (-difference).expm1() + difference


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [K3]

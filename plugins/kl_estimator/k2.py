"""Half the squared log-ratio (k2 of http://joschu.net/blog/kl-approx.html).

In the loss at level sequence its expected gradient is exactly that of the KL, on-policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class K2(KLEstimator):
    """l^2 / 2 with l = log p - log p_ref: nonnegative, biased as a value."""

    name = "k2"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        return (logps - ref_logps) ** 2 / 2


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [K2]

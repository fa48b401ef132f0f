"""Log-ratio, the unbiased estimate of the KL (k1 of http://joschu.net/blog/kl-approx.html).

Use it in the reward, where it gives the exact gradient of the KL; in the loss its expected gradient is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class K1(KLEstimator):
    """l = log p - log p_ref: unbiased, of either sign, high variance."""

    name = "k1"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        return logps - ref_logps


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [K1]

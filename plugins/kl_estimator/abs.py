"""Absolute log-ratio: an estimate of a distance rather than of the KL.

In the loss its expected gradient is that of the L1 distance between the two distributions (twice the total variation),
state by state at level token; its gradient does not grow with the distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator

if TYPE_CHECKING:
    from torch import Tensor


ROUNDING = 64
"""Units in the last place within which two computations of a log-prob agree."""


@dataclass(kw_only=True)
class Abs(KLEstimator):
    """|l| with l = log p - log p_ref: nonnegative, biased as a value; its slope is -1, 1, or 0 at equality.

    Log-probs that differ by rounding alone count as equal; otherwise a policy equal to the reference had a random slope.
    """

    name = "abs"

    def __call__(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        import torch

        difference = (logps - ref_logps).abs()
        rounding = ROUNDING * torch.finfo(logps.dtype).eps * logps.detach().abs().clamp(min=1)
        return difference.masked_fill(difference.detach() <= rounding, 0.0)


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [Abs]

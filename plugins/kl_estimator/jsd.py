"""Generalized Jensen-Shannon divergence of the next-token distributions (GKD, arXiv:2306.13649, equation 3).

With p the policy's distribution, q the reference's, and m = beta q + (1 - beta) p their mixture, it is
beta KL(q || m) + (1 - beta) KL(p || m): finite whatever the supports. At beta 0 and 1 it is the forward and the reverse KL.
Those are the limits of the divergence over beta (1 - beta), which `normalize` gives; the divergence itself tends to 0 there,
and jumps, as TRL's does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Fraction, KLEstimator

from ._distributions import IMPOSSIBLE, OverDistributions, forward, reverse

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm

NEAR = 0.05
"""Distance from 0 or 1 within which the divergence is far below the KL that it jumps to."""
LARGE = 60.0
"""Log-ratio whose exponential is finite in float32; beyond it the mixture is its larger part alone."""


@dataclass(kw_only=True)
class JSD(OverDistributions):
    """beta KL(q || m) + (1 - beta) KL(p || m), with m = beta q + (1 - beta) p."""

    name = "jsd"
    words = "jsd {beta:g}"

    beta: Fraction = 0.5
    """The reference's weight in the mixture; 0: forward KL, 1: reverse KL."""
    normalize: bool = False
    """Divide by beta (1 - beta), so that the divergence is continuous in beta up to both ends."""

    def in_words(self) -> str:
        return super().in_words() + (", normalized" if self.normalize else "")

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if not self.normalize and 0 < min(self.beta, 1 - self.beta) < NEAR:
            yield (
                f"jsd with beta={self.beta:g} is about {self.beta * (1 - self.beta):.2g} of the KL that beta={self.beta:.0f} "
                "gives: the divergence jumps there. normalize=true makes it continuous"
            )

    def divergence(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        if self.beta in (0, 1):
            return (reverse if self.beta else forward)(logps, ref_logps)
        p, q = logps.clamp(min=IMPOSSIBLE), ref_logps.clamp(min=IMPOSSIBLE)
        of_reference = -(q.exp() * log_mixture(1 - self.beta, p - q)).sum(-1)
        of_policy = -(p.exp() * log_mixture(self.beta, q - p)).sum(-1)
        value = self.beta * of_reference + (1 - self.beta) * of_policy
        return value / (self.beta * (1 - self.beta)) if self.normalize else value


def log_mixture(share: float, log_ratio: Tensor) -> Tensor:
    """Return log(1 - share + share exp(log_ratio)), to the last digits for small shares, and without overflow."""
    import torch

    usual = (share * log_ratio.clamp(max=LARGE).expm1()).log1p()
    return torch.where(log_ratio <= LARGE, usual, log_ratio + math.log(share))


@hookimpl
def kl_estimator() -> list[type[KLEstimator]]:
    return [JSD]

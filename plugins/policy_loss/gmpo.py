"""Geometric mean of a row's clipped ratios (GMPO, arXiv:2507.20673), which is robust to outliers.

The paper's mean over rows of one term each is `aggregation: seq_mean_token_mean`. Departure: the paper gives a row one
advantage; if tokens differ, each has its own, whose sign selects its clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

from ._clip import HIGH, LOW
from ._ratio import LIMIT, log_ratio, row_mean, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class GMPO(PolicyLoss):
    """-exp(mean over the row of s min(s d, s clip(d, -epsilon_low, epsilon_high))) A, d = log p - log p_old, s = sign A.

    A token without advantage counts as ratio 1.
    """

    name = "gmpo"
    words = "geometric mean of the row's ratios, each log-ratio clipped to [-{epsilon_low:g}, {epsilon_high:g}]"
    metrics = (LOW, HIGH)
    zero_without_advantage = True

    epsilon_low: Positive = 0.4
    """Distance below 0 at which the log-ratio of a token with A < 0 is clipped and its gradient becomes 0."""
    epsilon_high: Positive = 0.4
    """Distance above 0 at which the log-ratio of a token with A > 0 is clipped and its gradient becomes 0."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from unbound(algorithm, f"epsilon_low {self.epsilon_low:g} and epsilon_high {self.epsilon_high:g}")

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        d, sign = log_ratio(logps, old_logps, mask).clamp(max=LIMIT), advantages.sign()
        clipped = sign * (sign * d).minimum(sign * d.clamp(-self.epsilon_low, self.epsilon_high))
        loss = -(row_mean(clipped, mask).exp() * advantages) * mask
        low, high = (advantages < 0) & (d < -self.epsilon_low), (advantages > 0) & (d > self.epsilon_high)
        return loss, {"clip_frac/low": low.to(mask.dtype) * mask, "clip_frac/high": high.to(mask.dtype) * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [GMPO]

"""REINFORCE weighed by a smooth kernel of the row's ratio (VESPO, arXiv:2602.10693), without length normalisation.

phi(w) = w^k exp(lambda (1 - w)) is 1 at w = 1, fades for rows that became unlikely (w^k) and for rows that became likelier
(the exponential), and is largest at w = k / lambda. w is the ratio to the behaviour policy: with `anchor: sampler` to the
sampler, as in the paper; then a rollout correction would count the mismatch twice and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import NonNegative, PolicyLoss, Positive

from ._anchor import Anchored
from ._ratio import log_ratio, unbound

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class VESPO(Anchored):
    """-sg(phi(w)) A log p with w = exp(sum over the row of log p - log p_old); k and lambda by the sign of A."""

    name = "vespo"
    metrics = (Metric("row_weight", "weight", "what a row is weighed with, mean over tokens", when="step"),)
    zero_without_advantage = True
    stops_gradient = True

    k_positive: NonNegative = 2.0
    """Power of w where A >= 0: how fast rows that became unlikely fade."""
    lambda_positive: Positive = 3.0
    """Decay in w where A >= 0: how fast rows that became likelier fade."""
    k_negative: NonNegative = 3.0
    """Power of w where A < 0."""
    lambda_negative: Positive = 2.0
    """Decay in w where A < 0."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.anchor == "sampler" and "sampler_logps" in algorithm.rollout_correction.needs:
            yield (
                f"anchor=sampler already weighs each row by its ratio to the sampler, and rollout_correction="
                f"{algorithm.rollout_correction.name} would do so again: set rollout_correction.use=none, or "
                "policy_loss.anchor=old"
            )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.anchor == "old":
            yield from unbound(algorithm, "k and lambda")

    def __call__(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        sampler_logps: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        log_w = log_ratio(logps.detach(), self.anchored(old_logps, sampler_logps), mask).sum(1, keepdim=True)
        good = advantages >= 0
        k = torch.where(good, self.k_positive, self.k_negative).to(log_w.dtype)
        decay = torch.where(good, self.lambda_positive, self.lambda_negative).to(log_w.dtype)
        weight = (k * log_w - decay * log_w.expm1()).exp()
        return -(weight * advantages * logps.masked_fill(mask == 0, 0.0)) * mask, {"row_weight": weight * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [VESPO]

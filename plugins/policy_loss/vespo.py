"""REINFORCE weighted by a smooth kernel of the row's ratio (VESPO, arXiv:2602.10693), without length normalization.

phi(w) = w^k exp(lambda (1 - w)) is 1 at w = 1, decays for rows that became less likely (w^k) and for rows that became more
likely (the exponential), and is largest at w = k / lambda. w is the ratio to the behavior policy: with `anchor: sampler` to
the sampler, as in the paper; a rollout correction would then count the mismatch twice and is rejected.
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
    words = "policy gradient weighted by a smooth function of the row's ratio"
    metrics = (Metric("row_weight", "weight", "weight of a row, mean over tokens", when="step"),)
    zero_without_advantage = True
    stops_gradient = True

    k_positive: NonNegative = 2.0
    """Power of w for A >= 0; larger values discount rows that became less likely faster."""
    lambda_positive: Positive = 3.0
    """Decay in w for A >= 0; larger values discount rows that became more likely faster."""
    k_negative: NonNegative = 3.0
    """Power of w for A < 0."""
    lambda_negative: Positive = 2.0
    """Decay in w for A < 0."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.anchor == "sampler" and "sampler_logps" in algorithm.rollout_correction.needs:
            yield (
                f"rollout_correction must be none with anchor=sampler, which already weights each row by its ratio to the "
                f"sampler, got {algorithm.rollout_correction.name}. Set rollout_correction.use=none or policy_loss.anchor=old"
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

"""Ratio of the policy to the rollout policy, in forms that do not overflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm

LIMIT = 20.0
"""Upper bound of log-ratios, without gradient beyond it: float32 overflows at e^88, and no clip is near e^20."""


def log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """Return log p - log p_old (B, T), set to 0 off the mask, because an overflow would survive multiplication by 0."""
    return (logps - old_logps).masked_fill(mask == 0, 0.0)


def bounded_exp(log_ratios: Tensor) -> Tensor:
    """Return the ratio p / p_old of log-ratios, at most e^LIMIT."""
    return log_ratios.clamp(max=LIMIT).exp()


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return each row's mean over the mask, (B, T) -> (B, 1); 0 for a row without sampled tokens."""
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def kl_from_old(log_ratios: Tensor) -> Tensor:
    """Estimate KL(old || new) from samples of the old policy: rho - 1 - log rho >= 0, unbiased, with gradient 0 at rho = 1."""
    bounded = log_ratios.clamp(max=LIMIT)
    return bounded.expm1() - bounded


def unbound(algorithm: Algorithm, settings: str) -> Iterator[str]:
    """Yield a remark if `settings` bind only off-policy and there is one optimizer step per rollout."""
    if algorithm.steps_per_rollout == 1:
        yield (
            f"{settings} never bind, because the ratio stays 1 with one optimizer step per rollout "
            "(update.mini_batches x update.epochs)"
        )

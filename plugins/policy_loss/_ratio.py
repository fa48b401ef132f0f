"""The ratio of the policy to the one that rolled out, in forms that do not overflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm

LIMIT = 20.0
"""A log-ratio above this counts as this, without gradient: float32 overflows at e^88, and no clip is near e^20."""


def log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """(B, T) each -> (B, T): log p - log p_old, 0 off the mask, where an overflow would survive the multiplication by 0."""
    return (logps - old_logps).masked_fill(mask == 0, 0.0)


def bounded_exp(log_ratios: Tensor) -> Tensor:
    """The ratio p / p_old of log-ratios, at most e^LIMIT."""
    return log_ratios.clamp(max=LIMIT).exp()


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1): each row's mean over the mask; 0 for a row without sampled tokens."""
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def kl_from_old(log_ratios: Tensor) -> Tensor:
    """KL(old || new) from samples of the old policy: rho - 1 - log rho >= 0, unbiased under it; its gradient at 1 is 0."""
    bounded = log_ratios.clamp(max=LIMIT)
    return bounded.expm1() - bounded


def unbound(algorithm: Algorithm, settings: str) -> Iterator[str]:
    """A remark where `settings` only bind off-policy and every rollout feeds one optimizer step."""
    if algorithm.steps_per_rollout == 1:
        yield (
            f"{settings} never bind, as the ratio stays 1 with one optimizer step per rollout "
            "(update.mini_batches x update.epochs)"
        )

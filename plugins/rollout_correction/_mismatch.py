"""How far the sampler's policy is from the trainer's, as a log-ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_ratio(old_logps: Tensor, sampler_logps: Tensor, mask: Tensor, level: str) -> Tensor:
    """(N, T) each -> (N, T) log p_trainer - log p_sampler of each token, or the row's sum on each of its tokens.

    0 off the mask at level token. Without gradient.
    """
    mismatch = (old_logps - sampler_logps).masked_fill(mask == 0, 0.0).detach()
    return mismatch.sum(1, keepdim=True).expand_as(mismatch) if level == "sequence" else mismatch

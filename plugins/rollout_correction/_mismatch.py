"""Log-ratio of the trainer's policy to the sampler's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_ratio(old_logps: Tensor, sampler_logps: Tensor, mask: Tensor, level: str) -> Tensor:
    """Return log p_trainer - log p_sampler (N, T) of each token, or at level sequence the row's sum on each of its tokens.

    0 off the mask at level token. Detached.
    """
    mismatch = (old_logps - sampler_logps).masked_fill(mask == 0, 0.0).detach()
    return mismatch.sum(1, keepdim=True).expand_as(mismatch) if level == "sequence" else mismatch

"""Truncated importance sampling between sampler and trainer (Espeholt et al., arXiv:1802.01561; for language models Yao et
al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").

Uncorrected, tokens that are more likely under the sampler than under the trainer are trained on too often. At level
sequence the correction is exact where `c` does not bind; at level token each token is corrected as if all earlier ones
came from the trainer's policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from hf_rlhf import hookimpl
from hf_rlhf.axes import RolloutCorrection

from ._mismatch import log_ratio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Truncated(RolloutCorrection):
    """Multiplies each token's loss by min(p_trainer / p_sampler, c)."""

    name = "truncated"
    words = "loss weighted by the {level}'s ratio to the sampler, at most {c:g}"

    c: Annotated[float, Ge(1)] = 2.0
    """Largest factor."""
    level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole row on each of its tokens."""

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        mismatch = log_ratio(old_logps, sampler_logps, mask, self.level)
        return mismatch.clamp(max=math.log(self.c)).exp() * mask  # bounded before exp: no overflow


@hookimpl
def rollout_correction() -> list[type[RolloutCorrection]]:
    return [Truncated]

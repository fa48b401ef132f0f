"""Importance sampling between sampler and trainer that masks large mismatches (IcePop, arXiv:2510.18855).

With `level: sequence`, `low: 0` it masks whole rows as in Liu et al. 2025, "When speed kills stability".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from hf_rlhf import hookimpl
from hf_rlhf.axes import Fraction, RolloutCorrection

from ._mismatch import log_ratio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Masked(RolloutCorrection):
    """Multiplies each token's loss by p_trainer / p_sampler if that is within [low, c], by 0 otherwise."""

    name = "masked"
    words = "loss weighted by the {level}'s ratio to the sampler, 0 outside [{low:g}, {c:g}]"

    low: Fraction = 0.5
    """Smallest ratio kept; 0 sets no lower bound."""
    c: Annotated[float, Ge(1)] = 5.0
    """Largest ratio kept."""
    level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole row on each of its tokens."""

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        mismatch = log_ratio(old_logps, sampler_logps, mask, self.level)
        low, high = math.log(self.low) if self.low else -math.inf, math.log(self.c)
        kept = (mismatch >= low) & (mismatch <= high)
        return mismatch.clamp(max=high).exp() * kept * mask  # bounded before exp: no overflow


@hookimpl
def rollout_correction() -> list[type[RolloutCorrection]]:
    return [Masked]

"""Drop tokens on which the sampler and the trainer disagree.

Try it: `hf-rlhf train quickstart rollout.decode_dtype=bfloat16 'rollout_correction={use: drop_far}'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Positive, RolloutCorrection
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class DropFar(RolloutCorrection):
    """1 where sampler and trainer give the token a probability within a factor of each other, 0 elsewhere."""

    name = "drop_far"

    factor: Positive = 2.0
    """Largest factor between the two probabilities."""

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        ratio = ((old_logps - sampler_logps) * mask).exp()
        return ((ratio < self.factor) & (ratio > 1 / self.factor)) * mask


@hookimpl
def rollout_correction() -> list[type[RolloutCorrection]]:
    return [DropFar]

"""No correction: the sampler's log-probs are assumed to equal the trainer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import RolloutCorrection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class NoCorrection(RolloutCorrection):
    """Multiplies every token's loss by 1."""

    name = "none"
    needs = frozenset()

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        return mask.new_ones(mask.shape)


@hookimpl
def rollout_correction() -> list[type[RolloutCorrection]]:
    return [NoCorrection]

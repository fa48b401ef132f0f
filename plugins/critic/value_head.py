"""A value head on the policy's own trunk: one forward for log-probs and values (as in A2C, arXiv:1602.01783, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Critic, Fraction, TrainedCritic

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hf_rlhf.algorithm import Algorithm


@dataclass(kw_only=True)
class ValueHead(TrainedCritic):
    """Reads a linear value off the hidden state from which each token is predicted."""

    name = "value_head"
    shares_forward = True

    trunk_gradient: Fraction = 1.0
    """Factor of the value loss's gradient into the trunk; 0 stops it, so that only the head learns values."""

    def build(self, policy: PreTrainedModel, algorithm: Algorithm) -> nn.Module:
        from ._modules import TrunkHead

        return TrunkHead(policy, self.trunk_gradient)


@hookimpl
def critic() -> list[type[Critic]]:
    return [ValueHead]

"""Value head on the policy's trunk: one forward for log-probs and values (as in A3C, arXiv:1602.01783, section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Critic, Fraction, TrainedCritic

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class ValueHead(TrainedCritic):
    """Predicts a value from the hidden state that predicts each token; starts at 0."""

    name = "value_head"
    words = "a value head on the policy"
    shares_forward = True

    trunk_gradient: Fraction = 1.0
    """Factor on the value loss's gradient into the trunk; 0 stops it, so that only the head learns values."""

    layers: Annotated[int, Ge(0)] = 0
    """Hidden layers of the head; 0 makes it linear."""
    width: Count | None = None
    """Units of each hidden layer; None: the width of the hidden state."""
    activation: Literal["relu", "tanh", "gelu", "silu"] = "relu"
    """Activation after each hidden layer."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        changed = {"width": self.width is not None, "activation": self.activation != "relu"}
        if self.layers == 0 and any(changed.values()):
            names = ", ".join(name for name, set_ in changed.items() if set_)
            yield f"{names} has no effect on a linear head: set layers=1 or more"

    def build(self, policy: PreTrainedModel, algorithm: Algorithm) -> nn.Module:
        from ._modules import TrunkHead

        return TrunkHead(policy, self.trunk_gradient, self.layers, self.width, self.activation)


@hookimpl
def critic() -> list[type[Critic]]:
    return [ValueHead]

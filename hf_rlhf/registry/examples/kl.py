"""A KL penalty in the loss with a free budget.

Try it: `hf-rlhf train quickstart 'kl=[{use: in_loss_beyond}]'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator, KLPlacement, NonNegative, choice
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class InLossBeyond(KLPlacement):
    """beta (kl - free) in the loss where the KL exceeds `free`, and nothing below."""

    name = "in_loss_beyond"
    places = frozenset({"loss"})

    beta: NonNegative = 0.1
    """Loss added per nat beyond `free`."""
    free: NonNegative = 0.01
    """KL that costs nothing, in nats."""
    estimator: KLEstimator = choice("k3")
    """KL estimator; its gradient is what counts."""

    def loss_penalty(self, kl: Tensor) -> Tensor:
        return self.beta * (kl - self.free).clamp(min=0)


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [InLossBeyond]

"""A quadratic penalty in place of clipping.

Try it: `hf-rlhf train quickstart 'policy_loss={use: quadratic}' update.mini_batches=2`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import PolicyLoss, Positive
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class Quadratic(PolicyLoss):
    """-ratio A + |A| (ratio - 1)^2 / (2 epsilon): the best ratio is 1 +- epsilon, by the sign of A."""

    name = "quadratic"
    zero_without_advantage = True
    token_level = True
    metrics = (
        Metric(
            "move",
            "ratio",
            "mean distance of the ratio from 1",
            (None, 0.3),
            "Updates overshoot: lower the learning rate or `update.mini_batches`.",
            when="step",
        ),
    )

    epsilon: Positive = 0.2
    """Target deviation of the ratio from 1."""

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        move = ((logps - old_logps) * mask).exp() - 1
        loss = -(1 + move) * advantages + advantages.abs() * move**2 / (2 * self.epsilon)
        return loss * mask, {"move": move.detach().abs() * mask}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [Quadratic]

"""A policy loss without a clip: a parabola in the ratio, lowest at 1 + epsilon or 1 - epsilon by the sign of A."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import PolicyLoss, Positive

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(PolicyLoss):
    """-ratio A + |A| (ratio - 1)^2 / (2 epsilon): the gradient is 0 at a ratio of 1 +- epsilon, and turns beyond."""

    name = "my_name"
    zero_without_advantage = True
    token_level = True
    metrics = (
        Metric("move", "ratio", "mean distance of the ratio from 1", when="step"),
        Metric(
            "far_frac",
            "share of tokens",
            "tokens whose ratio is farther from 1 than epsilon",
            (None, 0.3),
            "Updates overshoot: lower the learning rate or `update.mini_batches`.",
            when="step",
        ),
    )

    epsilon: Positive = 0.2
    """How far the ratio should move."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if algorithm.steps_per_rollout == 1:
            yield (
                "with one optimizer step per rollout the ratio is 1 and epsilon has nothing to hold: set "
                "update.mini_batches=2 or more, or policy_loss.use=reinforce"
            )

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        move = ((logps - old_logps) * mask).expm1()
        loss = -(1 + move) * advantages + advantages.abs() * move**2 / (2 * self.epsilon)
        distance = move.detach().abs() * mask
        return loss * mask, {"move": distance, "far_frac": (distance > self.epsilon).to(mask.dtype)}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [MyName]

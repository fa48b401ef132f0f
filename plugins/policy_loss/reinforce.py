"""Negative advantage times log-prob: the score-function loss (REINFORCE, Williams 1992), without old log-probs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class Reinforce(PolicyLoss):
    """-A log p: the policy gradient on-policy."""

    name = "reinforce"
    words = "plain policy gradient"
    token_level = True
    zero_without_advantage = True
    needs = frozenset()

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if algorithm.steps_per_rollout > 1:
            yield (
                f"with {algorithm.steps_per_rollout} optimizer steps per rollout, it is off-policy from the second on "
                "and does not correct for it; surrogate and ppo_clip do"
            )

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return -(advantages * logps) * mask, {}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [Reinforce]

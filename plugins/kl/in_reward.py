"""KL in the reward (Ziegler et al., arXiv:1909.08593; InstructGPT, arXiv:2203.02155).

With k1 the expected gradient is exactly that of E[r] - beta KL, for unbiased advantage estimators. With any other KL
estimator only half the gradient comes through the reward; for k3 and exact the other half is the same KL in the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLController, KLPlacement, NonNegative, choice

from ._remarks import of_the_score, of_the_value

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class InReward(KLPlacement):
    """Subtracts beta times the KL from each token's reward, or from the last token's at level sequence."""

    name = "in_reward"
    places: ClassVar[frozenset[str]] = frozenset({"reward"})

    beta: NonNegative = 0.05
    """Reward lost per nat of KL."""
    controller: KLController = choice("fixed")
    """Schedule of beta during training."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.beta == 0:
            yield "beta must be positive, got 0. Set beta=0.05, or choose monitor, which only logs the KL"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from of_the_score(self, algorithm, "reward")
        yield from of_the_value(self)

    def reward_penalty(self, kl: Tensor) -> Tensor:
        return self.controller(self.beta) * kl


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [InReward]

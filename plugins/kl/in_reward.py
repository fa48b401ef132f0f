"""KL in the reward (Ziegler et al., arXiv:1909.08593; InstructGPT, arXiv:2203.02155).

With k1 the expected gradient is exactly that of E[r] - beta KL, for estimators without bias of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLPlacement, NonNegative

from ._probe import is_exponential, is_linear

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.algorithm import Algorithm


@dataclass(kw_only=True)
class InReward(KLPlacement):
    """Subtracts beta times the KL from each token's reward, or from the last token's at level sequence."""

    name = "in_reward"
    places: ClassVar[frozenset[str]] = frozenset({"reward"})

    beta: NonNegative = 0.05
    """Reward lost per nat of KL."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.beta == 0:
            yield "beta is 0: set use=monitor to log the KL only, or leave it out with kl=[]"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if not is_linear(self.estimator):
            yield (
                f"{self.estimator.name} in the reward: alone, its expected gradient is not that of the KL "
                "(k1's is, exactly)"
            )
        if self.level == "sequence" and is_exponential(self.estimator):
            yield f"{self.estimator.name} at level sequence is the exponential of a sum and may overflow"

    def reward_penalty(self, kl: Tensor) -> Tensor:
        return self.beta * kl


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [InReward]

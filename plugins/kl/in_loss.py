"""KL in the loss (GRPO, arXiv:2402.03300).

On-policy, k2 at level sequence gives exactly the gradient of the KL; k2 at level token the reverse KL's and k3 the
forward KL's, state by state with the visits held fixed. Departure: in the paper k3 is the only estimator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLEstimator, KLPlacement, NonNegative, choice

from ._probe import is_exponential, is_linear

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.algorithm import Algorithm


@dataclass(kw_only=True)
class InLoss(KLPlacement):
    """Adds beta times the KL to each token's loss; at level sequence to each row's, with the weight of one token."""

    name = "in_loss"
    places: ClassVar[frozenset[str]] = frozenset({"loss"})

    beta: NonNegative = 0.04
    """Loss added per nat of KL."""
    estimator: KLEstimator = choice("k3")
    """How the KL is estimated; its gradient is what counts."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.beta == 0:
            yield "beta is 0: set use=monitor to log the KL only, or leave it out with kl=[]"
        if is_linear(self.estimator):
            name = self.estimator.name
            yield (
                f"{name} in the loss has the expected gradient 0 (it is a multiple of grad log p, whose mean is 0), so "
                f"it adds noise and no penalty: set estimator.use=k2 or k3, or move {name} to use=in_reward"
            )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.level == "sequence" and is_exponential(self.estimator):
            yield f"{self.estimator.name} at level sequence is the exponential of a sum and may overflow"

    def loss_penalty(self, kl: Tensor) -> Tensor:
        return self.beta * kl


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [InLoss]

"""KL in the loss (GRPO, arXiv:2402.03300).

On-policy, k2, k3_plus, k1_is and k3_is at level sequence give exactly the gradient of the KL; at level token they and
`exact` give the reverse KL's, and k3 the forward KL's, state by state with the visited states held fixed. Off-policy this
holds for k1_is and k3_is only. Departure: in the paper k3 is the only estimator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLController, KLEstimator, KLPlacement, NonNegative, choice

from ._probe import is_linear
from ._remarks import of_the_loss, of_the_value

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class InLoss(KLPlacement):
    """Adds beta times the KL to each token's loss; at level sequence to each row's, weighted as one token."""

    name = "in_loss"
    places: ClassVar[frozenset[str]] = frozenset({"loss"})
    token_level = True

    beta: NonNegative = 0.04
    """Loss added per nat of KL."""
    controller: KLController = choice("fixed")
    """Schedule of beta during training."""
    estimator: KLEstimator = choice("k3")
    """Estimator of the KL; in the loss its gradient is what counts."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.beta == 0:
            yield "beta must be positive, got 0. Set beta=0.04, or choose monitor, which only logs the KL"
        if is_linear(self.estimator):
            yield (
                f"{self.estimator.name} in the loss has expected gradient 0 (a multiple of grad log p, whose mean is 0), so it "
                "adds noise and no penalty. Set estimator.use=k2, estimator.use=k3 or estimator.use=k1_is, or use=in_reward"
            )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from of_the_loss(self, algorithm)
        yield from of_the_value(self)

    def loss_penalty(self, kl: Tensor) -> Tensor:
        return self.controller(self.beta) * kl


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [InLoss]

"""KL in the advantage of its own token, after the estimator: unaffected by whitening, baseline and discount.

It does not propagate: a token is not penalized for the KL of later tokens. With k1 at level token the expected gradient is
that of the reverse KL state by state, with the visited states held fixed; at level sequence every token is penalized for
its whole row, and with k1 that is exactly the gradient of the KL.
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
class InAdvantage(KLPlacement):
    """Subtracts beta times each token's KL (at level sequence its row's KL) from its advantage."""

    name = "in_advantage"
    places: ClassVar[frozenset[str]] = frozenset({"advantage"})

    beta: NonNegative = 0.05
    """Advantage lost per nat of KL."""
    controller: KLController = choice("fixed")
    """Schedule of beta during training."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.beta == 0:
            yield "beta must be positive, got 0. Set beta=0.05, or choose monitor, which only logs the KL"
        if "full_distribution" in self.estimator.needs:
            yield (
                f"{self.estimator.name} in the advantage has expected gradient 0 (like a baseline, it depends on the state "
                "but not on the sampled token), so it adds noise and no penalty. Set estimator.use=k1, or use=in_loss"
            )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from of_the_score(self, algorithm, "advantage")
        yield from of_the_value(self)

    def advantage_penalty(self, kl: Tensor) -> Tensor:
        return self.controller(self.beta) * kl


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [InAdvantage]

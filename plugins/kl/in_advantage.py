"""KL in the advantage of its own token, after the estimator: no whitening, baseline or discount touches it.

It does not propagate: a token does not pay for the KL of those after it. With k1 at level token the expected gradient is that
of the reverse KL state by state, the visits held fixed; at level sequence every token pays for its whole row, and with k1
that is exactly the gradient of the KL.
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
    """Subtracts beta times each token's KL from its advantage; at level sequence its row's KL."""

    name = "in_advantage"
    places: ClassVar[frozenset[str]] = frozenset({"advantage"})

    beta: NonNegative = 0.05
    """Advantage lost per nat of KL."""
    controller: KLController = choice("fixed")
    """How beta moves during training."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.beta == 0:
            yield "beta is 0: set use=monitor to log the KL only, or leave it out with kl=[]"
        if "full_distribution" in self.estimator.needs:
            name = self.estimator.name
            yield (
                f"{name} in the advantage has the expected gradient 0 (it depends on the state and not on the token that was "
                f"sampled, as a baseline does), so it adds noise and no penalty: set estimator.use=k1, or move {name} to "
                "use=in_loss"
            )

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        yield from of_the_score(self, algorithm, "advantage")
        yield from of_the_value(self)

    def advantage_penalty(self, kl: Tensor) -> Tensor:
        return self.controller(self.beta) * kl


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [InAdvantage]

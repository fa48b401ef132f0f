"""Entropy bonus (Williams and Peng, 1991), which keeps the policy from collapsing early."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class Entropy(LossTerm):
    """-coef times the entropy of each token's distribution, in nats; averaged over all tokens of the step."""

    name = "entropy"
    words = "entropy bonus of {coef:g}"
    needs = frozenset({"entropy"})

    coef: float = 0.01
    """Factor of the entropy; a negative one penalizes it."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.coef == 0:
            yield "coef must not be 0: the entropy would be computed to no effect. Remove the term with loss_terms=[]"

    # fields named in `needs` arrive as keywords, which the base class cannot list
    def __call__(self, logps: Tensor, mask: Tensor, *, entropy: Tensor) -> Tensor:  # type: ignore[override]
        return -self.coef * entropy * mask


@hookimpl
def loss_terms() -> list[type[LossTerm]]:
    return [Entropy]

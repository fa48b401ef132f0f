"""Keep the policy's entropy above a floor.

Try it: `hf-rlhf train quickstart 'loss_terms=[{use: entropy_floor}]'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import LossTerm, NonNegative
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class EntropyFloor(LossTerm):
    """coef (floor - entropy) on tokens whose entropy is below the floor, and nothing elsewhere."""

    name = "entropy_floor"
    needs = frozenset({"entropy"})

    coef: NonNegative = 0.01
    """Loss per missing nat."""
    floor: NonNegative = 0.1
    """Entropy that costs nothing, in nats."""

    def __call__(  # type: ignore[override]  # one keyword for each name in `needs`
        self, logps: Tensor, mask: Tensor, *, entropy: Tensor
    ) -> Tensor:
        return self.coef * (self.floor - entropy).clamp(min=0) * mask


@hookimpl
def loss_terms() -> list[type[LossTerm]]:
    return [EntropyFloor]

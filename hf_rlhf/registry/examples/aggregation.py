"""Token weights between the sum over a row and its mean.

Try it: `hf-rlhf train quickstart 'aggregation={use: by_length}'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Aggregation, Fraction
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class ByLength(Aggregation):
    """mask / (N_u T^power) for a row of T tokens: power 0 sums over them, power 1 is their mean."""

    name = "by_length"

    power: Fraction = 0.5
    """Exponent of the row's length in the divisor."""

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / (len(mask) * mask.sum(1, keepdim=True).clamp(min=1) ** self.power)


@hookimpl
def aggregation() -> list[type[Aggregation]]:
    return [ByLength]

"""The worst return of a group as the baseline: no completion is pushed down.

Try it: `hf-rlhf train quickstart 'advantages={use: baseline, baseline: worst}'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Baseline
from hf_rlhf.batch import Scored
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class Worst(Baseline):
    """The worst return of the row's group. Biased, as it depends on the row itself."""

    name = "worst"
    needs = frozenset({"groups"})

    def __call__(self, scored: Scored) -> Tensor:
        index, counts = scored.groups()
        returns = scored.returns()
        worst = returns.new_full((len(counts),), float("inf")).scatter_reduce(0, index, returns, "amin")
        return worst[index].unsqueeze(1)


@hookimpl
def baseline() -> list[type[Baseline]]:
    return [Worst]

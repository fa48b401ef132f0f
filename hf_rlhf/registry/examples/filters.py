"""Train on completions of a minimum length only.

Try it: `hf-rlhf train quickstart 'filters=[{use: longer, resample: 2}]'`
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Filter
from hf_rlhf.batch import Scored
from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class Longer(Filter):
    """Keep the rows with at least `tokens` sampled tokens."""

    name = "longer"

    tokens: Count = 2
    """Minimum length of a row that is kept."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.mask.sum(1) >= self.tokens


@hookimpl
def filters() -> list[type[Filter]]:
    return [Longer]

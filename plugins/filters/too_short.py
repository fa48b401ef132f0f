"""Filter for very short completions, so that empty answers neither win nor enter a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Filter

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class TooShort(Filter):
    """Keeps the rows with at least `min_tokens` sampled tokens."""

    name = "too_short"
    words = "completions of fewer than {min_tokens} tokens are dropped"
    across_groups = False

    min_tokens: Count = 2
    """Minimum number of sampled tokens, the end-of-sequence token included; 1 keeps every row that has any."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.mask.sum(1) >= self.min_tokens


@hookimpl
def filters() -> list[type[Filter]]:
    return [TooShort]

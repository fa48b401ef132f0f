"""Drops completions that were cut off (overlong filtering, DAPO, arXiv:2503.14476): their score says little of them.

Departure: filters run before the advantages, so a dropped row leaves its group's mean and std too; the paper only masks
its loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Filter

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class Overlong(Filter):
    """Keeps the rows that finished within `max_tokens`."""

    name = "overlong"

    max_tokens: Count | None = None
    """Rows with more sampled tokens are dropped too, though they finished; None: only those cut off."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        longest = getattr(algorithm.rollout, "max_new_tokens", None)
        if self.max_tokens is not None and longest is not None and self.max_tokens >= longest:
            yield f"max_tokens {self.max_tokens} never binds, as rollout.max_new_tokens is {longest}"

    def __call__(self, scored: Scored) -> Tensor:
        keep = scored.mask.new_ones(len(scored.mask)).bool() if scored.finished is None else scored.finished.bool()
        return keep if self.max_tokens is None else keep & (scored.mask.sum(1) <= self.max_tokens)


@hookimpl
def filters() -> list[type[Filter]]:
    return [Overlong]

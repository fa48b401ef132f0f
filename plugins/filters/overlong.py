"""Filter for truncated completions (overlong filtering, DAPO, arXiv:2503.14476), whose score is uninformative.

Departure: filters run before the advantages, so a dropped row is excluded from its group's mean and std too; the paper
only masks its loss.
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
    across_groups = False

    max_tokens: Count | None = None
    """Drop rows with more sampled tokens even if they finished; None: only truncated rows."""

    def in_words(self) -> str:
        longer = "" if self.max_tokens is None else f" and those of more than {self.max_tokens} tokens"
        return f"truncated completions{longer} are dropped"

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        longest = getattr(algorithm.rollout, "max_new_tokens", None)
        if self.max_tokens is not None and longest is not None and self.max_tokens >= longest:
            yield f"max_tokens={self.max_tokens} has no effect, because rollout.max_new_tokens is {longest}"

    def __call__(self, scored: Scored) -> Tensor:
        keep = scored.mask.new_ones(len(scored.mask)).bool() if scored.finished is None else scored.finished.bool()
        return keep if self.max_tokens is None else keep & (scored.mask.sum(1) <= self.max_tokens)


@hookimpl
def filters() -> list[type[Filter]]:
    return [Overlong]

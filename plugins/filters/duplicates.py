"""Filter for repeated completions of a prompt: a completion sampled eight times is learned from once.

The remaining rows are no longer a sample from the policy, so the expected gradient is that of a flatter one.
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
class Duplicates(Filter):
    """Keeps the first `keep` of the rows within a group that are equal token by token."""

    name = "duplicates"
    words = "equal completions of a prompt beyond the first {keep} are dropped"
    needs = frozenset({"completion_ids", "groups"})
    across_groups = False

    keep: Count = 1
    """Number of equal completions kept per prompt, the first in row order."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.resample:
            yield f"resample must be 0, got {self.resample}: every prompt keeps at least one row. Set resample=0"

    def __call__(self, scored: Scored) -> Tensor:
        import torch

        ids = scored.completion_ids
        assert ids is not None, "filled because `needs` names it"
        group, _ = scored.groups()
        # the mask distinguishes a sampled token 0 from padding
        rows = torch.cat([group.unsqueeze(1), ids, scored.mask.to(ids.dtype)], 1)
        _, kind, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
        order = kind.argsort(stable=True)
        first = counts.cumsum(0) - counts
        place = torch.empty_like(kind)
        place[order] = torch.arange(len(kind), device=kind.device) - first[kind[order]]
        return place < self.keep


@hookimpl
def filters() -> list[type[Filter]]:
    return [Duplicates]

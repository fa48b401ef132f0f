"""Drops repeated completions of a prompt: a policy that says one thing eight times learns it once.

The rows that stay are no longer a sample of the policy, so the expected gradient is that of a flatter one.
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
    """Keeps the first `keep` rows of those that are equal, token by token, within a group."""

    name = "duplicates"
    needs = frozenset({"completion_ids", "groups"})

    keep: Count = 1
    """How many equal completions of a prompt stay, the first in the order of the rows."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.resample:
            yield f"resample={self.resample} has no meaning here: a row of every prompt stays. Set resample=0"

    def __call__(self, scored: Scored) -> Tensor:
        import torch

        ids = scored.completion_ids
        assert ids is not None, "the core provides what `needs` names"
        group, _ = scored.groups()
        # the mask tells a sampled token 0 from padding
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

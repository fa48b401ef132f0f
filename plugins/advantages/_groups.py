"""Group-wise tensor operations shared by several estimators: statistics of a row's group, and the order of KL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf.axes import AdvantageEstimator

from ._tokens import reward_to_go

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GroupEstimator(AdvantageEstimator, ABC):
    """Base class: one advantage per row from its group's returns, broadcast to the row's tokens."""

    needs = frozenset({"groups"})

    order: Literal["kl_first", "score_first"] = "kl_first"
    """`kl_first`: compare returns, which include the KL in the reward; `score_first` (OpenRLHF): compare scores without
    it, then subtract from each token the KL of that and later tokens. The same without a KL in the reward."""

    @abstractmethod
    def of_rows(self, scored: Scored, returns: Tensor) -> Tensor:
        """Return each row's advantage (N,) from the returns or scores (N,) to compare."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        if self.order == "score_first" and not algorithm.kl_in("reward"):
            yield "order=score_first has no effect without a KL in the reward"

    def __call__(self, scored: Scored) -> Tensor:
        if self.order == "kl_first":
            return self.of_rows(scored, scored.returns()).unsqueeze(1) * scored.mask
        return minus_kl(self.of_rows(scored, scored.totals()).unsqueeze(1) * scored.mask, scored)


def minus_kl(advantages: Tensor, scored: Scored) -> Tensor:
    """Subtract from each token's advantage (N, T) the KL penalties of that and later tokens."""
    if scored.kl_penalties is None:
        return advantages
    return advantages - reward_to_go(scored.kl_penalties, scored.mask)


def centred(scored: Scored, x: Tensor) -> Tensor:
    """Subtract the group mean from `x` (N,); exactly 0 where all values of the group are equal."""
    return (x - scored.group_mean(x)).masked_fill(scored.group_is_flat(x), 0.0)


def others(scored: Scored, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of each row's other group members, (N, G) with 0 in empty slots, and a (N, G) bool mask of them."""
    index, place, table = _by_group(scored, x)
    _, _, filled = _by_group(scored, x.new_ones(len(x)))
    there = filled[index].bool().scatter(1, place.unsqueeze(1), False)
    return table[index].masked_fill(~there, 0.0), there


def sum_of_group(scored: Scored, x: Tensor) -> Tensor:
    """Sum `x` (N, ...) over each row's group."""
    index, counts = scored.groups()
    return x.new_zeros(len(counts), *x.shape[1:]).index_add(0, index, x)[index]


def sum_of_others(scored: Scored, x: Tensor) -> Tensor:
    """Sum `x` (N, ...) over the other rows of each row's group.

    Adds the sums of the rows before and after, so that a large value of the row itself leaves no rounding error.
    """
    import torch

    index, place, table = _by_group(scored, x)
    zero = table[:, :1] * 0
    before = torch.cat([zero, table[:, :-1].cumsum(1)], 1)
    after = torch.cat([table[:, 1:].flip(1).cumsum(1).flip(1), zero], 1)
    return (before + after)[index, place]


def _by_group(scored: Scored, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's group and index within it, (N,) each, and `x` as (groups, G, ...) with 0 in empty slots."""
    import torch

    index, counts = scored.groups()
    order = index.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(index)
    place[order] = torch.arange(len(index), device=index.device) - first[index[order]]
    table = x.new_zeros(len(counts), int(counts.max()), *x.shape[1:])
    table[index, place] = x
    return index, place, table

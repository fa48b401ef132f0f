"""Return minus its group's median: one extreme completion moves no other completion's advantage."""

from dataclasses import dataclass

from torch import Tensor

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator
from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class GroupMedian(AdvantageEstimator):
    """The row's return minus the (lower) median of its prompt's rows, on each of its tokens."""

    name = "group_median"
    needs = frozenset({"groups"})

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        groups, counts = scored.groups()
        medians = returns.new_tensor([returns[groups == g].median() for g in range(len(counts))])
        return (returns - medians[groups]).unsqueeze(1) * scored.mask


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [GroupMedian]

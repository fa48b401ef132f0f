"""The best k completions of a prompt against the rest: only the order of the returns counts, never their size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import AdvantageEstimator, Count
from hf_rlhf.batch import Credit, Scored

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(AdvantageEstimator):
    """+1 for the best `k` of a group, -k / (G - k) for the others, so that a group sums to 0; rows that tie share."""

    name = "my_name"
    needs = frozenset({"groups"})
    metrics = (
        Metric(
            "tied_frac",
            "share of rows",
            "rows with the same return as another one at the border between best and rest",
            (None, 0.8),
            "Returns hardly differ within a prompt: use a finer reward, or `filters` with zero_variance.",
        ),
    )

    k: Count = 1
    """How many completions of a prompt are the best."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.k >= algorithm.rollout.num_generations:
            yield (
                f"k={self.k} leaves no other completion among the {algorithm.rollout.num_generations} of a prompt: set "
                "advantages.k below rollout.num_generations"
            )

    def __call__(self, scored: Scored) -> Credit:
        returns, size = scored.returns(), scored.group_size().to(scored.mask.dtype)
        together = scored.group_ids.unsqueeze(1) == scored.group_ids
        higher = (together & (returns > returns.unsqueeze(1))).sum(1)
        equal = (together & (returns == returns.unsqueeze(1))).sum(1)
        best = ((self.k - higher) / equal).clamp(0, 1)  # the row's share of the k places
        worth = best - (1 - best) * self.k / (size - self.k).clamp(min=1)
        worth = worth.masked_fill(scored.group_is_flat(returns) | (size <= self.k), 0.0)
        tied = (best > 0) & (best < 1)
        return Credit(advantages=worth.unsqueeze(1) * scored.mask, metrics={"tied_frac": tied.float()})


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [MyName]

"""Quantile advantage estimation (arXiv:2509.22611): only a group's rare correct rows, or its rare wrong ones, are trained on."""

from dataclasses import dataclass

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import AdvantageEstimator, Fraction
from hf_rlhf.batch import Credit, Scored


@dataclass(kw_only=True)
class Quantile(AdvantageEstimator):
    """Return minus its group's K-quantile inf{x: F(x) >= K}, over its group's standard deviation, on each token."""

    name = "quantile"
    needs = frozenset({"groups"})
    metrics = (Metric("zero_frac", "share of rows", "rows at their group's quantile, with advantage 0"),)
    k: Fraction = 0.4
    """K. If a share p <= 1 - K of a group is correct, its correct rows are trained on, otherwise its wrong ones."""

    def __call__(self, scored: Scored) -> Credit:
        returns, same = scored.returns(), scored.group_ids == scored.group_ids.unsqueeze(1)
        reached = same & ((same & (returns <= returns.unsqueeze(1))).sum(1) / scored.group_size() >= self.k)
        rows = (returns - returns.where(reached, float("inf")).amin(1)) / (scored.group_std(returns) + 1e-4)
        return Credit(advantages=rows.unsqueeze(1) * scored.mask, metrics={"zero_frac": (rows == 0).float()})


@hookimpl
def advantages():
    return [Quantile]

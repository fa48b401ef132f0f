"""Maximum-likelihood reinforcement learning (MaxRL, arXiv:2602.02710), for rewards of 0 and 1.

With p the probability of a correct answer, log p = -sum_k (1 - p)^k / k. The expected gradient, summed over the rows'
tokens, is that of this series up to an order: sum_{k <= order} (1/k) grad pass@k. Dividing by the group's mean, with 0
where no row is correct, gives order G - 1; `all_wrong: -1` gives order G.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from ._groups import centred

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class MaxRL(AdvantageEstimator):
    """Return minus its group's mean, over the mean, on each token; `all_wrong` where the mean is 0.

    Exactly 0 if all returns of the group are equal and nonzero, or one correct row remains. Per-step and per-token rewards
    count by their sum. Raises `ValueError` for negative returns.
    """

    name = "maxrl"
    words = "return minus its group's mean, over that mean"
    needs = frozenset({"groups"})

    all_wrong: Literal[0, -1] = 0
    """Advantage of rows in a group without a correct one: 0 as in the paper, or -1, which adds order G to the series."""

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        places = [f"kl.{i}" for i, kl in enumerate(algorithm.kl) if "reward" in kl.places]
        if places:
            moved = " ".join(f"{place}.use=in_loss {place}.estimator.use=k3" for place in places)
            yield (
                "maxrl needs rewards of 0 and 1, but a KL in the reward makes returns negative. Set "
                f"{moved}, or advantages.use=leave_one_out"
            )

    def __call__(self, scored: Scored) -> Tensor:
        returns = scored.returns()
        wrong = (returns < 0).nonzero().flatten().tolist()
        if wrong:
            named = ", ".join(f"row {row} has {returns[row].item():g}" for row in wrong[:5])
            raise ValueError(
                f"maxrl: returns must be nonnegative (ideally 0 or 1), got {len(wrong)} negative of {len(returns)}: "
                f"{named}. Shift or clip the reward, or choose another estimator"
            )
        mean = scored.group_mean(returns)
        relative = centred(scored, returns) / mean.masked_fill(mean == 0, 1.0)
        return relative.masked_fill(mean == 0, self.all_wrong).unsqueeze(1) * scored.mask


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [MaxRL]

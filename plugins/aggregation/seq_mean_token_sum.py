"""Mean over rows of each row's token sum: the weights of the policy gradient, without length bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Aggregation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class SeqMeanTokenSum(Aggregation):
    """m / N_u. A row without sampled tokens counts in N_u."""

    name = "seq_mean_token_sum"
    words = "mean over completions of their token sums"

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / len(mask)


@hookimpl
def aggregation() -> list[type[Aggregation]]:
    return [SeqMeanTokenSum]

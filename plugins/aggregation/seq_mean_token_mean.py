"""Mean over rows of each row's token mean (GRPO, arXiv:2402.03300): tokens of short completions count more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Aggregation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class SeqMeanTokenMean(Aggregation):
    """m / T_i / N_u. A row without sampled tokens has weight 0 and counts in N_u."""

    name = "seq_mean_token_mean"
    words = "mean over completions of their token means"

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


@hookimpl
def aggregation() -> list[type[Aggregation]]:
    return [SeqMeanTokenMean]

"""Mean over all tokens of the step (DAPO, arXiv:2503.14476): long completions count more.

The number of tokens depends on the sample, so the expected gradient has a bias that vanishes as the number of rows grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Aggregation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class TokenMean(Aggregation):
    """m / sum m over all tokens of the optimizer step; 0 if nothing was sampled."""

    name = "token_mean"
    words = "mean over tokens"

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / mask.sum().clamp(min=1)


@hookimpl
def aggregation() -> list[type[Aggregation]]:
    return [TokenMean]

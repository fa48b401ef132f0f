"""Mean over rows of each row's token sum over a constant length (Dr. GRPO, arXiv:2503.20783).

Departure: the paper's length is the longest completion allowed; here it is a separate setting, so that the step size
stays the same when `max_new_tokens` changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Aggregation, Count

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class SeqMeanTokenSumNorm(Aggregation):
    """m / (N_u L): seq_mean_token_sum over a constant length. A row without sampled tokens counts in N_u."""

    name = "seq_mean_token_sum_norm"
    words = "mean over completions of their token sums over {length}"

    length: Count = 1024
    """The constant L; the paper takes rollout.max_new_tokens."""

    def remarks(self, algorithm: Algorithm) -> Iterable[str]:
        longest = getattr(algorithm.rollout, "max_new_tokens", None)
        if longest is not None and longest != self.length:
            yield (
                f"length is {self.length} but rollout.max_new_tokens is {longest}: every weight is "
                f"{longest / self.length:.3g} times the paper's. Set aggregation.length={longest} to match it"
            )

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / (len(mask) * self.length)


@hookimpl
def aggregation() -> list[type[Aggregation]]:
    return [SeqMeanTokenSumNorm]

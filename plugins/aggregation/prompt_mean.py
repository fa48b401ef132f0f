"""Mean over prompts of the mean over all tokens of a prompt's completions (ScaleRL, arXiv:2510.13786).

Prompts have equal weight; within a prompt, long completions count more. The number of tokens depends on the sample, so
the expected gradient has a bias that vanishes as rows per prompt grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Aggregation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class PromptMean(Aggregation):
    """m / (P times the tokens of the row's prompt), P prompts; one without sampled tokens has weight 0 and counts in P."""

    name = "prompt_mean"
    words = "mean over prompts of their token means"
    needs = frozenset({"group_ids"})

    # fields named in `needs` arrive as keywords, which the base class cannot list
    def __call__(self, mask: Tensor, *, group_ids: Tensor) -> Tensor:  # type: ignore[override]
        prompts, index = group_ids.unique(return_inverse=True)
        tokens = mask.new_zeros(len(prompts)).index_add(0, index, mask.sum(1))
        return mask / tokens.clamp(min=1)[index].unsqueeze(1) / len(prompts)


@hookimpl
def aggregation() -> list[type[Aggregation]]:
    return [PromptMean]

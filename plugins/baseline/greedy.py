"""Greedy baseline: the greedy completion's score (as in ReMax, arXiv:2310.10505), without KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class Greedy(Baseline):
    """Total score of the greedy completion of the row's prompt."""

    name = "greedy"
    words = "the score of the prompt's greedy completion"
    needs = frozenset({"greedy"})

    def __call__(self, scored: Scored) -> Tensor:
        if scored.greedy is None:
            raise ValueError("baseline.greedy needs greedy: Scored.greedy is None. Declare 'greedy' in `needs`")
        return scored.greedy.unsqueeze(1)


@hookimpl
def baseline() -> list[type[Baseline]]:
    return [Greedy]

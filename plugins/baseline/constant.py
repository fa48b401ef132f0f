"""Constant baseline: the same number for every token of every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class Constant(Baseline):
    """`value` for every row."""

    name = "constant"
    words = "{value:g}"

    value: float = 0.0
    """Number subtracted from every return; 0 leaves the returns unchanged."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.mask.new_full((len(scored.mask), 1), self.value)


@hookimpl
def baseline() -> list[type[Baseline]]:
    return [Constant]

"""Advantages from a Python function of yours, `adv(scored)`: the short door before a plugin.

Further parameters without a default are fields of `Scored` that it needs: `def adv(scored, values)`. Before a model is loaded
it is checked by the facts of the conformance kit. Whitening and other statistics over prompts are allowed for; set
`adv.across_groups = False` for a function that has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator

from .._functions import FromFunction

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Credit, Scored


@dataclass(kw_only=True)
class Function(FromFunction, AdvantageEstimator):
    """Advantages (N, T), 0 off the mask, or `Credit`, that the function returns."""

    name = "function"
    KIND = "advantage function"
    GIVEN = ("scored",)
    across_groups = True
    PROPERTIES = ("across_groups",)

    def __call__(self, scored: Scored) -> Tensor | Credit:
        found: Tensor | Credit = self._call({"scored": scored, **vars(scored)})
        return found


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [Function]

"""Filter from a Python function of yours, `keep(scored)`: the short door before a plugin.

Further parameters without a default are fields of `Scored` that it needs: `def keep(scored, advantages)`. Before a model is
loaded it is checked by the facts of the conformance kit. It gets the rows of every process, or of its own alone with
`keep.across_groups = False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import Filter

from .._functions import FromFunction

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class Function(FromFunction, Filter):
    """The rows (N,) bool that the function keeps."""

    name = "function"
    KIND = "filter function"
    GIVEN = ("scored",)
    PROPERTIES = ("across_groups",)

    def __call__(self, scored: Scored) -> Tensor:
        kept: Tensor = self._call({"scored": scored, **vars(scored)})
        return kept


@hookimpl
def filters() -> list[type[Filter]]:
    return [Function]

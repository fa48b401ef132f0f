"""Policy loss from a Python function of yours, `loss(logps, old_logps, advantages, mask)`: the short door before a plugin.

It names those of the four that it reads. Further parameters without a default are what it needs:
`def loss(logps, advantages, mask, total_score)`. Before a model is loaded it is checked by the facts of the conformance kit.
Set `loss.token_level = True` where a token's loss depends on its numbers alone, which saves memory,
`loss.zero_without_advantage = True` where rows without advantages have no gradient, which saves time, and
`loss.stops_gradient = True` where a part is detached.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import PolicyLoss

from .._functions import FromFunction

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Function(FromFunction, PolicyLoss):
    """The loss (B, T) of each token that the function returns."""

    name = "function"
    KIND = "loss function"
    GIVEN = ("logps", "old_logps", "advantages", "mask")
    PROPERTIES = ("token_level", "zero_without_advantage", "stops_gradient")

    def _given_needs(self) -> Iterable[str]:
        return {"old_logps"} & set(self._names)

    def __call__(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, **needed: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        given = {"logps": logps, "old_logps": old_logps, "advantages": advantages, "mask": mask}
        return self._call({**given, **needed}), {}


@hookimpl
def policy_loss() -> list[type[PolicyLoss]]:
    return [Function]

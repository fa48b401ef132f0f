"""Which log-probs stand for the policy that rolled out: the trainer's, or what the sampler reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf.axes import PolicyLoss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Anchored(PolicyLoss):
    """A loss that can hold the policy to either."""

    anchor: Literal["old", "sampler"] = "old"
    """`old`: the log-probs of the policy that rolled out, in the trainer; `sampler`: as the sampler reported them, so that
    its mismatch counts too (needs a rollout engine that reports log-probs)."""

    def __post_init__(self) -> None:
        if self.anchor == "sampler":
            self.needs = self.needs | {"sampler_logps"}  # type: ignore[misc]

    def anchored(self, old_logps: Tensor, sampler_logps: Tensor | None) -> Tensor:
        """(B, T): those of the two that the setting names."""
        if self.anchor == "old":
            return old_logps
        assert sampler_logps is not None, "the core provides what `needs` names"
        return sampler_logps

"""Choice of the old log-probs: the trainer's at rollout time, or those that the sampler reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_rlhf.axes import PolicyLoss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Anchored(PolicyLoss):
    """Base class of losses that compare the policy with either."""

    anchor: Literal["old", "sampler"] = "old"
    """`old`: the trainer's log-probs of the rollout policy; `sampler`: those that the sampler reported, so that its mismatch
    counts too (needs a rollout engine that reports log-probs)."""

    def __post_init__(self) -> None:
        if self.anchor == "sampler":
            self.needs = self.needs | {"sampler_logps"}  # type: ignore[misc]

    def anchored(self, old_logps: Tensor, sampler_logps: Tensor | None) -> Tensor:
        """Return the log-probs (B, T) that `anchor` selects."""
        if self.anchor == "old":
            return old_logps
        assert sampler_logps is not None, "filled because `needs` names it"
        return sampler_logps

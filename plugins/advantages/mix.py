"""Weighted sum of other estimators on the same rows.

The expected gradient is the same weighted sum of theirs. Weights need not sum to 1; a negative one subtracts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_rlhf import hookimpl
from hf_rlhf.axes import AdvantageEstimator
from hf_rlhf.batch import Credit

if TYPE_CHECKING:
    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class Mix(AdvantageEstimator):
    """Sum of each part's advantages times its weight; the critic's targets come from the first part that provides them.

    Each part uses per-step and per-token rewards in its own way.
    """

    name = "mix"

    parts: list[AdvantageEstimator]
    """The estimators, one or more, each with its own settings."""
    weights: list[float]
    """Factor of each part, in the order of `parts`."""

    def in_words(self) -> str:
        parts = zip(self.weights, self.parts, strict=True)
        return " + ".join(f"{weight:g} x ({part.in_words()})" for weight, part in parts)

    @property
    def across_groups(self) -> bool:
        """True if any part depends on rows of other prompts."""
        return any(part.across_groups for part in self.parts)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts must name at least one estimator, got []. Example: parts=[{use: leave_one_out}]")
        if len(self.parts) != len(self.weights):
            names = ", ".join(part.name for part in self.parts)
            raise ValueError(
                f"weights must have one number per part, got {len(self.weights)} for {len(self.parts)} parts ({names})"
            )

    def __call__(self, scored: Scored) -> Credit:
        mixed = Credit(advantages=scored.mask * 0)
        for part, weight in zip(self.parts, self.weights, strict=True):
            credit = Credit.of(part(scored))
            if mixed.returns is None:
                mixed.returns, mixed.value_mask = credit.returns, credit.value_mask
            mixed.advantages = mixed.advantages + weight * credit.advantages
            mixed.metrics |= credit.metrics
        return mixed


@hookimpl
def advantages() -> list[type[AdvantageEstimator]]:
    return [Mix]

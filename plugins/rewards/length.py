"""Length penalty: the soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13), in a selectable unit.

In the paper's notation `maximum` is L_max and `target` is L_max - L_cache. A negative `weight` rewards length instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, RewardSource
from hf_rlhf.batch import Rollouts


@dataclass(kw_only=True)
class Length(RewardSource):
    """-clip((length - target) / (maximum - target), 0, 1): 0 up to `target`, decreasing linearly to -1 at `maximum`."""

    name = "length"
    rowwise = True
    penalty = True

    unit: Literal["tokens", "words", "characters"] = "tokens"
    """Unit of length: sampled tokens, the end-of-sequence token included; words separated by whitespace; or characters."""
    target: Count = 256
    """Largest length without penalty."""
    maximum: Count = 512
    """Length from which the score is -1."""

    def __post_init__(self) -> None:
        if self.maximum <= self.target:
            raise ValueError(f"maximum must be above target={self.target}, got {self.maximum}")

    def __call__(self, rollouts: Rollouts) -> list[float]:
        span = self.maximum - self.target
        return [-min(max((length - self.target) / span, 0.0), 1.0) for length in self._lengths(rollouts)]

    def _lengths(self, rollouts: Rollouts) -> list[int]:
        if self.unit == "tokens":
            return [sum(mask) for mask in rollouts.masks]
        if self.unit == "words":
            return [len(completion.split()) for completion in rollouts.completions]
        return [len(completion) for completion in rollouts.completions]


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Length]

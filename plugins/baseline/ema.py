"""Exponential moving average of the mean return of earlier rollouts (the running baseline of Williams, 1992).

A rollout is observed after its own advantages are computed, so the baseline depends on earlier rollouts only and the
gradient stays unbiased.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Lt

from hf_rlhf import hookimpl
from hf_rlhf.axes import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.batch import Scored


@dataclass(kw_only=True)
class EMA(Baseline):
    """b <- decay b + (1 - decay) mean, with each rollout's mean return after KL; 0 before the first, then its mean."""

    name = "ema"
    words = "the mean return of earlier rollouts (decay {decay:g})"

    decay: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the old value that a rollout keeps; 0 uses the last rollout's mean."""
    mean: float | None = field(default=None, init=False)
    """The mean so far; None before the first rollout."""

    def __call__(self, scored: Scored) -> Tensor:
        return scored.mask.new_full((len(scored.mask), 1), self.mean or 0.0)

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Update the mean; a rollout without rows has none and changes nothing."""
        seen = statistics.get("reward/after_kl/mean")
        if seen is not None:
            self.mean = seen if self.mean is None else self.decay * self.mean + (1 - self.decay) * seen

    def state_dict(self) -> dict[str, Any]:
        return {} if self.mean is None else {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state.get("mean")


@hookimpl
def baseline() -> list[type[Baseline]]:
    return [EMA]

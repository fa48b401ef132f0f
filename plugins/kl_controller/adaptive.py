"""Adaptive beta that tracks a target KL (Ziegler et al., arXiv:1909.08593, section 2.2).

Once per rollout: beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * rows / horizon. The KL is the rollout's mean k1, whatever
estimator the placement uses. Departure: the paper has a constant 0.1 in place of rows / horizon, which its authors' code
uses; `statistic: token` is verl's definition of the KL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import KLController, Positive

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class Adaptive(KLController):
    """Raises beta while the KL is above its target and lowers it while below; starts at the recipe's beta."""

    name = "adaptive"
    words = "adapted to {target:g} nats"
    needs = frozenset({"ref_logps", "old_logps"})

    target: Positive = 6.0
    """Target KL in nats per row, or per token with `statistic: token`."""
    horizon: Positive = 10_000.0
    """Rows in which beta changes by at most about 20%; a smaller horizon adapts faster."""
    statistic: Literal["sequence", "token"] = "sequence"
    """`sequence`: mean over rows of the sum over tokens; `token`: mean over all tokens (verl)."""

    def __post_init__(self) -> None:
        self._factor = 1.0

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        rows = algorithm.rollout.prompts * algorithm.rollout.num_generations
        if rows >= 5 * self.horizon:
            yield (
                f"horizon must be above {rows / 5:g} for rollouts of {rows} rows, got {self.horizon:g}: a single rollout "
                f"could bring beta to 0 or below. Raise horizon"
            )

    def observe(self, statistics: Mapping[str, float]) -> None:
        kl = statistics.get(f"kl/rollout/{self.statistic}")
        if kl is not None:  # absent if no row was left
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self._factor *= 1 + error * statistics["rollout/rows"] / self.horizon

    def __call__(self, beta: float) -> float:
        return beta * self._factor

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factor = state["factor"]


@hookimpl
def kl_controller() -> list[type[KLController]]:
    return [Adaptive]

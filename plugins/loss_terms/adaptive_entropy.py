"""Entropy bonus whose coefficient follows a target entropy (Skywork-OR1, arXiv:2505.22312).

After each rollout's updates the coefficient rises by `delta` if their mean entropy was at or below `target` and falls by
`delta` if it was above; the bonus applies only while the entropy is at or below the target. Departure: the coefficient
changes once per rollout, not in every step, so that all processes and micro-batches share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import LossTerm, NonNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from hf_rlhf.axes import Algorithm


@dataclass(kw_only=True)
class AdaptiveEntropy(LossTerm):
    """-c times the entropy of each token's distribution, in nats; averaged over all tokens of the step."""

    name = "adaptive_entropy"
    words = "entropy bonus that adapts to {target:g} nats per token"
    needs = frozenset({"entropy"})
    metrics = (Metric("coef", "loss per nat", "the coefficient of the entropy bonus after this rollout was observed"),)

    target: Positive = 0.2
    """Entropy below which the bonus applies, in nats per token."""
    coef: NonNegative = 0.0
    """c in the first rollout, before any entropy was observed."""
    delta: Positive = 0.005
    """Change of c after a rollout."""
    maximum: Positive = 1.0
    """Largest c; the smallest is 0."""

    def __post_init__(self) -> None:
        self._now, self._pays = self.coef, True

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.coef > self.maximum:
            yield f"coef must be at most maximum={self.maximum:g}, got {self.coef:g}. Lower coef or raise maximum"

    def observe(self, statistics: Mapping[str, float]) -> None:
        entropy = statistics.get("policy/entropy")
        if entropy is None:
            return
        self._pays = entropy <= self.target
        moved = self._now + (self.delta if self._pays else -self.delta)
        self._now = min(max(moved, 0.0), self.maximum)

    def report(self) -> Mapping[str, float]:
        return {"coef": self._now}

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self._now, "pays": self._pays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._now, self._pays = state["coef"], state["pays"]

    # fields named in `needs` arrive as keywords, which the base class cannot list
    def __call__(self, logps: Tensor, mask: Tensor, *, entropy: Tensor) -> Tensor:  # type: ignore[override]
        return -(self._now if self._pays else 0.0) * entropy * mask


@hookimpl
def loss_terms() -> list[type[LossTerm]]:
    return [AdaptiveEntropy]

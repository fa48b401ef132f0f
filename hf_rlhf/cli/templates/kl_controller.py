"""A brake: beta doubles while the KL is above its limit, and comes back to the recipe's below it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import KLController, Positive

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(KLController):
    """Once per rollout: beta x 2 where its mean k1 exceeds `limit`, x 1/2 elsewhere, never below the recipe's."""

    name = "my_name"
    needs = frozenset({"ref_logps", "old_logps"})
    metrics = (
        Metric(
            "factor",
            "times the recipe's beta",
            "what beta is multiplied with after this rollout",
            (None, 16.0),
            "The brake does not hold the policy: raise `beta`, or lower the learning rate.",
            summary="max",
        ),
    )

    limit: Positive = 0.05
    """Mean KL above which it brakes, in nats per token."""
    most: Annotated[float, Ge(2)] = 64.0
    """Largest factor of beta."""

    def __post_init__(self) -> None:
        self._factor = 1.0

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        held = [kl for kl in algorithm.kl if getattr(kl, "controller", None) is self]
        if any(kl.clamp is not None and kl.clamp <= self.limit for kl in held):
            yield (
                f"limit={self.limit:g} is not below the clamp of the KL that it holds, which has no gradient there: "
                "raise clamp, or lower limit"
            )

    def observe(self, statistics: Mapping[str, float]) -> None:
        kl = statistics.get("kl/rollout/token")
        if kl is not None:  # absent where no row was left
            self._factor = min(max(self._factor * (2.0 if kl > self.limit else 0.5), 1.0), self.most)

    def __call__(self, beta: float) -> float:
        return beta * self._factor

    def report(self) -> Mapping[str, float]:
        return {"factor": self._factor}

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factor = state["factor"]


@hookimpl
def kl_controller() -> list[type[KLController]]:
    return [MyName]

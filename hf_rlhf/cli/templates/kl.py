"""KL in the reward beyond a free budget: small moves cost nothing, large ones the usual price."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import KLController, KLPlacement, NonNegative, choice

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(KLPlacement):
    """Subtracts beta (kl - free) from the reward where the KL exceeds `free`, and nothing below."""

    name = "my_name"
    places = frozenset({"reward"})
    metrics = (
        Metric(
            "over",
            "nats per token",
            "by how much the mean k1 of the rollout exceeds the free budget; below 0 within it",
            (None, 0.1),
            "The policy runs away from the reference: raise `beta`, or lower the learning rate.",
        ),
    )

    beta: NonNegative = 0.05
    """Reward lost per nat beyond `free`."""
    free: NonNegative = 0.01
    """KL of a token (of a row, at level sequence) that costs nothing, in nats."""
    controller: KLController = choice("fixed")
    """How beta moves during training."""

    def __post_init__(self) -> None:
        self._kl: float | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.beta == 0:
            yield "beta is 0, so the KL costs nothing: set beta=0.05, or use=monitor to log the KL only"

    def reward_penalty(self, kl: Tensor) -> Tensor:
        return self.controller(self.beta) * (kl - self.free).clamp(min=0)

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._kl = statistics.get(f"kl/rollout/{self.level}", self._kl)

    def report(self) -> Mapping[str, float]:
        return {} if self._kl is None else {"over": self._kl - self.free}

    def state_dict(self) -> dict[str, Any]:
        return {"kl": self._kl}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kl = state["kl"]


@hookimpl
def kl() -> list[type[KLPlacement]]:
    return [MyName]

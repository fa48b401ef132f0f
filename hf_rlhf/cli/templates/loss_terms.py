"""A floor under the entropy: tokens on which the policy is nearly certain are pushed to be less so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import LossTerm, NonNegative, Positive

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(LossTerm):
    """coef (floor - entropy) on tokens whose entropy is below the floor, and nothing elsewhere."""

    name = "my_name"
    needs = frozenset({"entropy"})
    metrics = (
        Metric(
            "gap",
            "nats per token",
            "by how much the mean entropy of the last updates is below the floor, 0 above it",
            (None, 0.0),
            "The policy has become certain: raise `coef`.",
            summary="max",
        ),
    )

    coef: NonNegative = 0.01
    """Loss per missing nat."""
    floor: Positive = 0.1
    """Entropy that costs nothing, in nats per token."""

    def __post_init__(self) -> None:
        self._entropy: float | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.coef == 0:
            yield "coef is 0, and exact entropies are computed for nothing: leave the term out, or set coef=0.01"

    def __call__(  # type: ignore[override]  # one keyword for each name in `needs`
        self, logps: Tensor, mask: Tensor, *, entropy: Tensor
    ) -> Tensor:
        return self.coef * (self.floor - entropy).clamp(min=0) * mask

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._entropy = statistics.get("policy/entropy", self._entropy)  # absent before the first update

    def report(self) -> Mapping[str, float]:
        return {} if self._entropy is None else {"gap": max(0.0, self.floor - self._entropy)}

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self._entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._entropy = state["entropy"]


@hookimpl
def loss_terms() -> list[type[LossTerm]]:
    return [MyName]

"""Between the sum over a row's tokens and their mean: long completions count more, and less than by their length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Aggregation, Fraction

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(Aggregation):
    """mask / (N_u T^power) for a row of T tokens: power 0 sums over them, power 1 is their mean."""

    name = "my_name"
    metrics = (
        Metric(
            "row_weight",
            "times 1 / N_u",
            "sum of the weights of a row of the rollout's mean length: how much longer rows scale the gradient",
        ),
    )

    power: Fraction = 0.5
    """How much of a row's length is divided out."""

    def __post_init__(self) -> None:
        self._length: float | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        twins = {0.0: "seq_mean_token_sum", 1.0: "seq_mean_token_mean"}
        if self.power in twins:
            yield f"power={self.power:g} is aggregation.use={twins[self.power]}: write that, or a power between 0 and 1"

    def __call__(self, mask: Tensor) -> Tensor:
        return mask / (len(mask) * mask.sum(1, keepdim=True).clamp(min=1) ** self.power)

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._length = statistics.get("rollout/length/mean", self._length)

    def report(self) -> Mapping[str, float]:
        return {} if self._length is None else {"row_weight": self._length ** (1 - self.power)}

    def state_dict(self) -> dict[str, Any]:
        return {"length": self._length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._length = state["length"]


@hookimpl
def aggregation() -> list[type[Aggregation]]:
    return [MyName]

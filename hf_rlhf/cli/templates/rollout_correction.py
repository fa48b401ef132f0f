"""Leaves out the tokens that the sampler and the trainer see differently."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt
from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import RolloutCorrection

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(RolloutCorrection):
    """1 where the token's probability differs between trainer and sampler by less than `factor`, 0 elsewhere."""

    name = "my_name"
    metrics = (
        Metric(
            "gap_of_factor",
            "share of log(factor)",
            "mean distance of the log-probs of sampler and trainer, over the largest that stays",
            (None, 0.5),
            "Much is left out: look at the sampler's settings, or raise `factor`.",
        ),
    )

    factor: Annotated[float, Gt(1)] = 2.0
    """Tokens stay whose probabilities differ by less than this factor."""

    def __post_init__(self) -> None:
        self._gap: float | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if algorithm.rollout.exact_logps:
            yield (
                f"rollout={algorithm.rollout.name} reports the trainer's own log-probs, so nothing is left out: set "
                "rollout_correction.use=none"
            )

    def __call__(self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
        ratio = ((old_logps - sampler_logps) * mask).exp()
        return ((ratio < self.factor) & (ratio > 1 / self.factor)) * mask

    def observe(self, statistics: Mapping[str, float]) -> None:
        self._gap = statistics.get("rollout/logp_gap/mean", self._gap)

    def report(self) -> Mapping[str, float]:
        return {} if self._gap is None else {"gap_of_factor": self._gap / math.log(self.factor)}

    def state_dict(self) -> dict[str, Any]:
        return {"gap": self._gap}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gap = state["gap"]


@hookimpl
def rollout_correction() -> list[type[RolloutCorrection]]:
    return [MyName]

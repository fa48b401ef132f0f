"""Drops the prompts that have become easy: those whose completions score well above the policy's running mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Filter, Fraction, Positive

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Scored
    from torch import Tensor

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(Filter):
    """Keeps the groups whose mean score is at most `margin` above the running mean of the rollouts before."""

    name = "my_name"
    needs = frozenset({"groups", "scores"})
    metrics = (Metric("centre", "reward", "running mean of the rollouts' total scores"),)

    margin: Positive = 0.5
    """How far above the running mean a prompt may score and stay."""
    memory: Fraction = 0.9
    """Share of the running mean that a rollout leaves; 0 looks at the last rollout alone."""

    def __post_init__(self) -> None:
        self._centre: float | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        if self.resample == 0 and algorithm.rollout.prompts == algorithm.update.mini_batches:
            yield (
                "every mini-batch holds one prompt, and a dropped one leaves an optimizer step without rows: set "
                "resample=2 on this filter, or lower update.mini_batches"
            )

    def __call__(self, scored: Scored) -> Tensor:
        mean = scored.group_mean(scored.totals())
        highest = float("inf") if self._centre is None else self._centre + self.margin
        return mean <= highest

    def observe(self, statistics: Mapping[str, float]) -> None:
        mean = statistics.get("reward/total/mean")
        if mean is not None:
            before = mean if self._centre is None else self._centre
            self._centre = self.memory * before + (1 - self.memory) * mean

    def report(self) -> Mapping[str, float]:
        return {} if self._centre is None else {"centre": self._centre}

    def state_dict(self) -> dict[str, Any]:
        return {"centre": self._centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._centre = state["centre"]


@hookimpl
def filters() -> list[type[Filter]]:
    return [MyName]

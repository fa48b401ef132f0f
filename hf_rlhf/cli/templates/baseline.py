"""The best rollout so far: completions are good where they beat the policy's record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Baseline, Fraction

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Scored
    from torch import Tensor

hf_rlhf_api = "1.0"

FEWEST = 8
"""Rows of a rollout whose mean is worth a record."""


@dataclass(kw_only=True)
class MyName(Baseline):
    """The highest mean return of a rollout before this one, the same for every row; 0 in the first."""

    name = "my_name"
    metrics = (
        Metric(
            "record",
            "reward",
            "the highest mean return of a rollout, less what was forgotten of it",
            summary="max",
        ),
    )

    forget: Fraction = 0.1
    """Share of the way from the record to a lower mean that it falls with each rollout; 0 keeps it for good."""

    def __post_init__(self) -> None:
        self._record: float | None = None

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        rows = algorithm.rollout.prompts * algorithm.rollout.num_generations
        if rows < FEWEST:
            yield (
                f"the mean of {rows} rows is mostly luck, and its record more so: raise rollout.prompts or "
                f"rollout.num_generations to {FEWEST} rows or more"
            )

    def __call__(self, scored: Scored) -> Tensor:
        return scored.mask.new_full((len(scored.mask), 1), self._record or 0.0)

    def observe(self, statistics: Mapping[str, float]) -> None:
        mean = statistics.get("reward/after_kl/mean")
        if mean is None:  # no row was left
            return
        if self._record is None or mean > self._record:
            self._record = mean
        else:
            self._record += self.forget * (mean - self._record)

    def report(self) -> Mapping[str, float]:
        return {} if self._record is None else {"record": self._record}

    def state_dict(self) -> dict[str, Any]:
        return {"record": self._record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._record = state["record"]


@hookimpl
def baseline() -> list[type[Baseline]]:
    return [MyName]

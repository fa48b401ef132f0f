"""Begin with the first rows of the dataset and let others in with each rollout: a curriculum in the order of the rows.

Try it: `hf-rlhf train quickstart 'sampler={use: first_rows, start: 64}'`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, PromptSampler

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class FirstRows(PromptSampler):
    """Draw from the first `start` rows of the dataset, and from `more` after each rollout."""

    name = "first_rows"

    start: Count = 256
    """Rows to draw from in the first rollout."""
    more: Count = 8
    """Further rows after each rollout."""

    def __post_init__(self) -> None:
        self._rollouts = 0

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        among = self.start + self.more * self._rollouts
        return rng.sample(range(min(rows, max(count, among))), count)

    def observe(self, rows: Sequence[int], scores: Sequence[float]) -> None:  # type: ignore[override]
        """Take a rollout; a score belongs to the row of the dataset in the same place of `rows`."""
        self._rollouts += 1

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self._rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rollouts = state.get("rollouts", 0)


@hookimpl
def sampler() -> list[type[PromptSampler]]:
    return [FirstRows]

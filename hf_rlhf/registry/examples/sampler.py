"""Begin with the first rows of the dataset and let others in as training goes on: a curriculum in their order.

Try it: `hf-rlhf train quickstart 'sampler={use: first_rows, rows_at_start: 64}'`
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
    """Draw from the first rows of the dataset, twice as many whenever the mean score of a rollout reaches 0.5."""

    name = "first_rows"

    rows_at_start: Count = 256
    """Rows to draw from at the start."""

    def __post_init__(self) -> None:
        self._open: int | None = None

    def next(self, count: int, rows: int, rng: Random) -> Sequence[int]:
        among = min(rows, max(count, self._open or self.rows_at_start))
        return rng.sample(range(among), count)

    def observe(self, rows: Sequence[int], scores: Sequence[float]) -> None:  # type: ignore[override]
        known = [score for score in scores if score == score]  # NaN where no reward source applied
        if known and sum(known) / len(known) >= 0.5:
            self._open = 2 * (self._open or self.rows_at_start)

    def state_dict(self) -> dict[str, Any]:
        return {"open": self._open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._open = state.get("open")


@hookimpl
def sampler() -> list[type[PromptSampler]]:
    return [FirstRows]

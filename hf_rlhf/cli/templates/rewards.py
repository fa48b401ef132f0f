"""Rewards completions that hold the words of a dataset column.

What every source has (weight, label, when, clip, workers, timeout, ...) comes with the base class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_rlhf import Metric, hookimpl
from hf_rlhf.axes import Fraction, RewardSource

if TYPE_CHECKING:
    from hf_rlhf.axes import Algorithm
    from hf_rlhf.batch import Rollouts

hf_rlhf_api = "1.0"


@dataclass(kw_only=True)
class MyName(RewardSource):
    """The share of the words of a dataset column that the completion holds; None where a row has no words."""

    name = "my_name"
    rowwise = True
    metrics = (
        Metric(
            "complete_frac",
            "share of rows",
            "completions that hold every word",
            (0.05, None),
            "Hardly any completion is right: raise `partial`, or warm the policy up.",
            summary="max",
        ),
    )

    column: str = "answer"
    """Dataset column with the words to say, as text."""
    partial: Fraction = 0.5
    """Factor of the score where a word is missing; 0 rewards complete answers alone."""

    def __post_init__(self) -> None:
        if not self.column:
            raise ValueError("column is empty: name the dataset column with the words, for instance column=answer")
        self._complete: list[float] = []
        self._missing: list[str] = []

    def columns(self) -> set[str]:
        return {self.column}

    def check(self, algorithm: Algorithm) -> Iterable[str]:
        alike = [source for source in algorithm.rewards if isinstance(source, MyName)]
        twins = [source for source in alike if source.column == self.column]
        if len(twins) > 1:
            yield (
                f"{len(twins)} sources look for the words of column {self.column!r}: leave one out and raise the "
                "weight of the other"
            )

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        wanted = rollouts.column(self.column)
        pairs = zip(rollouts.completions, wanted, strict=True)
        return [self._score(text.lower().split(), words) for text, words in pairs]

    def _score(self, said: list[str], words: Any) -> float | None:
        missing = [word for word in str(words or "").lower().split() if word not in said]
        self._missing.append(" ".join(missing))
        total = len(str(words or "").split())
        if not total:
            return None
        self._complete.append(float(not missing))
        return 1.0 if not missing else self.partial * (1 - len(missing) / total)

    def take_logs(self) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
        """A column of the completions table, one value per row, and a metric, whose values are averaged."""
        missing, self._missing = self._missing, []
        complete, self._complete = self._complete, []
        return {"missing": missing}, {"complete_frac": complete}


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [MyName]

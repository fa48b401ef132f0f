"""Clip and normalize rewards before weighting: `clip`, and `normalize` by running statistics of each source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Spans, TokenScores
from hf_rlhf.runtime.distributed import sum_over_processes
from hf_rlhf.scoring.answers import Answer

if TYPE_CHECKING:
    from accelerate import Accelerator


EQUAL = 1e-9
"""Relative difference below which numbers count as equal."""


class RunningMoments:
    """Running mean and population variance, by merging (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Standard deviation; 1.0 for fewer than two values, and for values equal up to rounding."""
        found = math.sqrt(self.squares / self.count) if self.count > 1 else 0.0
        return found if found > EQUAL * max(1.0, abs(self.mean)) else 1.0

    def add(self, count: float, mean: float, squares: float) -> None:
        """Merge `count` numbers with this mean and sum of squared deviations."""
        if count == 0:
            return
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap * gap * self.count * count / total
        self.mean += gap * count / total
        self.count = total


class RewardNormalizer:
    """Clipping and normalization of the rewards of every source."""

    def __init__(self, sources: Sequence[tuple[str, RewardSource]]) -> None:
        self._sources = dict(sources)
        self._running = {label: RunningMoments() for label, source in sources if source.normalize != "none"}

    def __call__(self, answers: Mapping[str, list[Answer]], accelerator: Accelerator | None) -> dict[str, list[Answer]]:
        """Return the clipped and normalized answers by label.

        Statistics are updated from all processes, unless `accelerator` is None. Uses two collectives if any source is
        normalized, otherwise none.
        """
        clipped = {label: self._clipped(label, given) for label, given in answers.items()}
        if accelerator is not None and self._running:
            self._learn(clipped, accelerator)
        return {label: self._normalized(label, given) for label, given in clipped.items()}

    def changes(self, label: str) -> bool:
        """Return True if a source's numbers may change."""
        return self._sources[label].clip is not None or label in self._running

    def state_dict(self) -> dict[str, list[float]]:
        """Return the state for a checkpoint."""
        return {label: [x.count, x.mean, x.squares] for label, x in self._running.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore the output of `state_dict`."""
        for label, numbers in state.items():
            running = self._running[label]
            running.count, running.mean, running.squares = numbers

    def _clipped(self, label: str, answers: list[Answer]) -> list[Answer]:
        if (bounds := self._sources[label].clip) is None:
            return answers
        low, high = bounds
        return [_mapped(answer, lambda x: min(max(x, low), high)) for answer in answers]

    def _learn(self, answers: Mapping[str, list[Answer]], accelerator: Accelerator) -> None:
        found = {label: [x for answer in answers[label] for x in _numbers(answer)] for label in self._running}
        flat = sum_over_processes(accelerator, [y for x in found.values() for y in (len(x), math.fsum(x))])
        counts, sums = flat[::2], flat[1::2]
        means = [total / max(1.0, count) for count, total in zip(counts, sums, strict=True)]
        off = [math.fsum((y - mean) ** 2 for y in x) for x, mean in zip(found.values(), means, strict=True)]
        squares = sum_over_processes(accelerator, off)
        for running, count, mean, square in zip(self._running.values(), counts, means, squares, strict=True):
            running.add(count, mean, square)

    def _normalized(self, label: str, answers: list[Answer]) -> list[Answer]:
        if (running := self._running.get(label)) is None:
            return answers
        shift = running.mean if self._sources[label].normalize == "mean_std" else 0.0
        return [_mapped(answer, lambda x: (x - shift) / running.std) for answer in answers]


def _mapped(answer: Answer, change: Callable[[float], float]) -> Answer:
    if isinstance(answer, Spans):
        return Spans([(end, change(x)) for end, x in answer.values])
    if isinstance(answer, TokenScores):
        return TokenScores([change(x) for x in answer.values])
    return answer if math.isnan(answer) else change(answer)


def _numbers(answer: Any) -> Iterator[float]:
    if isinstance(answer, Spans):
        yield from (x for _, x in answer.values)
    elif isinstance(answer, TokenScores):
        yield from answer.values
    elif not math.isnan(answer):
        yield answer

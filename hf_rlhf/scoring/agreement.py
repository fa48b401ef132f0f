"""How well scores agree with labels: the share that is equal where both are 0 or 1, else correlations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import StatisticsError, correlation

Number = float | None


@dataclass(kw_only=True)
class Agreement:
    """Of one source with the labels, over the rows that have both."""

    rows: int
    """How many have both a score and a label."""
    binary: bool
    """Whether all of these are 0 or 1."""
    equal: Number = None
    """Share of equal ones, where `binary`."""
    pearson: Number = None
    """Linear correlation, where not `binary`; None where either is constant."""
    spearman: Number = None
    """Correlation of the ranks, equal values sharing the mean of theirs."""
    confusion: Counter[tuple[Number, Number]] = field(default_factory=Counter)
    """(label, score) -> rows, None for a row without; where `binary`."""
    differing: list[int] = field(default_factory=list)
    """The rows whose score is another one than their label, where `binary`."""

    @property
    def number(self) -> Number:
        """The share that is equal, or the linear correlation."""
        return self.equal if self.binary else self.pearson


def agreement(scores: Sequence[Number], labels: Sequence[Number]) -> Agreement:
    """How well scores agree with labels; None for a row without."""
    both = [
        (score, label) for score, label in zip(scores, labels, strict=True) if score is not None and label is not None
    ]
    found = Agreement(rows=len(both), binary=all(x in (0, 1) for pair in both for x in pair))
    if found.binary:
        pairs = list(zip(labels, scores, strict=True))
        found.confusion = Counter(pairs)
        found.differing = [row for row, (a, b) in enumerate(pairs) if None not in (a, b) and a != b]
        found.equal = 1 - len(found.differing) / len(both) if both else None
        return found
    left, right = [x for x, _ in both], [y for _, y in both]
    found.pearson = _correlation(left, right)
    found.spearman = _correlation(ranks(left), ranks(right))
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in their order, from 1; equal values share the mean of their places."""
    order = sorted(values)
    first = {x: place for place, x in reversed(list(enumerate(order, start=1)))}
    counts = Counter(order)
    return [first[x] + (counts[x] - 1) / 2 for x in values]


def _correlation(x: Sequence[float], y: Sequence[float]) -> Number:
    try:
        return correlation(x, y)
    except StatisticsError:  # one row, or all values equal
        return None

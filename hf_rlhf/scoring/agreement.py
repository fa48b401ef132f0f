"""Agreement of scores with labels: the share of equal values if both are 0 or 1, else correlations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import StatisticsError, correlation

Number = float | None


@dataclass(kw_only=True)
class Agreement:
    """Agreement of a source's scores with the labels, over the rows that have both."""

    rows: int
    """Number of rows with both a score and a label."""
    binary: bool
    """True if all of these scores and labels are 0 or 1."""
    equal: Number = None
    """Share of equal values, if `binary`."""
    pearson: Number = None
    """Linear correlation, if not `binary`; None if either is constant."""
    spearman: Number = None
    """Rank correlation; ties share the mean of their ranks."""
    confusion: Counter[tuple[Number, Number]] = field(default_factory=Counter)
    """Number of rows by (label, score), None for a missing value; if `binary`."""
    differing: list[int] = field(default_factory=list)
    """Rows whose score differs from their label, if `binary`."""

    @property
    def number(self) -> Number:
        """Share of equal values, or the linear correlation."""
        return self.equal if self.binary else self.pearson


def agreement(scores: Sequence[Number], labels: Sequence[Number]) -> Agreement:
    """Compute the agreement of scores with labels; None marks a missing value."""
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
    """Return the rank of each value, from 1; ties share the mean of their ranks."""
    order = sorted(values)
    first = {x: place for place, x in reversed(list(enumerate(order, start=1)))}
    counts = Counter(order)
    return [first[x] + (counts[x] - 1) / 2 for x in values]


def _correlation(x: Sequence[float], y: Sequence[float]) -> Number:
    try:
        return correlation(x, y)
    except StatisticsError:  # a single row, or all values equal
        return None

"""Failures of reward sources: those of each source are counted, warned of, and end the run if there are too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_rlhf.axes import RewardSource
from hf_rlhf.scoring.answers import Answer, RewardError

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Consecutive checks in which a source may exceed its `failure_budget`."""
ENOUGH = 8
"""Minimum rows per check of the failure budget; calls with fewer are combined."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Failure to score a row."""

    row: int
    kind: str
    """error or timeout."""
    reason: str
    trace: str
    error: BaseException | None = None
    """Exception, if it was raised in this process."""

    @property
    def place(self) -> str:
        """Return where it was raised: its traceback without the message."""
        return "\n".join(line for line in self.trace.splitlines() if line.startswith("  File "))


@dataclass(kw_only=True)
class SourceResult:
    """Results of one source."""

    answers: list[Answer]
    """One answer per row; NaN if the source does not apply, or failed with `on_error: none`."""
    failures: list[Failure] = field(default_factory=list)
    invalid: list[int] = field(default_factory=list)
    """Rows for which it returned NaN or an infinite number; they count as missing."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that it logged for the table of completions, one value per row."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def count(self, kind: str) -> int:
        """Return the number of failures of a kind."""
        return sum(failure.kind == kind for failure in self.failures)


@dataclass
class FailureBudget:
    """Recent failures of a source."""

    over: int = 0
    """Consecutive checks in which it exceeded its budget."""
    judged: bool = False
    rows: int = 0
    """Rows since the last check, and failures among them."""
    failures: int = 0
    warned: bool = False
    """True once an answer that is not finite has been reported."""
    traced: set[str] = field(default_factory=set)
    """Places of the failures whose tracebacks have been logged."""

    def judge(self, label: str, source: RewardSource, asked: SourceResult, counts: bool) -> None:
        """Warn of failures, and count them with `counts`. Raises `RewardError` if the source's settings require it."""
        failed = {failure.row for failure in asked.failures}
        if counts:
            self.rows += len(failed) + sum(not (is_missing(x) or i in failed) for i, x in enumerate(asked.answers))
            self.failures += len(failed)
        ends = first = False
        if self.rows >= ENOUGH:
            share, first = self.failures / self.rows, not self.judged
            self.over = self.over + 1 if share > source.failure_budget else 0
            self.rows, self.failures, self.judged = 0, 0, True
            ends = (share == 1 and first) or self.over >= PATIENCE
        if asked.failures:
            self._report(label, source, asked, traced=not ends)
        if asked.invalid and not self.warned:
            self.warned = True
            logger.warning(
                "%s returned NaN or an infinite number, %s: they count as missing, from now on without a warning. "
                "Return None where the source does not apply",
                *(_title(label, source), _named(sorted(asked.invalid))),
            )
        if ends:
            self._end(label, source, asked, first)

    def _report(self, label: str, source: RewardSource, asked: SourceResult, traced: bool) -> None:
        reasons: dict[str, list[Failure]] = {}
        for failure in asked.failures:
            reasons.setdefault(failure.reason, []).append(failure)
        if source.on_error == "raise":
            first = asked.failures[0]
            rows = _named([failure.row for failure in asked.failures])
            raise _failure(f"{_title(label, source)} {first.reason}, {rows}", first)
        given = "no score" if isinstance(source.on_error, str) else f"{source.on_error:g}"
        for reason, failures in list(reasons.items())[:10]:
            rows = _named([failure.row for failure in failures])
            logger.warning("%s %s: %s, %s", _title(label, source), reason, rows, f"which get {given}")
        if len(reasons) > 10:
            logger.warning("%s failed for %d more reasons", _title(label, source), len(reasons) - 10)
        last = asked.failures[-1]
        if last.trace and traced and last.place not in self.traced:
            self.traced.add(last.place)
            logger.warning("last failure:\n%s", last.trace)

    def _end(self, label: str, source: RewardSource, asked: SourceResult, first: bool) -> None:
        last = asked.failures[-1] if asked.failures else None
        why = (
            "as for every row so far"
            if first
            else f"and more than {source.failure_budget:.0%} of its rows failed {PATIENCE} times in a row; "
            "raise rewards.*.failure_budget to allow more"
        )
        said = f"{_title(label, source)} {last.reason if last else 'failed'}, {why}"
        if last is not None and last.place in self.traced:
            raise RewardError(f"{said}. Its traceback is above") from None
        raise _failure(said, last)


def _failure(text: str, failure: Failure | None) -> RewardError:
    """Return the error that ends a run, with the traceback of the source as its cause or, of another process, as a note."""
    error = RewardError(text)
    if failure is not None:
        error.__cause__ = failure.error
        if failure.error is None and failure.trace:
            error.add_note(failure.trace)
    return error


def _title(label: str, source: RewardSource) -> str:
    return f"reward {label!r} ({type(source).__name__})"


def _named(rows: Sequence[int]) -> str:
    """Format row numbers as `row 3`, `rows 3, 4`, or `rows 0, 1, ... and 54 more`."""
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:10]))}{more}"


def is_missing(answer: Answer) -> bool:
    """Return whether a source does not apply to a row."""
    return isinstance(answer, float) and math.isnan(answer)

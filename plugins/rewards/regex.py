"""1 if the completion matches a regular expression, else 0."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Positive, RewardSource
from hf_rlhf.batch import Rollouts

from ._patterns import compiled


@dataclass(kw_only=True)
class Regex(RewardSource):
    """min(matches, count) / count for the nonoverlapping matches of the pattern in the completion."""

    name = "regex"
    rowwise = True

    pattern: str
    """Regular expression in the syntax of the `regex` library, a superset of Python's. A leading `(?i)` ignores case,
    `(?s)` lets `.` match line breaks."""
    method: Literal["search", "match", "fullmatch"] = "search"
    """Position of the match: anywhere, at the start, or the whole completion."""
    count: Count = 1
    """Number of matches that give 1; fewer give their share. Only `search` can have more than one."""
    timeout: Positive | None = 5.0
    """Time limit in seconds for matching a row."""

    def __post_init__(self) -> None:
        compiled("pattern", self.pattern)
        if self.count > 1 and self.method != "search":
            raise ValueError(
                f"count must be 1 with method={self.method}, which matches at most once, got {self.count}. Use method=search"
            )

    def prepare(self) -> None:
        compiled("pattern", self.pattern)

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [min(self._matches(completion), self.count) / self.count for completion in rollouts.completions]

    def patterns(self) -> set[str]:
        return {self.pattern}

    def _matches(self, text: str) -> int:
        pattern = compiled("pattern", self.pattern)
        if self.method == "search" and self.count > 1:
            return len(list(islice(pattern.finditer(text, timeout=self.timeout), self.count)))
        return int(getattr(pattern, self.method)(text, timeout=self.timeout) is not None)


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Regex]

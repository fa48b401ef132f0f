"""1 if the completion equals the reference answer, character by character, else 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts

from ._answers import references


@dataclass(kw_only=True)
class ExactMatch(RewardSource):
    """1.0 if the completion equals the row's reference, or one of a list of them, else 0.0; no score without a reference."""

    name = "exact_match"
    verifier = True
    rowwise = True

    column: str = "answer"
    """Dataset column of the reference; numbers are compared as text."""
    ignore_case: bool = False
    """Ignore case."""
    strip: bool = True
    """Ignore whitespace around either text."""

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        rows = zip(rollouts.completions, references(rollouts, self.column, self, lists=True), strict=True)
        return [self._score(*row) for row in rows]

    def answer(self, completion: str) -> str | None:
        return self._plain(completion) or None

    def columns(self) -> set[str]:
        return {self.column}

    def _score(self, completion: str, reference: Any) -> float | None:
        references = reference if isinstance(reference, list | tuple) else [reference]
        known = [self._plain(str(text)) for text in references if text is not None]
        return float(self._plain(completion) in known) if known else None

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [ExactMatch]

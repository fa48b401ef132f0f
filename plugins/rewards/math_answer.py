"""1 if the completion's final answer is mathematically equal to the reference, else 0, by Math-Verify.

Both texts are parsed as LaTeX and as plain expressions (`\\boxed{\\frac12}`, `0.5`, `1/2` are equal). A reference without
delimiters is one expression. In a text the answer is, in this order, in `<answer>`, after the marker or `####` at the end,
in the last box, after "answer is", or the last expression; thoughts (`<think>`) are not read. SymPy evaluates
whatever the model writes, however large, so rows are scored in processes that are killed at a time limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, Positive, RewardSource
from hf_rlhf.batch import Rollouts

from ._answers import references, warn_of_reference
from ._math import final_answer, judge, load


@dataclass(kw_only=True)
class MathAnswer(RewardSource):
    """1.0 if the answer in the completion equals the reference, else 0.0.

    No score (None) if the reference is missing or cannot be parsed.
    """

    name = "math_answer"
    verifier = True
    rowwise = True

    column: str = "answer"
    """Dataset column of the reference."""
    answer_after: str | None = None
    """Marker before the answer, e.g. "A:": the line after its last occurrence is parsed, in completion and reference.
    Ignored for texts without it. `#### 18` at the end of a text (GSM8K) needs no setting."""
    answer_tag: str | None = None
    """Tag around the answer, e.g. "answer" for <answer>: only the last one's content is graded, and a completion without
    it scores 0."""
    workers: Literal["inline", "threads", "processes", "ray"] = "processes"
    """Runner for rows. Only processes can be killed during a computation."""
    timeout: Positive | None = 5.0
    """Time limit in seconds for scoring a row."""
    memory_mib: Count | None = 4096
    """Address space of a process in MiB."""

    def prepare(self) -> None:
        """Load Math-Verify and the tables of its parser."""
        load().parse("$1$", parsing_timeout=None)

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        rows = zip(rollouts.turns(), references(rollouts, self.column, self), strict=True)
        return [self._score(*row) for row in rows]

    def answer(self, completion: str) -> str | None:
        return final_answer(completion, self.answer_after, self.answer_tag)

    def patterns(self) -> set[str]:
        return {f"<{self.answer_tag}></{self.answer_tag}>"} if self.answer_tag else set()

    def columns(self) -> set[str]:
        return {self.column}

    def _score(self, completion: str, reference: Any) -> float | None:
        if reference is None:
            return None
        score = judge(completion, str(reference), self.answer_after, self.answer_tag)
        if score is None:
            warn_of_reference(self.name, self.column, str(reference), "it cannot be parsed")
        return score


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [MathAnswer]

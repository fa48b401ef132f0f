"""1 if the completion's number equals the reference within a tolerance, else 0.

As in evaluations of GSM8K (arXiv:2110.14168) it is the number in `<answer>`, after a marker or `####` at the end, else the
one in the last box, else the last one; thoughts (`<think>`) are not read.
Expressions are not evaluated; `math_answer` does that, at some hundred times the cost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import NonNegative, RewardSource
from hf_rlhf.batch import Rollouts

from ._answers import locate, references, warn_of_reference
from ._numbers import DecimalMark, Reader, reader

NO_NUMBERS = {
    "sqrt",
    "pi",
    "infty",
    "binom",
    "cup",
    "cap",
    "pm",
    "log",
    "ln",
    "sin",
    "cos",
    "tan",
    "theta",
    "overline",
    "in",
}
"""LaTeX commands of references that are expressions: `math_answer` reads those."""


@dataclass(kw_only=True)
class Numeric(RewardSource):
    """1.0 if |x - reference| <= max(abs_tol, rel_tol * |reference|) for the completion's number x, else 0.0.

    No score if the reference is missing or has no number. Units and currencies are not compared.
    """

    name = "numeric"
    verifier = True
    rowwise = True

    column: str = "answer"
    """Dataset column of the reference, a number or a text that is parsed like completions."""
    answer_after: str | None = None
    """Marker before the answer, e.g. "A:": the first number after its last occurrence counts. Ignored for texts without
    it. `#### 18` at the end of a text (GSM8K) needs no setting."""
    answer_tag: str | None = None
    """Tag around the answer, e.g. "answer" for <answer>: only the last one's content is graded, and a completion without
    it scores 0."""
    strict: bool = False
    r"""Score 0 for a completion that marks no answer (marker, tag, #### or \\boxed{}), instead of using its last number."""
    abs_tol: NonNegative = 0.0
    """Largest absolute difference. Without tolerances numbers are compared exactly: 0.1 and 1/10 are equal."""
    rel_tol: NonNegative = 0.0
    """Largest difference relative to the reference."""
    decimal_mark: DecimalMark = "."
    """Decimal separator; the other one of comma and point, an apostrophe or a thin space separates thousands."""
    percent: Literal["number", "fraction"] = "number"
    """Value of 50%: 50, with the sign as a unit, or 0.5."""

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        numbers = reader(self.decimal_mark, self.percent == "fraction")
        return [
            self._score(numbers, completion, reference)
            for completion, reference in zip(rollouts.turns(), references(rollouts, self.column, self), strict=True)
        ]

    def answer(self, completion: str) -> str | None:
        found = self._read(
            reader(self.decimal_mark, self.percent == "fraction"), completion, self.strict, self.answer_tag
        )
        return None if found is None else str(found)

    def patterns(self) -> set[str]:
        return {f"<{self.answer_tag}></{self.answer_tag}>"} if self.answer_tag else set()

    def columns(self) -> set[str]:
        return {self.column}

    def _score(self, numbers: Reader, completion: str, reference: Any) -> float | None:
        if reference is None or reference != reference:
            return None
        if isinstance(reference, int | float):
            truth = Fraction(str(reference))
        else:
            read = self._read(numbers, str(reference), False) if _is_number(str(reference)) else None
            if read is None:
                warn_of_reference(self.name, self.column, str(reference), "it must contain a number")
                return None
            truth = read
        found = self._read(numbers, completion, self.strict, self.answer_tag)
        if found is None:
            return 0.0
        if found == truth:
            return 1.0
        if not self.abs_tol and not self.rel_tol:
            return 0.0
        return float(abs(found - truth) <= max(Fraction(str(self.abs_tol)), Fraction(str(self.rel_tol)) * abs(truth)))

    def _read(self, numbers: Reader, text: str, strict: bool, tag: str | None = None) -> Fraction | None:
        place = locate(text, self.answer_after, tag)
        if not place.stated:
            return None if strict else numbers.last(place.text)
        if place.boxed:
            return numbers.only(place.text.rpartition("=")[2])
        return numbers.first(place.text.rpartition("=")[2])


def _is_number(reference: str) -> bool:
    r"""Return False for an expression with other LaTeX than that of numbers: `3\sqrt{13}` is neither 3 nor 13."""
    commands = re.findall(r"\\([A-Za-z]+)", locate(reference).text)
    return "\n" in reference.strip() or not set(commands) & NO_NUMBERS


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Numeric]

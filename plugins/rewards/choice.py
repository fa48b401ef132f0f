"""1 if the completion picks the correct one of several choices, else 0.

The pick is searched in this order: in `<answer>`, after the marker or in the last \\boxed{}; after words such as "answer
is", "Option:", at their last occurrence before a label; a label at the start or alone (`B`, `(b)`, `B. Paris`); the text
of exactly one choice, if the dataset has those; the last label in parentheses. Several labels joined by "or", "and" or a
comma are no pick, and thoughts (`<think>`) are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts

from ._answers import references, warn_of_reference
from ._picks import meant, pick


@dataclass(kw_only=True)
class Choice(RewardSource):
    """1.0 if the picked label is the reference's, else 0.0; no score if the reference is missing or names no choice."""

    name = "choice"
    verifier = True
    rowwise = True

    column: str = "answer"
    """Dataset column of the correct choice: its label (`C`), its index from 0 (`2`), or its text."""
    choices: str | None = None
    """Dataset column of the choices: a list of their texts, or {"label": [...], "text": [...]}. Their texts then count as
    picks too."""
    labels: str = "ABCD"
    """Labels, one character each, if `choices` has none; only as many as there are choices are used."""
    answer_after: str | None = None
    """Marker before the pick, e.g. "Answer:"; ignored for completions without it."""
    answer_tag: str | None = None
    """Tag around the pick, e.g. "answer" for <answer>: only the last one's content is graded, and a completion without it
    scores 0."""

    def __post_init__(self) -> None:
        if not self.labels or len(set(self.labels.casefold())) < len(self.labels):
            raise ValueError(f"labels must be distinct characters such as ABCD, got {self.labels!r}")

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        given = rollouts.column(self.choices) if self.choices else [None] * len(rollouts)
        rows = zip(rollouts.turns(), references(rollouts, self.column, self), given, strict=True)
        return [self._score(*row) for row in rows]

    def answer(self, completion: str) -> str | None:
        return pick(completion, tuple(self.labels), (), self.answer_after, self.answer_tag)

    def patterns(self) -> set[str]:
        return {f"<{self.answer_tag}></{self.answer_tag}>"} if self.answer_tag else set()

    def columns(self) -> set[str]:
        return {self.column, self.choices} if self.choices else {self.column}

    def _score(self, completion: str, reference: Any, choices: Any) -> float | None:
        if reference is None:
            return None
        labels, texts = self._choices(choices)
        right = meant(reference, labels, texts)
        if right is None:
            warn_of_reference(self.name, self.column, str(reference), f"it must name one of {', '.join(labels)}")
            return None
        return float(pick(completion, labels, texts, self.answer_after, self.answer_tag) == right)

    def _choices(self, choices: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return labels and texts of a row's choices."""
        if isinstance(choices, dict) and {"label", "text"} <= set(choices):
            return tuple(map(str, choices["label"])), tuple(map(str, choices["text"]))
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
            return tuple(self.labels), ()
        if len(choices) > len(self.labels):
            raise ValueError(
                f"rewards.choice: labels must cover the {len(choices)} choices, got {len(self.labels)}. Add labels"
            )
        return tuple(self.labels[: len(choices)]), tuple(map(str, choices))


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Choice]

"""Language consistency: the degree to which the completion is in the target language, by py3langid.

Similar to DeepSeek-R1's language consistency reward (arXiv:2501.12948, section 2.3.2), the share of words in the target
language; single words are hard to identify, so the share is taken over lines, or a probability is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts

from . import _languages


@dataclass(kw_only=True)
class Language(RewardSource):
    """Probability of the target language, or the share of the text in it: 0 to 1.

    Code, formulas and URLs are ignored; no score if no letter remains or the target language is missing.
    """

    name = "language"
    rowwise = True

    language: str | None = None
    """Target language, an ISO 639-1 code such as en; alternatively set `column`."""
    column: str | None = None
    """Dataset column with each row's target language."""
    languages: tuple[str, ...] = ()
    """Candidate languages, in addition to the target; empty: all that py3langid knows. Fewer candidates make short texts
    more reliable."""
    measure: Literal["probability", "share"] = "probability"
    """Probability that the text is in the target language; or the share of its lines, weighted by letters, that are most
    likely in it."""

    def __post_init__(self) -> None:
        if (self.language is None) == (self.column is None):
            raise ValueError("exactly one of language, such as en, and column, a dataset column of codes, must be set")
        given = {*self.languages, *([self.language] if self.language else ())}
        unknown = sorted(given - _languages.known())
        if unknown:
            raise ValueError(f"unknown languages: {', '.join(unknown)}; known: {', '.join(sorted(_languages.known()))}")

    def prepare(self) -> None:
        _languages.known()

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        wanted = rollouts.column(self.column) if self.column else [self.language] * len(rollouts)
        return [self._score(*row) for row in zip(rollouts.completions, wanted, strict=True)]

    def columns(self) -> set[str]:
        return {self.column} if self.column else set()

    def _score(self, completion: str, wanted: Any) -> float | None:
        text = _languages.prose(completion)
        if wanted is None or text is None:
            return None
        if wanted not in _languages.known():
            raise ValueError(
                f"column {self.column} must hold languages that py3langid knows, such as en, got {wanted!r}"
            )
        candidates = frozenset({*self.languages, wanted}) if self.languages else frozenset[str]()
        if self.measure == "probability":
            return _languages.probabilities(text, candidates)[wanted]
        letters = {True: 0, False: 0}
        for line in filter(None, map(str.strip, text.splitlines())):
            found = _languages.probabilities(line, candidates)
            letters[max(found, key=found.__getitem__) == wanted] += sum(map(str.isalpha, line))
        return letters[True] / sum(letters.values())


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Language]

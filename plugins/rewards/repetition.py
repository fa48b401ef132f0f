"""Penalty on repeated n-grams (Demystifying Long Chain-of-Thought Reasoning, arXiv:2502.03373).

Per row it is that of Open-R1 (on words) and TRL (on tokens). Per token it is algorithm 1 of the paper with a penalty of -1
where the repetition is. A larger `weight` is a larger penalty.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_rlhf import hookimpl
from hf_rlhf.axes import Count, RewardSource
from hf_rlhf.batch import Rollouts, TokenScores


@dataclass(kw_only=True)
class Repetition(RewardSource):
    """unique / total - 1 for the completion's n-grams: 0 without repetition, decreasing towards -1.

    Per token -1 at each token of an n-gram that occurred before, 0 elsewhere.
    """

    name = "repetition"
    rowwise = True
    penalty = True

    ngram_size: Count = 3
    """Tokens or words per n-gram."""
    unit: Literal["tokens", "words"] = "tokens"
    """Units of n-grams: sampled tokens, or lower-cased words separated by whitespace."""
    level: Literal["sequence", "token"] = "sequence"
    """One number for the row, or a penalty at each repeated token."""

    def __post_init__(self) -> None:
        if self.level == "token" and self.unit == "words":
            raise ValueError("unit must be tokens with level=token, got words. Set unit=tokens")

    def __call__(self, rollouts: Rollouts) -> list[float] | list[TokenScores]:
        if self.unit == "words":
            return [self._share(completion.lower().split()) for completion in rollouts.completions]
        rows = list(zip(rollouts.completion_ids, rollouts.masks, strict=True))
        if self.level == "token":
            return [self._by_token(ids, mask) for ids, mask in rows]
        return [self._share([token for token, m in zip(ids, mask, strict=True) if m]) for ids, mask in rows]

    def _share(self, units: Sequence[Hashable]) -> float:
        ngrams = self._ngrams(units)
        return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0

    def _by_token(self, ids: list[int], mask: list[int]) -> TokenScores:
        sampled = [place for place, m in enumerate(mask) if m]
        values, seen = [0.0] * len(ids), set()
        for start, ngram in enumerate(self._ngrams([ids[place] for place in sampled])):
            if ngram in seen:
                for place in sampled[start : start + self.ngram_size]:
                    values[place] = -1.0
            seen.add(ngram)
        return TokenScores(values)

    def _ngrams(self, units: Sequence[Hashable]) -> list[tuple[Hashable, ...]]:
        return list(zip(*(units[start:] for start in range(self.ngram_size)), strict=False))


@hookimpl
def rewards() -> list[type[RewardSource]]:
    return [Repetition]

"""Language identification with py3langid."""

from __future__ import annotations

import copy
import re
from functools import cache, lru_cache
from typing import Any

NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|https?://\S+",
    re.DOTALL,
)
"""Pattern of code, formulas and URLs."""


def probabilities(text: str, candidates: frozenset[str] = frozenset()) -> dict[str, float]:
    """Return the probability of each candidate language, by ISO 639 code; without candidates, of all known ones.

    Text in capitals is lowercased first. Raises `ValueError` for an unknown candidate.
    """
    return dict(_identifier(candidates).rank(text))


def known() -> frozenset[str]:
    """Return the languages that py3langid knows."""
    return frozenset(_model().labels)


def prose(text: str) -> str | None:
    """Remove code, formulas and URLs from a text; returns None if no letter remains."""
    rest = NOT_PROSE.sub(" ", text)
    return rest if any(map(str.isalpha, rest)) else None


@lru_cache(maxsize=100)
def _identifier(candidates: frozenset[str]) -> Any:
    identifier = copy.copy(_model())  # shares its tables
    identifier.set_languages(sorted(candidates) or None)
    return identifier


@cache
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

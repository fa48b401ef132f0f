"""Regular expressions from recipes, matched against model output with a time limit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=100)
def compiled(setting: str, pattern: str, *, dotall: bool = False) -> Any:
    """Compile a pattern in the syntax of the `regex` library, a superset of `re`'s. Raises `ValueError` if it is invalid.

    Its methods take `timeout` in seconds, after which they raise `TimeoutError`.
    """
    import regex

    try:
        return regex.compile(pattern, regex.DOTALL if dotall else 0)
    except regex.error as error:
        raise ValueError(f"{setting} must be a regular expression, got {pattern!r}: {error}") from error

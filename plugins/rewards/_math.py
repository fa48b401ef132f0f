"""Parsing and comparison with Math-Verify, without its own time limits.

Those use SIGALRM, which works in the main thread only and does not interrupt big-integer arithmetic. Callers must be able
to kill the process: `(10^9)!` and `9^{9^{9^9}}` are computed before they are compared.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from ._answers import after


def judge(completion: str, reference: str, answer_after: str | None = None) -> float | None:
    """Return 1.0 if a completion's answer equals the reference, else 0.0; None if the reference cannot be parsed."""
    math_verify = load()
    gold = _parse(math_verify, reference, answer_after)
    if not gold:
        return None
    return float(math_verify.verify(gold, _parse(math_verify, completion, answer_after), timeout_seconds=None))


def final_answer(completion: str, answer_after: str | None = None) -> str | None:
    """Return the answer in a completion as Math-Verify prints it; None if there is none."""
    found = _parse(load(), completion, answer_after)
    return str(found[0]) if found else None


def _parse(math_verify: Any, text: str, answer_after: str | None) -> list[Any]:
    marked = after(text, answer_after)
    return math_verify.parse(text if marked is None else marked, parsing_timeout=None)


@cache
def load() -> Any:
    """Import the library, without its warning that time limits are off."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify

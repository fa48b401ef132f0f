"""Final answers in completions: after a marker or in a box."""

from __future__ import annotations

import logging
import re
from functools import lru_cache

logger = logging.getLogger(__name__)

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def after(text: str, marker: str | None) -> str | None:
    """Return the text after the last `marker`; None without a marker, or if the text lacks it."""
    if not marker:
        return None
    place = text.rfind(marker)
    return None if place < 0 else text[place + len(marker) :]


def boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...}; None if there is none or it is unclosed. Runs in linear time."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    opening = start + len("\\boxed")
    while text[opening : opening + 1].isspace():
        opening += 1
    if text[opening : opening + 1] != "{":
        return None
    depth = 0
    for brace in _BRACE.finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[opening + 1 : brace.start()]
    return None


@lru_cache(maxsize=1000)
def warn_of_reference(name: str, column: str, value: str, lacks: str) -> None:
    """Warn once about each unusable reference."""
    logger.warning("rewards.%s: no score for rows whose column %s is %.60r: %s", name, column, value, lacks)

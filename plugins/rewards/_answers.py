"""Location of the final answer in a text, and references in dataset columns."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts

logger = logging.getLogger(__name__)

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_THOUGHTS = re.compile(r"(</?(?:think|thinking|thought|reasoning)>|\[/?THINK\])")
_GSM8K = "####"


@dataclass(frozen=True)
class Located:
    """The part of a text that holds its answer."""

    text: str
    stated: bool
    """True if the text marks its answer: by a marker, an answer tag, `####` at the end, or a box."""
    boxed: bool = False
    """True if `text` is the content of a box."""


def locate(text: str, marker: str | None = None, tag: str | None = None) -> Located:
    """Return where a text states its answer: not in its thoughts, and as narrow as its marks allow.

    The marks, each searched in what the ones before it enclose: the last `<tag>...</tag>` (`<answer>` if there is one, when
    `tag` is None); the first line after the last `marker`, else `#### ...` at the end; the last box. With `tag`, a text
    without it states nothing.
    """
    text = without_thoughts(text)
    content = enclosed(text, tag or "answer")
    if tag and content is None:
        return Located("", True)
    stated = content is not None
    text = text if content is None else content
    marked = after(text, marker)
    if marked is None:
        last = after(text.rstrip(), _GSM8K)
        marked = None if last is None or "\n" in last.lstrip() else last
    if marked is not None:
        stated = True
        text = marked
    box = boxed(text)
    if box is not None:
        return Located(box, True, True)
    return Located(text.strip().partition("\n")[0] if marked is not None else text, stated)


def without_thoughts(text: str) -> str:
    """Return a text without its thoughts: `<think>...</think>` and the like, also if one of the two tags is missing."""
    pieces = _THOUGHTS.split(text)
    kept, thinking = [pieces[0]], False
    for tag, said in zip(pieces[1::2], pieces[2::2], strict=True):
        closing = tag[1] == "/"
        if closing and not thinking:
            kept.clear()
        thinking = not closing
        if closing:
            kept.append(said)
    return "".join(kept)


def enclosed(text: str, tag: str) -> str | None:
    """Return the content of the last closed `<tag>...</tag>`; None if there is none."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end]


def after(text: str, marker: str | None) -> str | None:
    """Return the text after the last `marker`; None without a marker, or if the text lacks it."""
    if not marker:
        return None
    place = text.rfind(marker)
    return None if place < 0 else text[place + len(marker) :]


def boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} or \fbox{...}; None if there is none or it is unclosed, in linear time."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    opening = start + len("\\boxed" if text.startswith("\\boxed", start) else "\\fbox")
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


def references(rollouts: Rollouts, column: str, source: RewardSource, *, lists: bool = False) -> list[Any]:
    """Return a column's references, one per row. Raises `ValueError` for mappings and, without `lists`, for lists."""
    values = rollouts.column(column)
    for value in values:
        if isinstance(value, Mapping):
            raise ValueError(
                f"rewards.{source.name}: column {column!r} must hold answers, got a mapping with the keys "
                f"{', '.join(map(str, value))}. Set {source.override(f'column={column}.{_answer_key(value)}')}"
            )
        if isinstance(value, list | tuple) and not lists:
            raise ValueError(
                f"rewards.{source.name}: column {column!r} must hold one answer per row, got a list. Set "
                f"{source.override(f'column={column}.0')}"
            )
    return values


def _answer_key(value: Mapping[Any, Any]) -> str:
    known = ("ground_truth", "answer", "solution", "value", "text")
    return next((key for key in known if key in value), str(next(iter(value), "KEY")))


@lru_cache(maxsize=1000)
def warn_of_reference(name: str, column: str, value: str, lacks: str) -> None:
    """Warn once about each unusable reference."""
    logger.warning("rewards.%s: no score for rows whose column %s is %.60r: %s", name, column, value, lacks)

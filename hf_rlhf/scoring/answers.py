"""What a reward source said of each row: checked, and refused with a reason where it is not what is due. Needs no torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.runtime.errors import UserError

logger = logging.getLogger(__name__)


class RewardError(UserError, RuntimeError):
    """A reward source raised, or answered with something that is not one number per row."""


Answer = float | Spans | TokenScores
"""What a source said of one row: a number (NaN: does not apply), rewards by step, or rewards by token."""


def checked(label: str, answer: Any, rollouts: Rollouts, rows: Sequence[int] | None = None) -> list[Answer]:
    """One answer per row: NaN where a source does not apply (None, NaN) or gave an infinite number.

    `rows`: what the rows are called in messages, their places when left out. Raises `RewardError`.
    """
    named = range(len(rollouts)) if rows is None else rows
    listed = _listed(label, answer, len(rollouts))
    given = [_answer(label, named[i], i, value, rollouts) for i, value in enumerate(listed)]
    infinite = [i for i, value in enumerate(given) if isinstance(value, float) and math.isinf(value)]
    if infinite:
        names = [named[i] for i in infinite]
        logger.warning("reward %r gave an infinite number for rows %s: they count as missing", label, names)
    return [math.nan if i in infinite else value for i, value in enumerate(given)]


def _listed(label: str, answer: Any, rows: int) -> Sequence[Any]:
    if getattr(answer, "ndim", 1) != 1:
        raise RewardError(
            f"reward {label!r} gave an array of shape {tuple(answer.shape)}; one number per row: ({rows},)"
        )
    if hasattr(answer, "tolist") and getattr(answer, "ndim", None) == 1:
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        raise RewardError(
            f"reward {label!r} gave a {type(answer).__name__}; a list with one number or None per row is due"
        )
    if len(answer) != rows:
        raise RewardError(
            f"reward {label!r} gave {len(answer)} numbers for {rows} completions; one per completion is due"
        )
    return answer


def _answer(label: str, row: int, place: int, value: Any, rollouts: Rollouts) -> Answer:
    if type(value) is float or value is None:
        return math.nan if value is None else value
    if isinstance(value, TokenScores):
        tokens = len(rollouts.completion_ids[place])
        if len(value.values) != tokens:
            raise RewardError(
                f"reward {label!r}, row {row}: {len(value.values)} token scores for {tokens} completion tokens; one for each "
                "is due, tool tokens and the end-of-sequence token included"
            )
        return TokenScores([_finite(label, row, x) for x in value.values])
    if isinstance(value, Spans):
        length = len(rollouts.completions[place])
        for step in value.values:
            if not (isinstance(step, tuple | list) and len(step) == 2 and isinstance(step[0], Integral)):
                raise RewardError(
                    f"reward {label!r}, row {row}: {step!r} among its Spans; each is (end, value), `end` the place in "
                    "characters after the step"
                )
            end = step[0]
            if not 0 <= end <= length:
                raise RewardError(
                    f"reward {label!r}, row {row}: a step ends at character {end} of a completion with {length} characters; "
                    "`end` is the place after the step's last character"
                )
        return Spans([(int(end), _finite(label, row, x)) for end, x in value.values])
    return _number(label, row, value)


def _finite(label: str, row: int, value: Any) -> float:
    number = _number(label, row, value)
    if not math.isfinite(number):
        raise RewardError(
            f"reward {label!r}, row {row}: {value!r} among the rewards of its steps or tokens; give finite numbers, or None "
            "for the whole row where the source does not apply"
        )
    return number


def _number(label: str, row: int, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise RewardError(
            f"reward {label!r}, row {row}: {value!r} is no number and not None; rewards by step are Spans([(end, value), "
            "...]), by token TokenScores([...])"
        ) from None


def as_json(answer: Answer) -> Any:
    """A number, or {"spans": [[end, value], ...]}, or {"tokens": [value, ...]}."""
    if isinstance(answer, Spans):
        return {"spans": [list(step) for step in answer.values]}
    return {"tokens": answer.values} if isinstance(answer, TokenScores) else answer


def from_json(value: Any) -> Any:
    """What `as_json` made of an answer, as the source gave it."""
    if not isinstance(value, dict):
        return value
    return Spans([(end, x) for end, x in value["spans"]]) if "spans" in value else TokenScores(value["tokens"])

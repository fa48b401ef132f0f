"""Validation of the answers of a reward source, one per row. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.runtime.worker_pool import WorkerError, WorkerStartError


class RewardError(WorkerError):
    """Error for a reward source that raised, or returned something other than one answer per row."""

    code = 1


class RewardStartError(RewardError, WorkerStartError):
    """Error for a reward source whose workers cannot be started."""

    code = 2


Answer = float | Spans | TokenScores
"""A source's answer for a row: a number (NaN: does not apply), per-step rewards, or per-token rewards."""


def checked(
    label: str, answer: Any, rollouts: Rollouts, rows: Sequence[int] | None = None
) -> tuple[list[Answer], list[int]]:
    """Return one answer per row, NaN where the source does not apply, and the rows where it returned NaN or an infinity.

    Those count as missing as well. `rows` are the rows' numbers, by default their indices. Raises `RewardError`.
    """
    named = range(len(rollouts)) if rows is None else rows
    listed = _listed(label, answer, len(rollouts))
    given = [_answer(label, named[i], i, value, rollouts) for i, value in enumerate(listed)]
    missing = [isinstance(value, float) and not math.isfinite(value) for value in given]
    invalid = [named[i] for i, value in enumerate(listed) if missing[i] and value is not None]
    return [math.nan if absent else value for absent, value in zip(missing, given, strict=True)], invalid


def _listed(label: str, answer: Any, rows: int) -> Sequence[Any]:
    if getattr(answer, "ndim", 1) != 1:
        raise RewardError(
            f"reward {label!r} must return one number per row, shape ({rows},), got shape {tuple(answer.shape)}"
        )
    if hasattr(answer, "tolist") and getattr(answer, "ndim", None) == 1:
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        raise RewardError(
            f"reward {label!r} must return a list with one number or None per row, got a {type(answer).__name__}"
        )
    if len(answer) != rows:
        raise RewardError(f"reward {label!r} must return one number per completion ({rows}), got {len(answer)}")
    return answer


def _answer(label: str, row: int, place: int, value: Any, rollouts: Rollouts) -> Answer:
    if type(value) is float or value is None:
        return math.nan if value is None else value
    if isinstance(value, TokenScores):
        tokens = len(rollouts.completion_ids[place])
        if len(value.values) != tokens:
            raise RewardError(
                f"reward {label!r}, row {row}: TokenScores must have one value per completion token ({tokens}, including tool "
                f"tokens and the end-of-sequence token), got {len(value.values)}"
            )
        return TokenScores([_finite(label, row, x) for x in value.values])
    if isinstance(value, Spans):
        length = len(rollouts.completions[place])
        for step in value.values:
            if not (isinstance(step, tuple | list) and len(step) == 2 and isinstance(step[0], Integral)):
                raise RewardError(
                    f"reward {label!r}, row {row}: each item of Spans must be (end, value), with the step's end position in "
                    f"characters, got {step!r}"
                )
            end = step[0]
            if not 0 <= end <= length:
                raise RewardError(
                    f"reward {label!r}, row {row}: `end`, the position after a step's last character, must be between 0 and "
                    f"the completion's {length} characters, got {end}"
                )
        return Spans([(int(end), _finite(label, row, x)) for end, x in value.values])
    return _number(label, row, value)


def _finite(label: str, row: int, value: Any) -> float:
    number = _number(label, row, value)
    if not math.isfinite(number):
        raise RewardError(
            f"reward {label!r}, row {row}: per-step and per-token rewards must be finite numbers, got {value!r}. Return None "
            "for the whole row if the source does not apply"
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
            f"reward {label!r}, row {row}: an answer must be a number, None, Spans([(end, value), ...]) or TokenScores([...]), "
            f"got {value!r}"
        ) from None


def as_json(answer: Answer) -> Any:
    """Convert an answer to a number, {"spans": [[end, value], ...]}, or {"tokens": [value, ...]}."""
    if isinstance(answer, Spans):
        return {"spans": [list(step) for step in answer.values]}
    return {"tokens": answer.values} if isinstance(answer, TokenScores) else answer


def from_json(value: Any) -> Any:
    """Convert the output of `as_json` back to an answer."""
    if not isinstance(value, dict):
        return value
    return Spans([(end, x) for end, x in value["spans"]]) if "spans" in value else TokenScores(value["tokens"])

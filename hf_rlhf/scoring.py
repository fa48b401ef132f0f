"""Reward sources to numbers: one call per source, its answer checked and put at its tokens, what does not apply kept
apart from 0."""

from __future__ import annotations

import copy
import logging
import math
import traceback
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts, Spans, TokenScores
from hf_rlhf.validation import UserError

logger = logging.getLogger(__name__)


class RewardError(UserError, RuntimeError):
    """A reward source raised, or answered with something that is not one number per row."""


Answer = float | Spans | TokenScores
"""What a source said of one row: a number (NaN: does not apply), rewards by step, or rewards by token."""


def ask(sources: Sequence[tuple[str, RewardSource]], rollouts: Rollouts) -> dict[str, list[Answer]]:
    """label -> the answer for each row, checked: NaN where a source does not apply (None, NaN) or gave an infinite number.

    Each source gets a copy of its own, so that none can change what the next one sees. Raises `RewardError`.
    """
    return {label: _ask(label, source, rollouts) for label, source in sources}


def score(sources: Sequence[tuple[str, RewardSource]], rollouts: Rollouts) -> dict[str, Tensor]:
    """label -> (n,) float64, the total of each row, NaN where a source does not apply. Raises `RewardError`."""
    return totals(ask(sources, rollouts), rollouts)


def totals(answers: dict[str, list[Answer]], rollouts: Rollouts) -> dict[str, Tensor]:
    """label -> (n,) float64: the number, or the sum over steps or over the tokens that the policy sampled."""
    return {
        label: torch.tensor(
            [_sum(answer, mask) for answer, mask in zip(given, rollouts.masks, strict=True)], dtype=torch.float64
        )
        for label, given in answers.items()
    }


def _sum(answer: Answer, mask: Sequence[int]) -> float:
    if isinstance(answer, Spans):
        return math.fsum(value for _, value in answer.values)
    if isinstance(answer, TokenScores):
        return math.fsum(value * m for value, m in zip(answer.values, mask, strict=True))
    return answer


def place(answers: Sequence[Answer], rollouts: Rollouts, tokenizer: Any, width: int) -> Tensor:
    """(n, width) float64, each reward of one source at its token.

    A number stands at the row's last sampled token, a step's value at the token that holds the step's last character, or
    at the sampled token before it where a tool wrote that one (the first one where none comes before).
    """
    placed = torch.zeros(len(answers), width, dtype=torch.float64)
    for row, answer in enumerate(answers):
        mask, ids = rollouts.masks[row], rollouts.completion_ids[row]
        sampled = [i for i, m in enumerate(mask) if m]
        if not sampled:
            continue
        if isinstance(answer, TokenScores):
            placed[row, : len(ids)] = torch.tensor(answer.values, dtype=torch.float64) * torch.tensor(mask)
        elif isinstance(answer, Spans):
            characters = cache(lambda i, ids=ids: _characters(tokenizer, ids[: i + 1]))
            for end, value in answer.values:
                token = bisect_left(range(len(ids)), end, key=characters)
                placed[row, sampled[max(0, bisect_right(sampled, token) - 1)]] += value
        elif not math.isnan(answer):
            placed[row, sampled[-1]] = answer
    return placed


def _characters(tokenizer: Any, ids: list[int]) -> int:
    """How many characters of the completion the first tokens make; half a character does not count."""
    return len(tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd"))


def _ask(label: str, source: RewardSource, rollouts: Rollouts) -> list[Answer]:
    try:
        answer: Any = source(copy.deepcopy(rollouts))
    except (Exception, SystemExit) as error:  # a reward that exits must not end the run as if it had succeeded
        place = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
        raise RewardError(
            f"reward {label!r} ({type(source).__name__}) raised {type(error).__name__}: {error} "
            f"(at {place.filename}:{place.lineno})"
        ) from error
    given = [_answer(label, row, value, rollouts) for row, value in enumerate(_listed(label, answer, len(rollouts)))]
    infinite = [row for row, value in enumerate(given) if isinstance(value, float) and math.isinf(value)]
    if infinite:
        logger.warning("reward %r gave an infinite number for rows %s: they count as missing", label, infinite)
    return [math.nan if row in infinite else value for row, value in enumerate(given)]


def _answer(label: str, row: int, value: Any, rollouts: Rollouts) -> Answer:
    if isinstance(value, TokenScores):
        tokens = len(rollouts.completion_ids[row])
        if len(value.values) != tokens:
            raise RewardError(
                f"reward {label!r}, row {row}: {len(value.values)} token scores for {tokens} completion tokens; one for each "
                "is due, tool tokens and the end-of-sequence token included"
            )
        return TokenScores([_finite(label, row, x) for x in value.values])
    if isinstance(value, Spans):
        length = len(rollouts.completions[row])
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


def total(scores: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """(n,) the weighted sum of the sources that apply to each row, and (n,) bool, False where none does."""
    stacked = torch.stack([scores[label] for label in weights])
    factors = torch.tensor(list(weights.values()), dtype=stacked.dtype).unsqueeze(1).to(stacked.device)
    return (stacked.nan_to_num(0.0) * factors).sum(0), ~stacked.isnan().all(0)

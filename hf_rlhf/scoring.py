"""Reward sources to numbers: one call per source, its answer checked, what does not apply kept apart from 0."""

from __future__ import annotations

import copy
import logging
import math
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_rlhf.axes import RewardSource
from hf_rlhf.batch import Rollouts
from hf_rlhf.validation import UserError

logger = logging.getLogger(__name__)


class RewardError(UserError, RuntimeError):
    """A reward source raised, or answered with something that is not one number per row."""


def score(sources: Sequence[tuple[str, RewardSource]], rollouts: Rollouts) -> dict[str, Tensor]:
    """label -> (n,) float64, NaN where a source does not apply (None, NaN) or gave an infinite number.

    Each source gets a copy of its own, so that none can change what the next one sees. Raises `RewardError`.
    """
    return {label: _score(label, source, rollouts) for label, source in sources}


def _score(label: str, source: RewardSource, rollouts: Rollouts) -> Tensor:
    try:
        answer: Any = source(copy.deepcopy(rollouts))
    except (Exception, SystemExit) as error:  # a reward that exits must not end the run as if it had succeeded
        place = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
        raise RewardError(
            f"reward {label!r} ({type(source).__name__}) raised {type(error).__name__}: {error} "
            f"(at {place.filename}:{place.lineno})"
        ) from error
    numbers = [_number(label, row, value) for row, value in enumerate(_listed(label, answer, len(rollouts)))]
    infinite = [row for row, value in enumerate(numbers) if math.isinf(value)]
    if infinite:
        logger.warning("reward %r gave an infinite number for rows %s: they count as missing", label, infinite)
        numbers = [math.nan if math.isinf(value) else value for value in numbers]
    return torch.tensor(numbers, dtype=torch.float64)


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
        raise RewardError(f"reward {label!r}, row {row}: {value!r} is no number and not None") from None


def total(scores: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """(n,) the weighted sum of the sources that apply to each row, and (n,) bool, False where none does."""
    stacked = torch.stack([scores[label] for label in weights])
    factors = torch.tensor(list(weights.values()), dtype=stacked.dtype).unsqueeze(1).to(stacked.device)
    return (stacked.nan_to_num(0.0) * factors).sum(0), ~stacked.isnan().all(0)

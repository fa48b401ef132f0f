"""Checks before a model is loaded, which would otherwise fail or mislead later."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def warn_of_ragged_epochs(rows: int | None, prompts: int, args: TrainingArguments) -> None:
    """Log how many of `rows` prompts an epoch of whole rollouts leaves out; with `max_steps`, epochs do not count."""
    if rows is not None and rows > prompts and rows % prompts and args.max_steps <= 0 and args.process_index == 0:
        logger.warning(
            "an epoch is %d rollouts of rollout.prompts=%d, which leaves %d of the %d prompts out; the next epoch begins with "
            "them. Set rollout.prompts to a divisor of %d, or training.max_steps, to train on all",
            *(rows // prompts, prompts, rows % prompts, rows, rows),
        )

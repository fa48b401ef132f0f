"""Callbacks around each optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class StepCallback(TrainerCallback):
    """Call `before` when the gradients of a step are complete, and `after`, with the step's number, before logging and saving."""

    def __init__(self, before: Callable[[], None], after: Callable[[int], None]):
        self.before, self.after = before, after

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `before`."""
        self.before()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `after`."""
        self.after(state.global_step)
